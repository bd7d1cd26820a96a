"""The `geohooks` command."""

from __future__ import annotations

from geohooks.cli.application import main

__all__ = ["main"]
