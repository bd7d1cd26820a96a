"""Gradient checkpointing: the call that a frame began in is kept with it, for the recompute in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from geohooks.backends.attachment import Attachment
from geohooks.backends.threads import Current
from geohooks.call import Call

__all__ = ["checkpointable", "keep_calls"]

# transformers' layers, and torch.distributed's CheckpointWrapper: both are called as f(function, *args, **kwargs).
_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class _Frame:
    """A function under a checkpoint, run for the first time inside its call and again in the backward pass."""

    def __init__(self, function: Callable[..., Any], call: Call, current: Current) -> None:
        self.function = function
        self.call = call
        self.current = current
        self.ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recomputing, self.ran = self.ran, True
        with self.current.checkpoint(self.call, recomputing=recomputing):
            return self.function(*args, **kwargs)


def checkpointable(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules under `model` that can run something under a checkpoint."""
    return tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing") or hasattr(m, "checkpoint_fn"))


def keep_calls(attachment: Attachment, modules: tuple[nn.Module, ...], current: Current) -> None:
    """Have every checkpointing function of `modules` keep the call that it is called in."""

    def keeping(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current.call
        if call is not None:
            function = _Frame(function, call, current)
        return checkpoint(function, *args, **kwargs)

    for module in modules:
        for name in _ATTRIBUTES:
            if module.__dict__.get(name) is not None:
                attachment.wrap(module, name, keeping)
