"""What a host puts on a model's modules, so that all of it comes off again and no copy of the model carries it."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from torch import nn

__all__ = ["Attachment"]

_ABSENT = object()
_lock = threading.RLock()
_OPTIONS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


class _Marks:
    """What hosts have put on one module: hook ids, and attributes with their original values.

    Copies and pickles of the module are made without them, by the instance's `__deepcopy__` and `__reduce_ex__`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hooks: dict[str, list[int]] = {name: [] for name in _OPTIONS}
        self.originals: dict[str, Any] = {}
        module.__dict__["__deepcopy__"] = self.deepcopy
        module.__dict__["__reduce_ex__"] = self.reduce

    @classmethod
    def of(cls, module: nn.Module) -> _Marks:
        found = module.__dict__.get("__deepcopy__")
        return found.__self__ if found is not None and isinstance(found.__self__, cls) else cls(module)

    def deepcopy(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the module: its tables of hooks are copied as users' handles know them, and then cleaned."""
        cls = type(self.module)
        made = memo[id(self.module)] = cls.__new__(cls)
        state: dict[str, Any] = self.module.__getstate__()  # type: ignore[no-untyped-call]
        made.__setstate__(copy.deepcopy(self._unmarked(state), memo))  # type: ignore[no-untyped-call]
        for name, ids in self.hooks.items():
            for table in (name, *_OPTIONS[name]):
                for key in ids:
                    getattr(made, table).pop(key, None)
        return made

    def reduce(self, protocol: Any) -> Any:
        """What pickle is told: the module's own state, with tables that never had the hooks."""
        reduced: Any = type(self.module).__reduce_ex__(self.module, protocol)
        constructor, arguments, state, *rest = reduced
        state = self._unmarked(state)
        for name, ids in self.hooks.items():
            for table in (name, *_OPTIONS[name]):
                state[table] = OrderedDict((key, value) for key, value in state[table].items() if key not in ids)
        return (constructor, arguments, state, *rest)

    def _unmarked(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with the attributes that the module has of itself."""
        unmarked = {name: value for name, value in state.items() if name not in ("__deepcopy__", "__reduce_ex__")}
        for name, original in self.originals.items():
            if original is _ABSENT:
                unmarked.pop(name, None)
            else:
                unmarked[name] = original
        return unmarked

    def keep(self, name: str) -> None:
        """Remember what the module itself has under `name`."""
        self.originals[name] = self.module.__dict__.get(name, _ABSENT)

    def restore(self, name: str) -> None:
        original = self.originals.pop(name)
        if original is _ABSENT:
            self.module.__dict__.pop(name, None)
        else:
            self.module.__dict__[name] = original

    def drop_if_empty(self) -> None:
        if not self.originals and not any(self.hooks.values()):
            self.module.__dict__.pop("__deepcopy__", None)
            self.module.__dict__.pop("__reduce_ex__", None)


class _Chain:
    """A method of one module with its hosts' wrappers around it; the last host to come is the outermost."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        update_wrapper(self, inner)
        self.inner = inner
        self.owners: dict[Attachment, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.inner
        for wrapper in tuple(self.owners.values()):
            function = partial(wrapper, function)
        return function(*args, **kwargs)


class Attachment:
    """Everything that one host has put on modules; `remove()` takes off that and nothing else."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def hook(
        self, module: nn.Module, function: Callable[..., Any], *, before: bool = False, always: bool = False
    ) -> None:
        """Call `function` with args and kwargs before or after `module`, ahead of every hook that is not geohooks'."""
        with _lock:
            if before:
                handle = module.register_forward_pre_hook(function, with_kwargs=True)
                table = "_forward_pre_hooks"
            else:
                handle = module.register_forward_hook(function, with_kwargs=True, always_call=always)
                table = "_forward_hooks"
            marks = _Marks.of(module)
            ours = marks.hooks[table]
            hooks = getattr(module, table)
            ours.append(handle.id)
            for other in [key for key in hooks if key not in ours]:
                hooks.move_to_end(other)

            def undo() -> None:
                handle.remove()
                ours.remove(handle.id)
                marks.drop_if_empty()

            self._undo.append(undo)

    def wrap(self, module: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        """Have `module.name(...)` call `wrapper(original, ...)`; other hosts' wrappers of it stay. Done once."""
        with _lock:
            chain = module.__dict__.get(name)
            if isinstance(chain, _Chain) and self in chain.owners:
                return
            marks = _Marks.of(module)
            if not isinstance(chain, _Chain):
                inner = getattr(module, name)
                marks.keep(name)
                chain = module.__dict__[name] = _Chain(inner)
            chain.owners[self] = wrapper
            kept = chain

            def undo() -> None:
                del kept.owners[self]
                present = module.__dict__.get(name)
                if present is kept and not kept.owners:
                    marks.restore(name)
                elif not isinstance(present, _Chain):
                    # Somebody has put something else there since: it stays.
                    marks.originals.pop(name, None)
                marks.drop_if_empty()

            self._undo.append(undo)

    def substitute(self, module: nn.Module, name: str, value: Any) -> None:
        """Have `module.name` be `value` until removed; the caller sees to it that one host at a time does so."""
        with _lock:
            marks = _Marks.of(module)
            marks.keep(name)
            module.__dict__[name] = value

            def undo() -> None:
                marks.restore(name)
                marks.drop_if_empty()

            self._undo.append(undo)

    def on_remove(self, function: Callable[[], None]) -> None:
        """Call `function` when everything is taken off."""
        self._undo.append(function)

    def remove(self) -> None:
        """Take everything off, last first."""
        with _lock:
            while self._undo:
                self._undo.pop()()
