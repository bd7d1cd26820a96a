"""Sums over the vocabulary for a few rows at a time, in scratch that is allocated once.

A distribution p is centred on its largest logit: x = logit - max <= 0, p = e^x / s. Logits of -inf have p = 0; products
of that zero with the infinite x are not numbers, and `nansum` counts them as the nothing that they are. A row with
NaN or +inf, or with nothing but -inf, has s = NaN, and through s every statistic.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CROSS_SUMS", "OWN_SUMS", "RowSums"]

OWN_SUMS = 4
"""Sums of one distribution: e^x, e^2x, e^x x, e^x x^2."""
CROSS_SUMS = 3
"""Sums of a pair: e^x (x - x') by the first and by the second, and (p + p') log (p + p')."""


class RowSums:
    """Sums over at most `rows` rows of `width` logits of one distribution or of two."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, *, sides: int) -> None:
        scratch = torch.empty((2 * sides + 1, rows, width), dtype=dtype, device=device)
        self._centred, self._weights, self._product = scratch[:sides], scratch[sides:-1], scratch[-1]

    def one(self, logits: Tensor, maximum: Tensor, own: Tensor) -> None:
        """Write the sums of `logits` `[rows, width]`, whose largest are `maximum` `[rows, 1]`, to `own` `[4, rows]`."""
        self._own_sums(0, logits, maximum, own, 0)

    def pair(
        self, logits: tuple[Tensor, Tensor], maxima: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], cross: Tensor
    ) -> None:
        """Write the sums of two distributions of the same rows to `own`, of the pair to `cross` `[3, rows]`."""
        for side in range(2):
            self._own_sums(side, logits[side], maxima[side], own[side], 0)
        self._difference_sums(cross, 0)
        self._mixture_sum(own, cross[2], 0)

    def _own_sums(self, side: int, logits: Tensor, maximum: Tensor, own: Tensor, first: int) -> None:
        """The sums over the columns from `first` on; leaves x and e^x in the scratch of `side`."""
        rows = len(logits)
        x, e, product = (
            self._centred[side, :rows, first:],
            self._weights[side, :rows, first:],
            self._product[:rows, first:],
        )
        torch.sub(x.copy_(logits[:, first:]) if logits.dtype != x.dtype else logits[:, first:], maximum, out=x)
        torch.exp(x, out=e)
        torch.sum(e, 1, out=own[0])
        torch.sum(torch.mul(e, e, out=product), 1, out=own[1])
        torch.nansum(torch.mul(e, x, out=product), 1, out=own[2])
        torch.nansum(product.mul_(x), 1, out=own[3])

    def _difference_sums(self, cross: Tensor, first: int) -> None:
        """The first two sums of the pair, from what is in the scratch; uses up the first side's x."""
        rows = cross.shape[1]
        product = self._product[:rows, first:]
        difference = self._centred[0, :rows, first:].sub_(self._centred[1, :rows, first:])
        for side in range(2):
            torch.nansum(torch.mul(self._weights[side, :rows, first:], difference, out=product), 1, out=cross[side])

    def _mixture_sum(self, own: tuple[Tensor, Tensor], mixture: Tensor, first: int) -> None:
        """The sum over the mixture, from e^x in the scratch and s in `own`; uses up the second side's e^x."""
        rows = len(mixture)
        weights, product = self._weights[:, :rows, first:], self._product[:rows, first:]
        torch.addcmul(weights[1].div_(own[1][0, :, None]), weights[0], own[0][0, :, None].reciprocal(), out=product)
        torch.nansum(product.mul_(torch.log(product, out=weights[1])), 1, out=mixture)
