"""What is installed: plugins and adapters, found through entry points."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
from importlib import metadata
from typing import Any

import attrs
import pluggy
from torch import nn

from geohooks.adapter import Adapter
from geohooks.errors import AdapterError, PluginError
from geohooks.hookspecs import AdapterSpecs

__all__ = ["Installed", "adapter_for", "disabled", "installed", "load_plugin"]

_log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Installed:
    """One entry point: its name, the distribution and object it comes from, and what loading it gave."""

    name: str
    distribution: str
    origin: str
    target: Any = None
    error: Exception | None = None


def disabled() -> frozenset[str]:
    """The plugin names in `GEOHOOKS_DISABLE_PLUGINS`, separated by commas."""
    names = os.environ.get("GEOHOOKS_DISABLE_PLUGINS", "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


@functools.cache
def installed(group: str) -> tuple[Installed, ...]:
    """Every entry point of `group`, "geohooks.plugins" or "geohooks.adapters", by name.

    One that can't be loaded is kept with its error and logged; the others are not touched by it.
    """
    found = sorted(set(metadata.entry_points(group=group)), key=lambda point: (point.name, point.value))
    return tuple(_loaded(point) for point in found)


def _loaded(point: metadata.EntryPoint) -> Installed:
    distribution = point.dist.name if point.dist is not None else "unknown"
    origin = f"{distribution} {point.dist.version if point.dist is not None else ''}".strip()
    try:
        return Installed(point.name, distribution, f"{origin} ({point.value})", point.load())
    except Exception as error:  # noqa: BLE001 - a foreign module may raise anything; it must not break the others
        _log.warning("entry point '%s' of %s can't be loaded: %r", point.name, origin, error)
        return Installed(point.name, distribution, f"{origin} ({point.value})", error=error)


def load_plugin(name: str) -> Any:
    """A new plugin of the entry point called `name`; `PluginError` names the nearest where there is none."""
    if name in disabled():
        raise PluginError(f"plugin '{name}' is kept out by GEOHOOKS_DISABLE_PLUGINS; take its name off that list")
    known = installed("geohooks.plugins")
    found = next((entry for entry in known if entry.name == name), None)
    if found is None:
        names = [entry.name for entry in known]
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise PluginError(f"no plugin '{name}' is installed{hint} Installed are: {', '.join(names) or 'none'}")
    if found.error is not None:
        raise PluginError(f"plugin '{name}' of {found.origin} can't be loaded: {found.error!r}") from found.error
    return found.target() if inspect.isclass(found.target) else found.target


@functools.cache
def _adapters() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("geohooks")
    manager.add_hookspecs(AdapterSpecs)
    for entry in installed("geohooks.adapters"):
        if entry.error is None:
            manager.register(entry.target, entry.name)
    return manager


def adapter_for(model: nn.Module, adapter: str | Adapter | None = None) -> Adapter:
    """The adapter for `model`: the one given, the one installed under the name given, or the first that answers."""
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, str):
        chosen = _adapters().get_plugin(adapter)
        if chosen is None:
            names = ", ".join(name for name, _ in _adapters().list_name_plugin())
            raise AdapterError(f"no adapter '{adapter}' is installed; installed are: {names or 'none'}")
        answer = chosen.adapt(model=model)
    elif adapter is None:
        answer = _adapters().hook.adapt(model=model)
    else:
        raise AdapterError(f"adapter={adapter!r} is neither an Adapter nor the name of one")
    if answer is None:
        who = f"adapter '{adapter}'" if adapter else "no installed adapter"
        raise AdapterError(f"{who} can read {type(model).__name__}; give adapter= an Adapter of your own")
    return answer
