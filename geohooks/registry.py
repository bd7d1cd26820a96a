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
from geohooks.errors import AdapterError, GeohooksError, PluginError
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
    error: BaseException | None = None


def disabled() -> frozenset[str]:
    """The plugin names in `GEOHOOKS_DISABLE_PLUGINS`, separated by commas."""
    names = os.environ.get("GEOHOOKS_DISABLE_PLUGINS", "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


@functools.cache
def installed(group: str) -> tuple[Installed, ...]:
    """Every entry point of `group`, "geohooks.plugins" or "geohooks.adapters", by name.

    One that can't be loaded is kept with its error and logged; the others are not touched by it. Plugins that
    `GEOHOOKS_DISABLE_PLUGINS` names are left out and not imported.
    """
    left_out = disabled() if group == "geohooks.plugins" else frozenset()
    found = {point for point in metadata.entry_points(group=group) if point.name not in left_out}
    return tuple(_loaded(point) for point in sorted(found, key=lambda point: (point.name, point.value)))


def _loaded(point: metadata.EntryPoint) -> Installed:
    distribution = point.dist.name if point.dist is not None else "unknown"
    origin = f"{distribution} {point.dist.version if point.dist is not None else ''}".strip()
    entry = Installed(point.name, distribution, f"{origin} ({point.value})")
    try:
        return attrs.evolve(entry, target=point.load())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a foreign module may raise anything; others go on
        _log.warning("entry point '%s' of %s can't be loaded: %r", point.name, origin, error)
        return attrs.evolve(entry, error=error)


def load_plugin(name: str) -> Any:
    """A new plugin of the entry point called `name`; `PluginError` names the nearest where there is none."""
    if name in disabled():
        raise PluginError(f"plugin '{name}' is kept out by GEOHOOKS_DISABLE_PLUGINS; take its name off that list")
    found = _named("geohooks.plugins", name)
    if not inspect.isclass(found.target):
        return found.target
    try:
        return found.target()
    except GeohooksError:
        raise
    except Exception as error:
        raise PluginError(f"plugin '{name}' of {found.origin} can't be made without arguments: {error!r}") from error


def _named(group: str, name: str) -> Installed:
    """The one entry point of `group` called `name`, loaded."""
    what = group.removeprefix("geohooks.").removesuffix("s")
    failure = AdapterError if what == "adapter" else PluginError
    entries = installed(group)
    found = [entry for entry in entries if entry.name == name]
    if not found:
        names = sorted({entry.name for entry in entries})
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ";"
        raise failure(f"no {what} '{name}' is installed{hint} installed are: {', '.join(names) or 'none'}")
    if len(found) > 1:
        origins = " and ".join(entry.origin for entry in found)
        raise failure(f"{what} '{name}' is installed twice: {origins}; uninstall one, or give the object itself")
    if found[0].error is not None:
        raise failure(f"{what} '{name}' of {found[0].origin} can't be loaded: {found[0].error!r}") from found[0].error
    return found[0]


@functools.cache
def _adapters() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("geohooks")
    manager.add_hookspecs(AdapterSpecs)
    for entry in installed("geohooks.adapters"):
        if entry.error is None:
            try:
                manager.register(entry.target, entry.origin)
            except (pluggy.PluginValidationError, ValueError) as error:
                _log.warning("adapter '%s' of %s can't be used: %s", entry.name, entry.origin, error)
    return manager


def adapter_for(model: nn.Module, adapter: str | Adapter | None = None) -> Adapter:
    """The adapter for `model`: the one given, the one installed under the name given, or the first that answers.

    One that raises is logged, and the next is asked; a `GeohooksError` of its own is its answer.
    """
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, str):
        answer = _named("geohooks.adapters", adapter).target.adapt(model=model)
        if answer is None:
            raise AdapterError(
                f"adapter '{adapter}' can't read {type(model).__name__}; leave adapter= out, or give one"
            )
        return answer
    if adapter is not None:
        raise AdapterError(f"adapter={adapter!r} is neither an Adapter nor the name of one")
    for implementation in reversed(_adapters().hook.adapt.get_hookimpls()):
        answer = _asked(implementation, model)
        if answer is not None:
            return answer
    raise AdapterError(f"no installed adapter can read {type(model).__name__}; give adapter= an Adapter of your own")


def _asked(implementation: pluggy.HookImpl, model: nn.Module) -> Any:
    try:
        answer = implementation.function(model)
    except GeohooksError:
        raise
    except Exception as error:  # noqa: BLE001 - one broken adapter must not keep the others from answering
        answer = error
    if answer is None or isinstance(answer, Adapter):
        return answer
    name = implementation.plugin_name
    _log.warning("adapter %s was passed over: for %s it gave %r", name, type(model).__name__, answer)
    return None
