"""The vision transformer."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from geohooks.adapter import Adapter, Names
from geohooks.discovery import model_type
from geohooks.markers import hookimpl

__all__ = ["ViT", "adapt"]

FAMILIES = ("vit",)


class ViT(Adapter):
    """Positions are patches of an image, with a class token before them; there is no gate."""

    name = "vit"
    embedding = "embeddings"
    final_norm = "layernorm"
    mlp_projections: ClassVar[Names] = {"up": ("fc1",), "down": ("fc2",)}


@hookimpl
def adapt(model: nn.Module) -> Adapter | None:
    """The adapter of `model` if it is of this family."""
    return ViT(model.config) if model_type(model) in FAMILIES else None
