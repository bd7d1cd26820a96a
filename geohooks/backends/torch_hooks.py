"""Events by torch forward hooks: one raw hook a subscribed site, and a pair around each stack and the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _pop_saved_tensors_default_hooks, _push_saved_tensors_default_hooks

from geohooks.anatomy import Tap
from geohooks.backends import checkpointing
from geohooks.backends.attachment import Attachment
from geohooks.backends.compiled_graphs import untraced
from geohooks.backends.outputs import first_tensor, has_loss, logits_of, with_first_tensor, with_logits
from geohooks.call import Call, Progress
from geohooks.dispatch import tell
from geohooks.errors import AdapterError, PluginError
from geohooks.events import AttentionEvent, HiddenEvent, LogitsEvent, RouterEvent
from geohooks.reference import DisabledAdapter
from geohooks.roster import Listener, editors, hook_of
from geohooks.sites import Site

if TYPE_CHECKING:
    from geohooks.backends.attention import AttentionCall
    from geohooks.host import Host

__all__ = ["TorchHooks"]

Listeners = tuple[Listener, ...]

# torch asks for a hook's options after it has listed the hooks: one that another thread takes off in between is called
# without keyword arguments, and does nothing.
_TAKEN_OFF = object()


class TorchHooks:
    """The raw hooks of one host for one plan: who listens where."""

    def __init__(self, host: Host, plan: Mapping[Site, Listeners]) -> None:
        self.host = host
        self.sites = tuple(plan)
        self.current = host.current
        self.model = host.anatomy.model
        self.attachment = Attachment()
        self._listeners = tuple(plan.values())
        self._lock = threading.Lock()
        self._under_way = 0
        self._retired = False
        self._stacks = {stack.module: stack.name for stack in host.anatomy.stacks}
        # The class's forward: an instance's may have been wrapped in something that names no arguments.
        self._parameters = {
            module: tuple(signature(type(module).forward).parameters)[1:] for module in (self.model, *self._stacks)
        }
        for index, (site, listeners) in enumerate(plan.items()):
            self._attach_site(index, site, listeners)
        for module in self._parameters:
            self.attachment.hook(module, untraced(self._opening(module)), before=True)
            self.attachment.hook(module, untraced(self._closing(module)), always=True)
        self._checkpointable = checkpointing.checkpointable(self.model)
        if isinstance(host.reference, DisabledAdapter):
            self.attachment.wrap(self.model, "forward", host.reference.one_at_a_time)

    def remove(self) -> None:
        """Take every hook off, whatever is under way."""
        self.attachment.remove()

    def retire(self) -> None:
        """Begin no more calls, and take every hook off when those under way, in any thread, have ended."""
        with self._lock:
            self._retired = True
            idle = self._under_way == 0
        if idle:
            self.remove()

    def _attach_site(self, index: int, site: Site, listeners: Listeners) -> None:
        anatomy = self.host.anatomy
        hook = hook_of(site)
        if hook == "on_attention":
            # Imports transformers, which only such a model is sure to have loaded.
            from geohooks.backends import attention

            block = anatomy.block(site)
            module = block.attention if site.kind == "pattern" else block.cross_attention
            assert module is not None
            attention.listen(self.attachment, module, untraced(self._attention_listener(index, site, listeners)))
        elif hook == "on_router":
            self.attachment.hook(anatomy.tap(site).module, untraced(self._router_hook(index, site, listeners)))
        elif hook == "on_hidden":
            tap = anatomy.tap(site)
            make = self._input_hook if tap.side == "input" else self._output_hook
            self.attachment.hook(tap.module, untraced(make(index, site, listeners, tap)), before=tap.side == "input")

    # Each hook below runs once per layer and call: what it needs is bound here, and it makes no call that it can avoid.

    def _output_hook(self, index: int, site: Site, listeners: Listeners, tap: Tap) -> Callable[..., Any]:
        current, emit, host = self.current, self._emit, self.host

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any = _TAKEN_OFF) -> Any:
            call = current.call
            if output is _TAKEN_OFF:
                return None
            if call is None:
                return self._outside(site)
            if (host.backend if current.recomputing else call.progress.plan) is not self:
                return None
            value = output if output.__class__ is Tensor else first_tensor(output, site)
            event = HiddenEvent(site, call, value, current.recomputing)
            emit(index, listeners, event)
            if event.value is value:
                return None
            return event.value if value is output else with_first_tensor(output, event.value)

        return hook

    def _input_hook(self, index: int, site: Site, listeners: Listeners, tap: Tap) -> Callable[..., Any]:
        current, emit, host, name = self.current, self._emit, self.host, tap.name

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            call = current.call
            if kwargs is None:
                return None
            if call is None:
                return self._outside(site)
            if (host.backend if current.recomputing else call.progress.plan) is not self:
                return None
            named = name in kwargs
            value = kwargs[name] if named else args[0]
            event = HiddenEvent(site, call, value, current.recomputing)
            emit(index, listeners, event)
            if event.value is value:
                return None
            return (args, {**kwargs, name: event.value}) if named else ((event.value, *args[1:]), kwargs)

        return hook

    def _router_hook(self, index: int, site: Site, listeners: Listeners) -> Callable[..., Any]:
        current, emit, host = self.current, self._emit, self.host
        adapter, block = host.anatomy.adapter, host.anatomy.block(site)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = _TAKEN_OFF) -> Any:
            call = current.call
            if output is _TAKEN_OFF:
                return None
            if call is None:
                return self._outside(site)
            if (host.backend if current.recomputing else call.progress.plan) is not self:
                return None
            arguments = (*args, *kwargs.values())
            event = RouterEvent(site, call, adapter, block, arguments, output, recomputing=current.recomputing)
            emit(index, listeners, event)
            return None if event.output is output else event.output

        return hook

    def _attention_listener(self, index: int, site: Site, listeners: Listeners) -> AttentionCall:
        from geohooks.backends.attention import is_causal

        current, emit, host = self.current, self._emit, self.host

        def listener(
            module: nn.Module,
            states: tuple[Tensor, Tensor, Tensor],
            mask: Tensor | None,
            options: dict[str, Any],
        ) -> None:
            call = current.call
            if call is None or (host.backend if current.recomputing else call.progress.plan) is not self:
                return
            event = AttentionEvent(
                site,
                call,
                states,
                mask,
                options.get("scaling") or states[0].shape[-1] ** -0.5,
                bias=options.get("position_bias"),
                sinks=options.get("s_aux", getattr(module, "sinks", None)),
                softcap=options.get("softcap"),
                causal=is_causal(module, options),
                recomputing=current.recomputing,
            )
            emit(index, listeners, event)

        return listener

    def _emit(self, index: int, listeners: Listeners, event: Any) -> None:
        """Give `event` to its listeners in order; what the first pass of a checkpoint edited is edited again."""
        progress = event.call.progress
        if not event.recomputing:
            progress.fired[index] = 1
        else:
            listeners = editors(listeners, event.site, progress.edits)
        progress.telling = True
        # What plugins save for the backward pass is theirs: a checkpoint may count only what the model saves.
        if progress.saving:
            _push_saved_tensors_default_hooks(_same, _same)
        try:
            tell(self.host, listeners, event)
        finally:
            progress.telling = False
            if progress.saving:
                _pop_saved_tensors_default_hooks()

    def _outside(self, site: Site) -> None:
        """Nothing is heard outside a call; an edit that a foreign checkpoint recomputes is refused, not lost."""
        if site in self.host.edited and torch._C._current_graph_task_id() != -1:
            raise PluginError(
                f"'{site}' was edited and is recomputed by a checkpoint that geohooks does not know; "
                "use model.gradient_checkpointing_enable(), or no checkpointing with this plugin"
            )

    # Around the model and around each stack.

    def _opening(self, module: nn.Module) -> Callable[..., None]:
        current = self.current

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if not current.paused and not current.recomputing and kwargs is not None:
                self._begin(module, args, kwargs)

        return hook

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model, or one of its stacks, begins: a call of its own, or part of the one under way."""
        call, name = self.current.call, self._stacks.get(module)
        if call is not None:
            if call.progress.plan is not self or call.progress.arguments is kwargs:
                return
            if call.progress.telling:
                raise PluginError(
                    f"a plugin runs {type(module).__name__} inside a hook of the same call; do so within host.paused()"
                )
            if call.progress.owner is module or name in call.progress.running:
                # A call in which a module starts again inside itself was left open by an interrupt, which no hook sees.
                self._release(call)
                call = None
        if call is None:
            with self._lock:
                self._under_way += not self._retired
            if self._retired:
                # torch lists a module's hooks before it calls them: this plan was replaced in between.
                if self.host.backend is not None:
                    self.host.backend._begin(module, args, kwargs)
                return
            call = self._open(module, args, kwargs)
        if name is not None:
            call.progress.entered.add(name)
            call.progress.running.add(name)

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        inputs = {**dict(zip(self._parameters[module], args, strict=False)), **kwargs}
        host, stack = self.host, None if module is self.model else self._stacks[module]
        call = Call(host.anatomy, inputs, stack=stack, reference=host.reference, generation=self.current.generation)
        call.progress = Progress(module, kwargs, self, bytearray(len(self.sites)), saving=torch.is_grad_enabled())
        if self.model.training:
            checkpointing.keep_calls(self.attachment, self._checkpointable, self.current, host.has)
        self.current.call = call
        try:
            self._tell_of_call("on_call_start", call)
        except BaseException:
            self._release(call)
            raise
        return call

    def _tell_of_call(self, hook: str, call: Call) -> None:
        call.progress.telling = True
        try:
            self.host.tell_of_call(hook, call)
        finally:
            call.progress.telling = False

    def _closing(self, module: nn.Module) -> Callable[..., Any]:
        current, name = self.current, self._stacks.get(module)
        logits = Site(None, None, "logits")
        index = self.sites.index(logits) if logits in self.sites else None

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
            call = current.call
            if call is None or current.recomputing or call.progress.plan is not self:
                return None
            call.progress.running.discard(name)
            if call.progress.owner is not module:
                return None
            try:
                if output is None:
                    return None
                call.output = output
                if module is self.model and index is not None:
                    call.output = self._logits(index, self._listeners[index], call, output)
                self._close(call)
                return None if call.output is output else call.output
            finally:
                self._release(call)

        return hook

    def _release(self, call: Call | None) -> None:
        """The call is over, however it ended."""
        self.current.call = None
        if call is None:
            return
        call.output = None
        with self._lock:
            self._under_way -= 1
            last = self._retired and self._under_way == 0
        if last:
            self.remove()

    def _close(self, call: Call) -> None:
        host = self.host
        missing = ", ".join(str(site) for site in self._missing(call))
        if missing:
            raise AdapterError(
                f"{type(self.model).__name__}: {missing} did not pass in this call, though a plugin asked for it; "
                f"adapter '{host.anatomy.adapter.name}' is wrong about this model, or the model skips these layers"
            )
        if call.generation is not None:
            if call.stack is None or call.stack == host.anatomy.main.name:
                call.generation.last_call = call
                call.generation.step += 1
            else:
                call.generation.encoder_inputs = call.inputs
        self._tell_of_call("on_call_end", call)
        host.ended(call)

    def _missing(self, call: Call) -> Iterator[Site]:
        for fired, site in zip(call.progress.fired, self.sites, strict=True):
            if fired or (site.stack is not None and site.stack not in call.progress.entered):
                continue
            if site.kind == "embedding" and any(name.endswith("inputs_embeds") for name in _given(call.inputs)):
                continue
            if site.kind == "logits" and call.stack is not None:
                continue
            yield site

    def _logits(self, index: int, listeners: Listeners, call: Call, output: Any) -> Any:
        value = logits_of(output, self.model)
        event = LogitsEvent(self.sites[index], call, value, compiled=self.host.compiled)
        self._emit(index, listeners, event)
        if event.value is value:
            return output
        return with_logits(output, event.value, self._loss_change(call, output, value, event.value))

    def _loss_change(self, call: Call, output: Any, before: Tensor, after: Tensor) -> Tensor | None:
        """What the edit adds to the loss: the family's own loss of the new logits less that of the old ones."""
        if call.labels is None or not has_loss(output):
            return None
        adapter = self.host.anatomy.adapter
        new = adapter.loss(self.model, after, call.inputs)
        old = adapter.loss(self.model, before, call.inputs)
        if new is None or old is None:
            raise PluginError(
                f"logits of {type(self.model).__name__} were edited in a call with labels, but adapter "
                f"'{adapter.name}' does not know its loss; call it without labels and compute the loss from the logits"
            )
        return new - old


def _same(value: Any) -> Any:
    return value


def _given(inputs: Mapping[str, Any]) -> Iterator[str]:
    return (name for name, value in inputs.items() if value is not None)
