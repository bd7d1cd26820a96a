"""Gradient checkpointing: the call that a frame began in is kept with it, for the recompute in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from geohooks.backends.attachment import Attachment
from geohooks.backends.threads import Current
from geohooks.call import Call
from geohooks.errors import PluginError
from geohooks.sites import Site

__all__ = ["checkpointable", "keep_calls"]

Present = Callable[[str], bool]

# transformers' layers, and torch.distributed's CheckpointWrapper: both are called as f(function, *args, **kwargs).
_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class _Frame:
    """A function under a checkpoint, run for the first time inside its call and again in the backward pass."""

    def __init__(self, function: Callable[..., Any], call: Call, current: Current, present: Present) -> None:
        self.function = function
        self.call = call
        self.current = current
        self.present = present
        self.edits: set[tuple[Site, str]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        edits = self.call.progress.edits
        if self.edits is None:
            before = set(edits)
            try:
                return self.function(*args, **kwargs)
            finally:
                self.edits = edits - before
        self._expect_editors(self.edits)
        with self.current.recompute(self.call):
            return self.function(*args, **kwargs)

    def _expect_editors(self, edits: set[tuple[Site, str]]) -> None:
        for site, plugin in edits:
            if not self.present(plugin):
                raise PluginError(
                    f"plugin '{plugin}' edited '{site}' under gradient checkpointing and has left the host: the "
                    "edit can't be repeated and the gradients would be wrong; call backward() before it leaves"
                )


def checkpointable(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules under `model` that can run something under a checkpoint."""
    return tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing") or hasattr(m, "checkpoint_fn"))


def keep_calls(attachment: Attachment, modules: tuple[nn.Module, ...], current: Current, present: Present) -> None:
    """Have every checkpointing function of `modules` keep the call that it is called in.

    `present` says whether the plugin of a name is still there, to repeat what it edited.
    """

    def keeping(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current.call
        if call is not None:
            function = _Frame(function, call, current, present)
        return checkpoint(function, *args, **kwargs)

    for module in modules:
        for name in _ATTRIBUTES:
            if module.__dict__.get(name) is not None:
                attachment.wrap(module, name, keeping)
