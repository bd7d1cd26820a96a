"""What is kept of each row of logits, gathered in one pass over row chunks."""

from __future__ import annotations

import functools
import math

import attrs
import torch
from torch import Tensor

from geohooks.measures.compiled_sums import CompiledRowSums
from geohooks.measures.row_chunks import chunks, computing_dtype, rows_at_once
from geohooks.measures.row_sums import CROSS_SUMS, OWN_SUMS, RowSums

__all__ = ["Divergences", "Moments", "pair_moments", "row_moments", "top_two"]

_BLOCK = 256


@attrs.frozen(eq=False)
class Moments:
    """What is kept of each row of one distribution; every field is `[rows]`."""

    maximum: Tensor
    """The largest logit."""
    log_sum: Tensor
    """log s, the logarithm of the sum of e^x; log p = x - log s."""
    entropy: Tensor
    renyi2: Tensor
    varentropy: Tensor
    second: Tensor
    """x of the second largest logit, -inf where there is none."""
    top: Tensor
    """Ids of the largest and the second largest logit, `[rows, 2]`."""


@attrs.frozen(eq=False)
class Divergences:
    """What is kept of each row of a pair; every field is `[rows]`."""

    forward_kl: Tensor
    reverse_kl: Tensor
    jensen_shannon: Tensor


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


class _Rows:
    """What is gathered of one distribution, chunk by chunk."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.sums = torch.empty((OWN_SUMS, rows), dtype=dtype, device=device)
        self.largest = torch.empty((rows, 2), dtype=dtype, device=device)
        self.top = torch.empty((rows, 2), dtype=torch.int64, device=device)

    def maximum(self, rows: slice, logits: Tensor) -> Tensor:
        """Find the two largest logits of a chunk; answers the largest, `[rows, 1]`."""
        self.largest[rows], self.top[rows] = top_two(logits)
        return self.largest[rows, :1]

    def moments(self) -> Moments:
        s, ss, sx, sxx = self.sums
        log_sum, mean = s.log(), sx / s
        maximum, second = self.largest.unbind(1)
        return Moments(
            maximum=maximum,
            log_sum=log_sum,
            entropy=(log_sum - mean).clamp_(min=0),
            renyi2=(2 * log_sum - ss.log()).clamp_(min=0),
            varentropy=(sxx / s - mean * mean).clamp_(min=0),
            second=second - maximum,
            top=self.top,
        )


def row_moments(logits: Tensor, *, compiled: bool = False) -> Moments:
    """The moments of every row of `logits` `[..., width]`."""
    (gathered,), sums, at_once = _prepare((logits,), compiled=compiled)
    for rows, (chunk,) in chunks((logits,), at_once):
        sums.one(chunk, gathered.maximum(rows, chunk), gathered.sums[:, rows])
    return gathered.moments()


def pair_moments(tuned: Tensor, base: Tensor, *, compiled: bool = False) -> tuple[Moments, Moments, Divergences]:
    """The moments of every row of `tuned` and `base` `[..., width]`, and what lies between them."""
    (t, b), sums, at_once = _prepare((tuned, base), compiled=compiled)
    cross = torch.empty((CROSS_SUMS, len(t.top)), dtype=t.sums.dtype, device=t.sums.device)
    for rows, (of_tuned, of_base) in chunks((tuned, base), at_once):
        maxima = t.maximum(rows, of_tuned), b.maximum(rows, of_base)
        sums.pair((of_tuned, of_base), maxima, (t.sums[:, rows], b.sums[:, rows]), cross[:, rows])
    moments = t.moments(), b.moments()
    from_tuned, from_base, mixture = cross[0] / t.sums[0], cross[1] / b.sums[0], cross[2]
    return *moments, _divergences(*moments, from_tuned, from_base, mixture)


def _prepare(logits: tuple[Tensor, ...], *, compiled: bool) -> tuple[list[_Rows], RowSums, int]:
    rows, width, device = logits[0].shape[:-1].numel(), logits[0].shape[-1], logits[0].device
    dtype = functools.reduce(torch.promote_types, (computing_dtype(one.dtype) for one in logits))
    at_once = max(1, min(rows, rows_at_once(width, dtype, device)))
    kind = CompiledRowSums if compiled else RowSums
    return [_Rows(rows, dtype, device) for _ in logits], kind(at_once, width, dtype, device, sides=len(logits)), at_once


def _divergences(tuned: Moments, base: Moments, from_tuned: Tensor, from_base: Tensor, mixture: Tensor) -> Divergences:
    """From the mean of x_tuned - x_base under each, and the sum of 2m log 2m over the mixture m."""
    shift = tuned.log_sum - base.log_sum
    forward_kl = (shift - from_base).clamp_(min=0)
    reverse_kl = (from_tuned - shift).clamp_(min=0)
    jensen_shannon = math.log(2) - (mixture + tuned.entropy + base.entropy) / 2
    # Lin 1991: Jensen-Shannon is at most a quarter of the two divergences' sum, so that equal rows have exactly 0.
    bound = ((forward_kl + reverse_kl) / 4).clamp_(max=math.log(2))
    return Divergences(forward_kl, reverse_kl, torch.minimum(jensen_shannon.clamp_(min=0), bound))
