"""The errors that geohooks raises: each names the thing, the value, and what to do."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "ArtifactError",
    "DataError",
    "GeohooksError",
    "PluginError",
    "ReferenceMismatch",
    "SelectorError",
]


class GeohooksError(RuntimeError):
    """What every error of geohooks is."""


class PluginError(GeohooksError):
    """A plugin that can't be found, is written wrongly, or asks for what this model lacks."""


class SelectorError(GeohooksError):
    """A selector that matches no site of this model; the message names the nearest ones."""


class AdapterError(GeohooksError):
    """A model that no adapter can read, or that does not behave as its adapter says."""


class ReferenceMismatch(GeohooksError):  # noqa: N818 - the name is part of the contract
    """A base model that can't be compared with the instrumented one."""


class ArtifactError(GeohooksError):
    """A file that geohooks wrote or expects, and that is missing, foreign or broken."""


class DataError(GeohooksError):
    """Input data that can't be read as documents."""
