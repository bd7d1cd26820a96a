"""Figures that sum a run up."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["distribution_health", "perplexity"]


def perplexity(nll: Tensor) -> Tensor:
    """exp of the mean of `nll` (nats) over the positions that are not NaN, a scalar; NaN where none is counted.

    >>> import torch
    >>> round(float(perplexity(torch.tensor([0.0, 2.0, torch.nan]))), 4)
    2.7183
    """
    return nll.nanmean().exp()


def distribution_health(forward_kl: float | Tensor) -> Literal["healthy", "warning", "critical"]:
    """What a forward KL (nats) says of a tuned model: "warning" above 0.5, "critical" above 2.0.

    Of a tensor, its mean over the positions that are not NaN is judged. A `ValueError` where nothing is counted.

    >>> distribution_health(0.7)
    'warning'
    """
    mean = float(forward_kl.nanmean()) if isinstance(forward_kl, Tensor) else float(forward_kl)
    if mean != mean:
        raise ValueError("the forward KL is NaN at every position: there is nothing to judge")
    return "critical" if mean > 2.0 else "warning" if mean > 0.5 else "healthy"
