"""The plugins of one host, their validation, and the implementations that hear each hook."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pluggy

from geohooks.anatomy import Anatomy
from geohooks.errors import PluginError, SelectorError
from geohooks.hookspecs import PluginSpecs
from geohooks.sites import ATTENTION_KINDS, HIDDEN_KINDS, Site

__all__ = ["EVENT_HOOKS", "Listener", "Plugin", "Roster", "hook_of"]

EVENT_HOOKS = ("on_hidden", "on_router", "on_attention", "on_logits")
_HOOK_OF_KIND = {
    **dict.fromkeys(HIDDEN_KINDS, "on_hidden"),
    **dict.fromkeys(ATTENTION_KINDS, "on_attention"),
    "router": "on_router",
    "logits": "on_logits",
}
_HOOKS = frozenset(name for name in vars(PluginSpecs) if not name.startswith("_"))


class Plugin:
    """Optional base class of plugins: `name` and `description` as class or instance attributes."""

    name: str = ""
    description: str = ""


class Listener(NamedTuple):
    """One implementation of a hook, bound once: the plugin's name and what to call with the event.

    For a wrapper `function` makes a context around the listeners `inner`; for all others `inner` is None.
    """

    plugin: str
    function: Callable[[Any], Any]
    inner: tuple[Listener, ...] | None = None


def editors(listeners: tuple[Listener, ...], site: Site, edits: Container[tuple[Site, str]]) -> tuple[Listener, ...]:
    """Those of `listeners` who edited `site`, and the wrappers around them."""
    found = []
    for listener in listeners:
        inner = () if listener.inner is None else editors(listener.inner, site, edits)
        if (site, listener.plugin) in edits:
            found.append(listener._replace(inner=None if listener.inner is None else inner))
        else:
            found += inner
    return tuple(found)


def hook_of(site: Site) -> str:
    """The name of the hook that hears `site`."""
    return _HOOK_OF_KIND[site.kind]


class _Registered:
    """What pluggy sees of a plugin: its marked methods and nothing else, compared by identity."""

    def __init__(self, plugin: object) -> None:
        hooks = tuple(_marked(plugin))
        if not hooks:
            raise PluginError(
                f"{plugin!r} implements no hook, so it is no plugin; mark methods with @geohooks.hookimpl"
            )
        for hook, function in hooks:
            if hasattr(self, hook):
                raise PluginError(f"plugin '{_called(plugin)}' has two methods for the hook '{hook}'; keep one")
            setattr(self, hook, function)


class Roster:
    """Plugins by name, in order; pluggy registers, validates and orders them."""

    def __init__(self, plugins: dict[str, Any]) -> None:
        self.plugins = plugins
        self._manager = pluggy.PluginManager("geohooks")
        self._manager.add_hookspecs(PluginSpecs)
        # pluggy calls the last registered first; plugins run in the order of the list.
        self._registered = {name: _Registered(plugin) for name, plugin in reversed(plugins.items())}
        for name, registered in self._registered.items():
            try:
                self._manager.register(registered, name)
            except pluggy.PluginValidationError as error:
                raise PluginError(f"plugin '{name}': {_explained(error)}") from error
        for hook in _HOOKS - {*EVENT_HOOKS, "on_scores"}:
            for one in getattr(self._manager.hook, hook).get_hookimpls():
                if one.wrapper:
                    raise PluginError(f"plugin '{one.plugin_name}': {hook} takes no wrapper; only events of tensors do")

    def implements(self, name: str, hook: str) -> bool:
        """Whether the plugin called `name` implements `hook`."""
        return hasattr(self._registered[name], hook)

    def hears(self, name: str, anatomy: Anatomy) -> frozenset[Site]:
        """The sites that the plugin called `name` hears: what its `sites` says, else all of its hooks' kinds."""
        if not self.implements(name, "sites"):
            return frozenset(site for site in anatomy.sites if self.implements(name, hook_of(site)))
        wanted = _call(self._registered[name].sites, anatomy)  # type: ignore[attr-defined]
        if wanted is None:
            raise PluginError(f"plugin '{name}': sites(anatomy) returned None; return a list of selectors, [] for none")
        if not isinstance(wanted, (str, Site, Iterable)):
            raise PluginError(f"plugin '{name}': sites(anatomy) returned {wanted!r}; return a list of selectors")
        chosen: set[Site] = set()
        for selector in [wanted] if isinstance(wanted, (str, Site)) else wanted:
            chosen |= self._heard(name, selector, anatomy)
        return frozenset(chosen)

    def _heard(self, name: str, selector: str | Site, anatomy: Anatomy) -> set[Site]:
        """The sites of one selector whose hooks the plugin implements; at least one, or it is an error."""
        try:
            sites = anatomy.select([selector])
        except SelectorError as error:
            raise SelectorError(f"plugin '{name}': {error}") from error
        heard = {site for site in sites if self.implements(name, hook_of(site))}
        if not heard:
            raise PluginError(
                f"plugin '{name}' asks for '{selector}' but does not implement {hook_of(sites[0])}, which hears it"
            )
        return heard

    def chooses_sites(self, name: str) -> bool:
        """Whether the plugin says which sites it hears; only then may it edit."""
        return self.implements(name, "sites")

    def listeners(self, hook: str, names: Iterable[str] | None = None) -> tuple[Listener, ...]:
        """The implementations of `hook` by the plugins `names` (all by default), in order, bound for direct calls.

        Wrappers come first, each around all that follow.
        """
        chosen = set(self.plugins if names is None else names)
        caller = getattr(self._manager.hook, hook)
        found = [one for one in reversed(caller.get_hookimpls()) if one.plugin_name in chosen]
        bound = tuple(Listener(one.plugin_name, _direct(one)) for one in found if not one.wrapper)
        for wrapper in reversed([one for one in found if one.wrapper]):
            bound = (Listener(wrapper.plugin_name, contextmanager(_direct(wrapper)), bound),)
        return bound

    def all_hooks(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each plugin's name and the hooks that it implements."""
        for name in self.plugins:
            yield name, tuple(sorted(vars(self._registered[name])))


def _direct(implementation: pluggy.HookImpl) -> Callable[[Any], Any]:
    function = implementation.function
    if implementation.argnames or implementation.kwargnames:
        return function
    return lambda _: function()


def _call(function: Callable[..., Any], argument: object) -> Any:
    return function(argument) if inspect.signature(function).parameters else function()


def _marked(plugin: object) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The hooks that `plugin` implements, with the marked methods, bound; properties are not run."""
    probe = pluggy.PluginManager("geohooks")
    who = _called(plugin)
    for name in dir(plugin):
        if name.startswith("__"):
            continue
        options = probe.parse_hookimpl_opts(plugin, name)
        if options is not None:
            hook = options.get("specname") or name
            if hook not in _HOOKS:
                raise PluginError(_misspelt(who, hook))
            if options.get("hookwrapper"):
                raise PluginError(f"plugin '{who}': {hook} is an old-style wrapper; use hookimpl(wrapper=True)")
            yield hook, getattr(plugin, name)
        elif name in _HOOKS and inspect.isfunction(getattr(type(plugin), name, None)):
            raise PluginError(f"plugin '{who}': method {name} is not marked; put @geohooks.hookimpl above it")
        elif name not in _HOOKS and name.startswith("on_") and difflib.get_close_matches(name, _HOOKS, cutoff=0.85):
            raise PluginError(_misspelt(who, name))


def _called(plugin: object) -> str:
    own = getattr(plugin, "name", None) or getattr(plugin, "__name__", None)
    return str(own or type(plugin).__name__)


def _explained(error: pluggy.PluginValidationError) -> str:
    """pluggy's words on one line, and what the hooks of that plugin are given."""
    takes = (f"{name}({', '.join(_arguments(getattr(PluginSpecs, name)))})" for name in sorted(vars(error.plugin)))
    return f"{' '.join(str(error).split())}; the hooks are given {', '.join(takes)}"


def _arguments(specification: Callable[..., Any]) -> tuple[str, ...]:
    """The argument names of a hook."""
    return tuple(name for name in inspect.signature(specification).parameters if name != "self")


def _misspelt(plugin: str, hook: str) -> str:
    nearest = difflib.get_close_matches(hook, _HOOKS, n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"the hooks are {', '.join(sorted(_HOOKS))}"
    return f"plugin '{plugin}': there is no hook '{hook}'; {hint}"
