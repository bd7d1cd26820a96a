"""Plugins that the tests of the host listen and edit with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from geohooks import AttentionEvent, Call, Plugin, Site, hookimpl


@attrs.frozen(eq=False)
class Record:
    """One event as it was when it was heard."""

    site: str
    value: Tensor
    positions: Tensor | None
    step: int | None
    call: Call
    recomputing: bool


class Recorder(Plugin):
    """Keeps a copy of every event at `sites`."""

    def __init__(self, sites: str | Sequence[str | Site] = "*", name: str = "recorder") -> None:
        self.name = name
        self.wanted = sites
        self.records: list[Record] = []

    @hookimpl
    def sites(self, anatomy):
        return self.wanted

    def keep(self, event: Any) -> None:
        attention = isinstance(event, AttentionEvent)
        self.records.append(
            Record(
                site=str(event.site),
                value=(event.weights() if attention else event.value).detach().clone(),
                positions=event.call.positions(event.site.stack or event.call.anatomy.main.name)
                if attention
                else event.positions,
                step=event.call.step,
                call=event.call,
                recomputing=event.recomputing,
            )
        )

    @hookimpl
    def on_hidden(self, event):
        self.keep(event)

    @hookimpl
    def on_router(self, event):
        self.keep(event)

    @hookimpl
    def on_attention(self, event):
        self.keep(event)

    @hookimpl
    def on_logits(self, event):
        self.keep(event)

    def at(self, site: str) -> list[Tensor]:
        """The values heard at `site`, in order."""
        return [record.value for record in self.records if record.site == site]

    def heard(self) -> list[str]:
        """The sites in the order in which they were heard."""
        return [record.site for record in self.records]


class Editor(Plugin):
    """Replaces the value at `sites` by `change(value)`."""

    def __init__(self, sites: str | Sequence[str], change: Callable[[Tensor], Any], name: str = "editor") -> None:
        self.name = name
        self.wanted = sites
        self.change = change
        self.recomputed = 0

    @hookimpl
    def sites(self, anatomy):
        return self.wanted

    def edit(self, event: Any) -> None:
        self.recomputed += event.recomputing
        event.value = self.change(event.value)

    @hookimpl
    def on_hidden(self, event):
        self.edit(event)

    @hookimpl
    def on_router(self, event):
        self.edit(event)

    @hookimpl
    def on_logits(self, event):
        self.edit(event)


class Scores(Plugin):
    """Hears, and with `change` edits, the next-token scores."""

    def __init__(self, change: Callable[[Tensor], Tensor] | None = None, name: str = "scores") -> None:
        self.name = name
        self.change = change
        self.heard: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.steps: list[int | None] = []

    @hookimpl
    def sites(self):
        return []

    @hookimpl
    def on_scores(self, event):
        self.heard.append(event.value.detach().clone())
        self.tokens.append(event.input_ids.clone())
        self.steps.append(event.call.step)
        if self.change is not None:
            event.value = self.change(event.value)


class Calls(Plugin):
    """Keeps the calls that began and the calls that ended, and looks at each end with `look`."""

    def __init__(self, look: Callable[[Call], Any] | None = None, name: str = "calls") -> None:
        self.name = name
        self.look = look
        self.started: list[Call] = []
        self.ended: list[Call] = []
        self.seen: list[Any] = []

    @hookimpl
    def sites(self):
        return []

    @hookimpl
    def on_call_start(self, call):
        self.started.append(call)

    @hookimpl
    def on_call_end(self, call):
        self.ended.append(call)
        if self.look is not None:
            self.seen.append(self.look(call))


class Logits(Plugin):
    """Looks at every logits event with `look`."""

    def __init__(self, look: Callable[[Any], Any], name: str = "looks") -> None:
        self.name = name
        self.look = look
        self.seen: list[Any] = []

    @hookimpl
    def on_logits(self, event):
        self.seen.append(self.look(event))


HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hook_count(model: nn.Module) -> int:
    """The forward hooks of every module of `model`."""
    return sum(len(getattr(module, table)) for module in model.modules() for table in HOOK_TABLES)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Every module's instance attributes, by what they are and in their order, hook tables by their items."""
    return {
        path: [
            (name, list(value.items()) if name in HOOK_TABLES else id(value)) for name, value in module.__dict__.items()
        ]
        for path, module in model.named_modules()
    }


def logits_of(output: Any) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@contextmanager
def raw_edit(module: nn.Module, change: Callable[[Tensor], Tensor], *, before: bool = False) -> Iterator[None]:
    """Inside, `change` is applied to item 0 of what `module` is given or returns, by a hook of torch's own."""

    def on_input(module, args, kwargs):
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (change(args[0]), *args[1:]), kwargs

    def on_output(module, args, kwargs, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = (
        module.register_forward_pre_hook(on_input, with_kwargs=True)
        if before
        else module.register_forward_hook(on_output, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters that have one; they are cleared."""
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@contextmanager
def switching_often() -> Iterator[None]:
    """Inside, threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
