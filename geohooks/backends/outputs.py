"""Finding and replacing the tensors in what modules and models return: tensors, tuples, or transformers' outputs."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from geohooks.errors import AdapterError
from geohooks.sites import Site

__all__ = ["first_tensor", "logits_of", "has_loss", "with_first_tensor", "with_logits"]


def first_tensor(output: Any, site: Site) -> Tensor:
    """The tensor that a module returned, alone or as the first of several."""
    value = output if isinstance(output, Tensor) else output[0]
    if not isinstance(value, Tensor):
        raise AdapterError(f"'{site}' gave {type(output).__name__} whose first item is no tensor")
    return value


def with_first_tensor(output: Any, value: Tensor) -> Any:
    """The same output with `value` in that tensor's place."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, (tuple, list)):
        return type(output)((value, *output[1:]))
    changed = copy.copy(output)
    changed[next(iter(changed))] = value
    return changed


def _logits_index(output: tuple[Any, ...]) -> int:
    """Where a plain tuple has its logits: after the losses, which have no dimension."""
    losses = (isinstance(item, Tensor) and item.dim() == 0 for item in output)
    return next((index for index, is_loss in enumerate(losses) if not is_loss), len(output) - 1)


def has_loss(output: Any) -> bool:
    """Whether a model's output, from a call with labels, begins with a loss."""
    if isinstance(output, Tensor):
        return False
    return _logits_index(output) > 0 if isinstance(output, tuple) else output.get("loss") is not None


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """The logits in the output of `model`; an `AdapterError` where it has none."""
    if isinstance(output, Tensor):
        return output
    value = output[_logits_index(output)] if isinstance(output, tuple) else output.get("logits")
    if not isinstance(value, Tensor):
        raise AdapterError(
            f"{type(model).__name__} returned {type(output).__name__} without logits; "
            "ask for other sites, or use a model with a head"
        )
    return value


def with_logits(output: Any, logits: Tensor, loss_change: Tensor | None) -> Any:
    """The same output with other logits, and a loss that is larger by `loss_change`."""
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, tuple):
        items = list(output)
        items[_logits_index(output)] = logits
        if loss_change is not None:
            items[0] = items[0] + loss_change
        return tuple(items)
    changed = copy.copy(output)
    changed["logits"] = logits
    if loss_change is not None:
        changed["loss"] = changed["loss"] + loss_change
    return changed
