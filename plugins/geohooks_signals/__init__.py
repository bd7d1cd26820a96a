"""Signals: what the output distribution looks like at every position, and how far it has moved from a base model's."""

from __future__ import annotations

from geohooks_signals.recorder import Signals

__all__ = ["Signals"]
