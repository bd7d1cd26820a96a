"""What is kept of each row of logits, from sums over the row.

A distribution p is centred on its largest logit: x = logit - max <= 0, p = e^x / s. A row with NaN or +inf, or with
nothing but -inf, has s = NaN, and through s every statistic.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

__all__ = ["Divergences", "Moments", "divergences", "jensen_shannon", "moments"]


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
    jensen_shannon: Tensor | None = None


def moments(values: Tensor, ids: Tensor, sums: list[Tensor]) -> tuple[Tensor, ...]:
    """The fields of `Moments` from the two largest, `[rows, 2]`, and the sums of e^x, e^2x, e^x x and e^x x^2."""
    s, ss, sx, sxx = sums
    log_sum, mean = s.log(), sx / s
    entropy, renyi2, varentropy = log_sum - mean, 2 * log_sum - ss.log(), sxx / s - mean * mean
    at_least_0 = (value.clamp(min=0).to(values.dtype) for value in (entropy, renyi2, varentropy))
    return values[:, 0], log_sum.to(values.dtype), *at_least_0, values[:, 1] - values[:, 0], ids


def divergences(tuned_sum: Tensor, base_sum: Tensor, by_tuned: Tensor, by_base: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL from the sums of e^x, and of e^x (x_tuned - x_base) by each."""
    shift = tuned_sum.log() - base_sum.log()
    from_tuned, from_base = by_tuned / tuned_sum, by_base / base_sum
    return (shift - from_base).clamp(min=0), (from_tuned - shift).clamp(min=0)


def jensen_shannon(
    tuned_entropy: Tensor, base_entropy: Tensor, forward_kl: Tensor, reverse_kl: Tensor, mixture: Tensor
) -> Tensor:
    """The divergence of both from their mixture m, from the sum of 2m log 2m."""
    divergence = math.log(2) - (mixture + tuned_entropy + base_entropy) / 2
    # Lin 1991: Jensen-Shannon is at most a quarter of the two divergences' sum, so that equal rows have exactly 0.
    bound = ((forward_kl + reverse_kl) / 4).clamp(max=math.log(2))
    return torch.minimum(divergence.clamp(min=0), bound)
