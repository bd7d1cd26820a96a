"""Models that ship with the package, and untrained tiny ones."""

from __future__ import annotations

from geohooks.zoo.untrained import example_inputs, families, untrained

__all__ = ["example_inputs", "families", "untrained"]
