"""The two largest logits of each row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["top_two"]

_BLOCK = 256


def top_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest of each row of `[rows, width]` and their ids, `[rows, 2]`; of equals, the lower id comes first.

    Where there is no second, it is -inf. The two lie in the two blocks with the largest maxima, or in what the blocks
    leave over: finding those maxima reads the row once, many times faster than `topk` over the whole of it.
    """
    rows, width = logits.shape
    count = width // _BLOCK
    if count < 2:
        return _first_two(logits)
    maxima = logits[:, : count * _BLOCK].view(rows, count, _BLOCK).amax(2)
    best = _first_two(maxima)[1][:, :, None] * _BLOCK
    inside = torch.arange(_BLOCK, device=logits.device)
    left_over = torch.arange(count * _BLOCK, width, device=logits.device).expand(rows, -1)
    ids = torch.cat(((best + inside).flatten(1), left_over), 1)
    values, places = _first_two(logits.gather(1, ids))
    return values, ids.gather(1, places)


def _first_two(values: Tensor) -> tuple[Tensor, Tensor]:
    first = values.argmax(1, keepdim=True)
    rest = values.scatter(1, first, -math.inf)
    second = rest.argmax(1, keepdim=True)
    return torch.cat((values.gather(1, first), rest.gather(1, second)), 1), torch.cat((first, second), 1)
