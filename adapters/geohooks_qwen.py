"""Qwen 2 and 3, dense and with experts."""

from __future__ import annotations

from torch import nn

from geohooks.adapter import Adapter
from geohooks.discovery import model_type
from geohooks.markers import hookimpl

__all__ = ["Qwen", "adapt"]

FAMILIES = ("qwen2", "qwen3", "qwen3_moe")


class Qwen(Adapter):
    """The default shape; its routers take the top of a softmax over all experts."""

    name = "qwen"


@hookimpl
def adapt(model: nn.Module) -> Adapter | None:
    """The adapter of `model` if it is of this family."""
    return Qwen(model.config) if model_type(model) in FAMILIES else None
