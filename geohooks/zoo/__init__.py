"""Small trained models that ship with the package, and untrained tiny ones of many families."""

from __future__ import annotations

from geohooks.zoo.trained import ZooModel, load, names, path
from geohooks.zoo.untrained import example_inputs, families, untrained

__all__ = ["ZooModel", "example_inputs", "families", "load", "names", "path", "untrained"]
