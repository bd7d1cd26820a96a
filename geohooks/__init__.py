"""Plugin-based instrumentation for transformers."""

from __future__ import annotations

from geohooks import measures
from geohooks.call import Call
from geohooks.errors import (
    AdapterError,
    ArtifactError,
    DataError,
    GeohooksError,
    PluginError,
    ReferenceMismatch,
    SelectorError,
)
from geohooks.events import AttentionEvent, HiddenEvent, LogitsEvent, RouterEvent, ScoresEvent
from geohooks.host import Host, capture, instrument
from geohooks.markers import hookimpl
from geohooks.roster import Plugin
from geohooks.sites import Site

__all__ = [
    "instrument",
    "capture",
    "hookimpl",
    "Plugin",
    "Host",
    "Call",
    "Site",
    "HiddenEvent",
    "RouterEvent",
    "AttentionEvent",
    "LogitsEvent",
    "ScoresEvent",
    "GeohooksError",
    "AdapterError",
    "ArtifactError",
    "DataError",
    "PluginError",
    "ReferenceMismatch",
    "SelectorError",
    "measures",
]
