"""Models of no known family, read by what they declare to transformers, else by the shape of their modules."""

from __future__ import annotations

from torch import nn

from geohooks.adapter import Adapter
from geohooks.markers import hookimpl

__all__ = ["Structural", "adapt"]


class Structural(Adapter):
    """Reads declarations and shapes alone; it does not claim that the parts of a block sum to its output."""

    name = "structural"
    additive = False


@hookimpl(trylast=True)
def adapt(model: nn.Module) -> Adapter | None:
    """The adapter of any model."""
    return Structural()
