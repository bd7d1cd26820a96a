"""Sums over the vocabulary, row by row: what every statistic of logits is made from.

A distribution p is centred on its largest logit: x = logit - max <= 0, p = e^x / s, log p = x - log s. Logits of -inf
have p = 0; products of that zero with the infinite x are not numbers, and `nansum` counts them as the nothing that
they are. A row with NaN or +inf, or with nothing but -inf, has s = NaN, and through s every statistic.
"""

from __future__ import annotations

import math

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from geohooks.measures.row_chunks import computing_dtype, matrices, rows_at_once

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
    """The two largest of each row of `[rows, width]` and their places, `[rows, 2]`; one alone is followed by -inf.

    The two largest lie in the two blocks with the largest maxima, or in what the blocks leave over: finding those
    maxima reads the row once, many times faster than `topk` over the whole of it.
    """
    rows, width = logits.shape
    if width == 1:
        return F.pad(logits, (0, 1), value=-math.inf), torch.zeros((rows, 2), dtype=torch.int64, device=logits.device)
    count = width // _BLOCK
    if count < 2:
        return logits.topk(2, dim=1)
    blocks = logits[:, : count * _BLOCK].unflatten(1, (count, _BLOCK))
    best = blocks.amax(2).topk(2, dim=1).indices[:, :, None]
    inside = torch.arange(_BLOCK, device=logits.device)
    left_over = torch.arange(count * _BLOCK, width, device=logits.device).expand(rows, -1)
    candidates = torch.cat(((best * _BLOCK + inside).flatten(1), left_over), 1)
    values, places = logits.gather(1, candidates).topk(2, dim=1)
    return values, candidates.gather(1, places)


class _Sums:
    """Sums over one distribution, filled chunk by chunk."""

    def __init__(self, logits: Tensor, width: int) -> None:
        rows, dtype, device = logits.shape[:-1].numel(), computing_dtype(logits.dtype), logits.device
        self.maximum, self.second, self.s, self.sx, self.sxx, self.ss = torch.empty((6, rows), dtype=dtype, device=device)
        self.top = torch.empty((rows, 2), dtype=torch.int64, device=device)
        chunk = (min(rows, rows_at_once(width, dtype, device)), width)
        self.x, self.e = torch.empty((2, *chunk), dtype=dtype, device=device)

    def add(self, rows: slice, logits: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the rows of `logits` `[rows, width]`; answers x and e^x, which stay until the next call."""
        x, e = self.x[: logits.shape[0]], self.e[: logits.shape[0]]
        if logits.dtype != x.dtype:
            logits = x.copy_(logits)
        values, self.top[rows] = top_two(logits)
        self.maximum[rows] = values[:, 0]
        self.second[rows] = values[:, 1]
        torch.sub(logits, values[:, :1], out=x)
        torch.exp(x, out=e)
        torch.sum(e, 1, out=self.s[rows])
        torch.mul(e, e, out=product)
        torch.sum(product, 1, out=self.ss[rows])
        torch.mul(e, x, out=product)
        torch.nansum(product, 1, out=self.sx[rows])
        product.mul_(x)
        torch.nansum(product, 1, out=self.sxx[rows])
        return x, e

    def moments(self) -> Moments:
        log_sum = self.s.log()
        mean = self.sx / self.s
        return Moments(
            maximum=self.maximum,
            log_sum=log_sum,
            entropy=(log_sum - mean).clamp_(min=0),
            renyi2=(2 * log_sum - self.ss.log()).clamp_(min=0),
            varentropy=(self.sxx / self.s - mean * mean).clamp_(min=0),
            second=self.second - self.maximum,
            top=self.top,
        )


def row_moments(logits: Tensor) -> Moments:
    """The moments of every row of `logits` `[..., width]`, in one pass over row chunks."""
    width = logits.shape[-1]
    sums = _Sums(logits, width)
    product = torch.empty_like(sums.x)
    for start, (matrix,) in matrices((logits,)):
        for first in range(0, matrix.shape[0], len(product)):
            chunk = matrix[first : first + len(product)]
            sums.add(slice(start + first, start + first + len(chunk)), chunk, product[: len(chunk)])
    return sums.moments()


def pair_moments(tuned: Tensor, base: Tensor) -> tuple[Moments, Moments, Divergences]:
    """The moments of every row of `tuned` and `base` `[..., width]` and what lies between them, in one pass."""
    width = tuned.shape[-1]
    t, b = _Sums(tuned, width), _Sums(base, width)
    product = torch.empty_like(t.x)
    from_base, from_tuned, mixture = torch.empty((3, len(t.s)), dtype=t.s.dtype, device=t.s.device)
    for start, pair in matrices((tuned, base)):
        for first in range(0, pair[0].shape[0], len(product)):
            chunks = [matrix[first : first + len(product)] for matrix in pair]
            rows = slice(start + first, start + first + len(chunks[0]))
            scratch = product[: len(chunks[0])]
            xt, et = t.add(rows, chunks[0], scratch)
            xb, eb = b.add(rows, chunks[1], scratch)
            _add_pair(rows, (xt, et, t.s[rows, None]), (xb, eb, b.s[rows, None]), from_base, from_tuned, mixture, scratch)
    tuned_moments, base_moments = t.moments(), b.moments()
    return tuned_moments, base_moments, _divergences(
        tuned_moments, base_moments, from_base / b.s, from_tuned / t.s, mixture
    )


def _add_pair(
    rows: slice,
    tuned: tuple[Tensor, Tensor, Tensor],
    base: tuple[Tensor, Tensor, Tensor],
    from_base: Tensor,
    from_tuned: Tensor,
    mixture: Tensor,
    product: Tensor,
) -> None:
    """Sum over the rows of a pair, each given as x, e^x and s; x and e^x are used up."""
    (xt, et, st), (xb, eb, sb) = tuned, base
    difference = xt.sub_(xb)
    torch.mul(et, difference, out=product)
    torch.nansum(product, 1, out=from_tuned[rows])
    torch.mul(eb, difference, out=product)
    torch.nansum(product, 1, out=from_base[rows])
    torch.addcmul(eb.div_(sb), et, st.reciprocal(), out=product)
    torch.log(product, out=eb)
    product.mul_(eb)
    torch.nansum(product, 1, out=mixture[rows])


def _divergences(tuned: Moments, base: Moments, from_base: Tensor, from_tuned: Tensor, mixture: Tensor) -> Divergences:
    """From the mean of x_tuned - x_base under each, and the sum of 2m log 2m over the mixture m."""
    shift = tuned.log_sum - base.log_sum
    forward_kl = (shift - from_base).clamp_(min=0)
    reverse_kl = (from_tuned - shift).clamp_(min=0)
    jensen_shannon = math.log(2) - (mixture + tuned.entropy + base.entropy) / 2
    # Lin 1991: Jensen-Shannon is at most a quarter of the two divergences' sum, so that equal rows have exactly 0.
    bound = ((forward_kl + reverse_kl) / 4).clamp_(max=math.log(2))
    return Divergences(forward_kl, reverse_kl, torch.minimum(jensen_shannon.clamp_(min=0), bound))
