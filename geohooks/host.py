"""Host: one instrumented model, its plugins, and what they hear."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from geohooks.adapter import Adapter
from geohooks.backends.compiled_graphs import forget_compiled_graphs
from geohooks.backends.threads import Current
from geohooks.backends.torch_hooks import TorchHooks
from geohooks.call import Call, Fault
from geohooks.errors import AdapterError, GeohooksError, PluginError
from geohooks.events import AttentionEvent, Event
from geohooks.generation import heard_generate
from geohooks.markers import hookimpl
from geohooks.reference import as_reference, unwrap
from geohooks.registry import adapter_for, load_plugin
from geohooks.roster import Listener, Plugin, Roster, hook_of
from geohooks.sites import Site

__all__ = ["Check", "Host", "capture", "instrument"]

_log = logging.getLogger("geohooks")
_CALL_HOOKS = ("on_call_start", "on_call_end", "on_scores", "loss_terms", "report")


@attrs.frozen
class Check:
    """What one pass showed: for every subscribed site the shape that passed there, or None where nothing passed."""

    shapes: Mapping[Site, tuple[int, ...] | None]

    @property
    def silent(self) -> tuple[Site, ...]:
        """The sites that never fired."""
        return tuple(site for site, shape in self.shapes.items() if shape is None)

    def __str__(self) -> str:
        width = max((len(str(site)) for site in self.shapes), default=0)
        return "\n".join(
            f"{site!s:<{width}}  {'never fired' if shape is None else 'x'.join(map(str, shape))}"
            for site, shape in self.shapes.items()
        )


class Host:
    """An instrumented model. It is active when made; leave it with `with`, or call `detach()`.

    `model` is the model as it was given, `anatomy` what the adapter says of it, `plugins` maps names to plugins,
    `compiled` asks for compiled logit statistics. Made by `geohooks.instrument`.
    """

    def __init__(
        self,
        model: nn.Module,
        plugins: Sequence[Any] = (),
        *,
        adapter: str | Adapter | None = None,
        reference: Any = None,
        on_error: Literal["raise", "detach"] = "raise",
    ) -> None:
        if on_error not in ("raise", "detach"):
            raise GeohooksError(f"on_error={on_error!r} is not known; use 'raise' or 'detach'")
        self.model = model
        inner = unwrap(model)
        self.anatomy = adapter_for(inner, adapter).anatomy(inner)
        self.reference = as_reference(reference, model, self.anatomy)
        self.drops_faulty = on_error == "detach"
        self.compiled = False
        self.current = Current()
        self.edited: set[Site] = set()
        self.last_call: Call | None = None
        self.backend: TorchHooks | None = None
        self._roster = Roster({})
        self._hears: dict[str, frozenset[Site]] = {}
        self._call_listeners: dict[str, tuple[Listener, ...]] = {}
        try:
            for plugin in _listed(plugins):
                self._join(plugin)
            self._plan()
        except BaseException:
            self.detach()
            raise

    @property
    def plugins(self) -> dict[str, Any]:
        """The plugins by name, in the order in which they run."""
        return dict(self._roster.plugins)

    def __getitem__(self, name: str) -> Any:
        if name not in self._roster.plugins:
            raise PluginError(f"no plugin '{name}' on this host; it has: {', '.join(self._roster.plugins) or 'none'}")
        return self._roster.plugins[name]

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def add(self, plugin: Any) -> str:
        """Let a plugin join, last in order, and re-plan the hooks; returns its name."""
        name = self._join(plugin)
        self._plan()
        return name

    def remove(self, name: str) -> Any:
        """Let the plugin called `name` leave, re-plan the hooks, and return it."""
        plugin = self[name]
        self._leave(name)
        self._plan()
        return plugin

    def detach(self) -> None:
        """Take everything off the model; the plugins keep what they have recorded. Harmless when done twice."""
        if self.backend is not None:
            self.backend.remove()
            self.backend = None
        errors = []
        for name in tuple(self._roster.plugins):
            try:
                self._leave(name)
            except Exception as error:  # noqa: BLE001 - every plugin leaves; the first error goes on afterwards
                errors.append(error)
        if errors:
            raise errors[0]

    def _join(self, plugin: Any) -> str:
        name, plugin = _named(plugin)
        if name in self._roster.plugins:
            raise PluginError(f"a plugin '{name}' is already on this host; give the second one another name")
        roster = Roster({**self._roster.plugins, name: plugin})
        hears = roster.hears(name, self.anatomy)
        for listener in roster.listeners("on_attach", [name]):
            listener.function(self)
        self._roster = roster
        self._hears[name] = hears
        return name

    def _leave(self, name: str) -> None:
        listeners = self._roster.listeners("on_detach", [name])
        self._roster = Roster({key: value for key, value in self._roster.plugins.items() if key != name})
        self._hears.pop(name, None)
        self._call_listeners = {hook: self._roster.listeners(hook) for hook in _CALL_HOOKS}
        for listener in listeners:
            listener.function(self)

    def _plan(self) -> None:
        """Bind the implementations of every hook, and put one raw hook on each site that somebody hears.

        Calls that are under way, in this thread or another, end as they began.
        """
        before, after = self.backend, None
        self._call_listeners = {hook: self._roster.listeners(hook) for hook in _CALL_HOOKS}
        plan = {}
        for site in self.anatomy.sites:
            names = [name for name, sites in self._hears.items() if site in sites]
            if names:
                plan[site] = self._roster.listeners(hook_of(site), names)
        if plan or any(self._call_listeners.values()):
            after = TorchHooks(self, plan)
            if hasattr(self.anatomy.model, "generate"):
                after.attachment.wrap(self.anatomy.model, "generate", heard_generate(self))
            forget_compiled_graphs()
        self.backend = after
        if before is not None:
            before.retire()

    # What the backend asks of the host.

    def listeners(self, hook: str) -> tuple[Listener, ...]:
        """Who hears a hook that is not bound to sites."""
        return self._call_listeners.get(hook, ())

    def tell_of_call(self, hook: str, call: Call) -> None:
        """Give `call` to those who hear `hook`; under `on_error="detach"` one that fails is dropped."""
        for listener in self._call_listeners.get(hook, ()):
            try:
                listener.function(call)
            except Exception as error:
                if not self.drops_faulty:
                    raise
                self.fault(listener.plugin, None, call, error)

    def fault(self, plugin: str, site: Site | None, call: Call, error: Exception) -> None:
        """Log a plugin's failure, note it on the call, and drop the plugin."""
        call.faults.append(Fault(plugin, site, error))
        _log.error("plugin '%s' failed at %s and was dropped", plugin, site or "a call", exc_info=error)
        if plugin in self._roster.plugins:
            self.remove(plugin)

    def has(self, plugin: str) -> bool:
        """Whether the plugin of that name is on this host and the host on the model."""
        return self.backend is not None and plugin in self._roster.plugins

    def may_edit(self, plugin: str, site: Site) -> bool:
        """Whether the plugin has said which sites it hears; next-token scores are no site of the model."""
        return site.kind == "scores" or plugin not in self._roster.plugins or self._roster.chooses_sites(plugin)

    def ended(self, call: Call) -> None:
        """Keep the call for `loss`, where some plugin has terms of it."""
        if self.listeners("loss_terms"):
            self.last_call = call

    # What a user asks of the host.

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, in the calling thread, the plugins hear nothing and edit nothing."""
        with self.current.pause():
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate(...)`; plugins hear `on_scores`, as they do when the model's own `generate` is called."""
        if not hasattr(self.model, "generate"):
            raise GeohooksError(f"{type(self.model).__name__} has no generate; use a model with a language-model head")
        generate: Any = self.model.generate
        return generate(*args, **kwargs)

    def loss(self, call: Call | None = None) -> dict[str, Tensor]:
        """The plugins' extra loss terms of `call` (the last one by default) by name; unweighted by the host."""
        call = call or self.last_call
        if call is None:
            return {}
        terms: dict[str, Tensor] = {}
        for listener in self.listeners("loss_terms"):
            given = listener.function(call)
            if not isinstance(given, Mapping):
                raise PluginError(f"plugin '{listener.plugin}': loss_terms gave {given!r}; give a dict, {{}} for none")
            for name, term in given.items():
                if name in terms:
                    raise PluginError(f"plugin '{listener.plugin}' gives a second loss term '{name}'; rename one")
                terms[name] = term
        return terms

    def report(self) -> dict[str, Any]:
        """What each plugin would show a person, by plugin name."""
        return {one.plugin: one.function(self) for one in self.listeners("report")}

    def check(self, **inputs: Any) -> Check:
        """Run one pass and say what passed at every subscribed site.

        Raises `AdapterError`, with the table in its message, if a site that was asked for never fired.
        """
        sites = self.backend.sites if self.backend is not None else ()
        probe = _Shapes(sites)
        name = self.add(probe)
        try:
            with torch.no_grad():
                self.model(**inputs)
        except AdapterError as error:
            raise AdapterError(f"{error}\n{Check(probe.shapes)}") from error
        finally:
            self.remove(name)
        table = Check(probe.shapes)
        if table.silent:
            names = ", ".join(map(str, table.silent))
            raise AdapterError(f"{type(self.model).__name__}: {names} never fired in this pass\n{table}")
        return table


class _Recorder(Plugin):
    """Hears given sites and hands every event to `keep`."""

    def __init__(self, sites: Sequence[str | Site]) -> None:
        self.wanted = sites

    @hookimpl
    def sites(self) -> Sequence[str | Site]:
        return self.wanted

    def keep(self, event: Event) -> None:
        raise NotImplementedError

    @hookimpl
    def on_hidden(self, event: Event) -> None:
        self.keep(event)

    @hookimpl
    def on_router(self, event: Event) -> None:
        self.keep(event)

    @hookimpl
    def on_attention(self, event: Event) -> None:
        self.keep(event)

    @hookimpl
    def on_logits(self, event: Event) -> None:
        self.keep(event)


class _Shapes(_Recorder):
    name = "geohooks-check"

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self.shapes: dict[Site, tuple[int, ...] | None] = dict.fromkeys(sites)

    def keep(self, event: Event) -> None:
        self.shapes[event.site] = tuple(event.value.shape)


class _Values(_Recorder):
    name = "geohooks-capture"

    def __init__(self, sites: Sequence[str | Site]) -> None:
        super().__init__(sites)
        self.values: dict[str, Tensor] = {}

    def keep(self, event: Event) -> None:
        value = event.weights() if isinstance(event, AttentionEvent) else event.value
        self.values[str(event.site)] = value.detach()


def _listed(plugins: Any) -> Sequence[Any]:
    if isinstance(plugins, str):
        return [plugins]
    if not isinstance(plugins, Iterable):
        raise PluginError(f"plugins={plugins!r} is no list; give a list of names and plugins: plugins=[...]")
    return list(plugins)


def _named(plugin: Any) -> tuple[str, Any]:
    """A plugin and the name it goes by: its entry point's, its own `name`, else its class's in lower case."""
    if isinstance(plugin, str):
        return plugin, load_plugin(plugin)
    if isinstance(plugin, type):
        raise PluginError(f"{plugin.__name__} is a class; give an instance: {plugin.__name__}()")
    own = getattr(plugin, "name", None)
    if isinstance(own, str) and own:
        return own, plugin
    module_name = getattr(plugin, "__name__", None)
    return (module_name if isinstance(module_name, str) else type(plugin).__name__.lower()), plugin


def instrument(
    model: nn.Module,
    plugins: Sequence[Any] = (),
    *,
    adapter: str | Adapter | None = None,
    reference: Any = None,
    backend: str = "auto",
    on_error: Literal["raise", "detach"] = "raise",
) -> Host:
    """Attach plugins to a model; they are active on return.

    `plugins` are entry-point names or objects, in the order in which they run. `adapter`: an Adapter, or the name of
    an installed one, where the model's own family should not decide. `reference`: a base model, "disable_adapter" for
    a PEFT model, or a `geohooks.reference.Reference`. `on_error="detach"` drops a plugin that fails and goes on.
    Raises `AdapterError`, `PluginError`, `SelectorError` or `ReferenceMismatch`; the model is then untouched.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"{type(model).__name__} is no torch.nn.Module; give the loaded model itself")
    if backend not in ("auto", "torch"):
        raise GeohooksError(f"backend={backend!r} is not known; use 'torch', or 'auto' to have it chosen")
    return Host(model, plugins, adapter=adapter, reference=reference, on_error=on_error)


def capture(model: nn.Module, *, sites: str | Site | Sequence[str | Site], **inputs: Any) -> dict[str, Tensor]:
    """The tensors that pass at `sites` in one forward pass without gradient, by the name of the site.

    A router gives its logits, a pattern its attention weights.
    """
    recorder = _Values([sites] if isinstance(sites, (str, Site)) else sites)
    with instrument(model, [recorder]), torch.no_grad():
        model(**inputs)
    return recorder.values
