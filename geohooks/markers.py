"""The markers of hooks: `hookspec` declares an event, `hookimpl` marks a method that hears it."""

from __future__ import annotations

import pluggy

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("geohooks")
hookimpl = pluggy.HookimplMarker("geohooks")
