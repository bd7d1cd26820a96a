"""Llama, and the families of its very shape."""

from __future__ import annotations

from torch import nn

from geohooks.adapter import Adapter
from geohooks.discovery import model_type
from geohooks.markers import hookimpl

__all__ = ["Llama", "adapt"]

FAMILIES = ("llama", "mistral")


class Llama(Adapter):
    """Pre-norm decoder with rotary positions, grouped queries and a gated mlp: the default shape."""

    name = "llama"


@hookimpl
def adapt(model: nn.Module) -> Adapter | None:
    """The adapter of `model` if it is of this family."""
    return Llama(model.config) if model_type(model) in FAMILIES else None
