"""Sums over the vocabulary for a few rows at a time, in scratch that is allocated once.

Logits of -inf have p = 0; products of that zero with the infinite x are not numbers, and `nansum` counts them as the
nothing that they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geohooks.measures.moments import divergences, jensen_shannon, moments
from geohooks.measures.top_two import top_two

__all__ = ["RowSums"]


class RowSums:
    """At most `rows` rows of `width` logits of one distribution or of two, summed up."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, *, sides: int) -> None:
        scratch = torch.empty((2 * sides + 1, rows, width), dtype=dtype, device=device)
        self._centred, self._weights, self._product = scratch[:sides], scratch[sides:-1], scratch[-1]

    def one(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The fields of `Moments` of `logits` `[rows, width]`."""
        values, ids, sums = self._own(0, logits)
        return moments(values, ids, sums)

    def pair(self, tuned: Tensor, base: Tensor, *, shannon: bool) -> tuple[Tensor, ...]:
        """The fields of `Moments` of each, and those of `Divergences`, the last if `shannon`."""
        tuned_own, base_own = self._own(0, tuned), self._own(1, base)
        tuned_sum, base_sum = tuned_own[2][0], base_own[2][0]
        product, weights = self._product[: len(tuned)], self._weights[:, : len(tuned)]
        difference = self._centred[0, : len(tuned)].sub_(self._centred[1, : len(tuned)])
        cross = [torch.mul(e, difference, out=product).nansum(1) for e in weights]
        of_tuned, of_base = moments(*tuned_own), moments(*base_own)
        between = divergences(tuned_sum, base_sum, *cross)
        if not shannon:
            return *of_tuned, *of_base, *between
        # The mixture of both, twofold, in scratch that nothing needs any more.
        torch.addcmul(weights[1].div_(base_sum[:, None]), weights[0], 1 / tuned_sum[:, None], out=product)
        mixture = product.mul_(torch.log(product, out=weights[1])).nansum(1)
        return *of_tuned, *of_base, *between, jensen_shannon(of_tuned[2], of_base[2], *between, mixture)

    def _own(self, side: int, logits: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The two largest, their ids and the sums of one; leaves x and e^x in the scratch of `side`."""
        x, e, product = (one[: len(logits)] for one in (self._centred[side], self._weights[side], self._product))
        if logits.dtype != x.dtype:
            logits = x.copy_(logits)
        values, ids = top_two(logits)
        torch.exp(torch.sub(logits, values[:, :1], out=x), out=e)
        sums = [e.sum(1), torch.mul(e, e, out=product).sum(1), torch.mul(e, x, out=product).nansum(1)]
        return values, ids, [*sums, product.mul_(x).nansum(1)]
