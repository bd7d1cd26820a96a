"""How a router spreads its tokens over experts, and how far a tuned router has moved from its base's."""

from __future__ import annotations

from typing import Protocol

import attrs
import torch
from torch import Tensor

from geohooks.measures.row_chunks import computing_dtype

__all__ = ["RouterDivergence", "RouterStats", "Routing", "router_divergence", "router_stats"]


class Routing(Protocol):
    """What a router made of its tokens."""

    @property
    def probabilities(self) -> Tensor:
        """The router's distribution `[..., experts]`."""

    @property
    def indices(self) -> Tensor:
        """The chosen experts `[..., k]`."""


@attrs.frozen(eq=False)
class RouterStats:
    """A layer's routing: the first three a token, of the scores' leading shape, the last three of the layer."""

    entropy: Tensor
    """Shannon entropy of the router's distribution (nats)."""
    top_mass: Tensor
    """The probability that lies on the chosen experts."""
    margin: Tensor
    """The lowest chosen score minus the highest eligible score that was not chosen; +inf where none was left."""
    load: Tensor
    """`[experts]`: the fraction of the (token, choice) pairs that each expert received."""
    load_entropy: Tensor
    """Shannon entropy of the load (nats), a scalar."""
    utilisation: Tensor
    """The share of the experts that received any token, a scalar. All three are NaN where no token counts."""


@attrs.frozen(eq=False)
class RouterDivergence:
    """What lies between two routings, each of the routings' leading shape."""

    jaccard: Tensor
    """1 - |A and B| / |A or B| of the two chosen sets; no gradient."""
    jensen_shannon: Tensor
    """Jensen-Shannon divergence of the two distributions (nats)."""


def router_stats(
    scores: Tensor, indices: Tensor, *, probabilities: Tensor | None = None, mask: Tensor | None = None
) -> RouterStats:
    """Entropy, mass and margin of each token's routing, and the load of each expert.

    `scores` `[..., experts]` are what the choice was made on, -inf for experts that were not eligible; `indices`
    `[..., k]` are the chosen ones; `probabilities` `[..., experts]` the router's distribution, the softmax of the
    scores where it is left out; `mask` (the leading shape) is 0 at padding, which is NaN per token and not counted
    in the load. A `ValueError` for shapes that do not fit.

    >>> stats = router_stats(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0, 1]]))
    >>> round(float(stats.top_mass), 4), round(float(stats.margin), 4), stats.load.tolist()
    (0.8, 0.4055, [0.5, 0.5, 0.0])
    """
    _check_routing(scores, indices, mask)
    scores = scores.to(computing_dtype(scores.dtype))
    chosen = _chosen(scores, indices)
    if probabilities is None:
        probabilities = scores.softmax(-1)
    probabilities = probabilities.to(computing_dtype(probabilities.dtype))
    lowest = scores.masked_fill(~chosen, torch.inf).amin(-1)
    highest = scores.masked_fill(chosen, -torch.inf).amax(-1)
    counted = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device) if mask is None else mask.bool()
    load = (chosen & counted[..., None]).flatten(0, -2).sum(0).to(scores.dtype)
    load = load / load.sum()
    return RouterStats(
        entropy=torch.special.entr(probabilities).sum(-1).masked_fill(~counted, torch.nan),
        top_mass=probabilities.gather(-1, indices).sum(-1).masked_fill(~counted, torch.nan),
        margin=(lowest - highest).masked_fill(~counted, torch.nan),
        load=load,
        load_entropy=torch.special.entr(load).sum(),
        utilisation=(load > 0).to(load.dtype).masked_fill(load.isnan(), torch.nan).mean(),
    )


def router_divergence(tuned: Routing, base: Routing, *, mask: Tensor | None = None) -> RouterDivergence:
    """Jaccard distance of the chosen experts and Jensen-Shannon divergence of the distributions, token by token.

    Both routings are of the same tokens and experts; k may differ. `mask` (the leading shape) is 0 at padding, which
    is NaN. A `ValueError` for shapes that do not fit.

    >>> from types import SimpleNamespace
    >>> base = SimpleNamespace(probabilities=torch.tensor([[0.5, 0.3, 0.2]]), indices=torch.tensor([[0, 1]]))
    >>> tuned = SimpleNamespace(probabilities=torch.tensor([[0.5, 0.2, 0.3]]), indices=torch.tensor([[0, 2]]))
    >>> divergence = router_divergence(tuned, base)
    >>> round(float(divergence.jaccard), 4), round(float(divergence.jensen_shannon), 4)
    (0.6667, 0.0101)
    """
    for one in (tuned, base):
        _check_routing(one.probabilities, one.indices, mask)
    q, p = (one.probabilities.to(computing_dtype(one.probabilities.dtype)) for one in (tuned, base))
    if q.shape[:-1] != p.shape[:-1]:
        raise ValueError(f"the routings {tuple(q.shape)} and {tuple(p.shape)} are of different tokens")
    if q.shape[-1] != p.shape[-1]:
        raise ValueError(f"the routings are over {q.shape[-1]} and {p.shape[-1]} experts")
    a, b = (_chosen(like, one.indices) for like, one in ((q, tuned), (p, base)))
    jaccard = 1 - (a & b).sum(-1).to(p.dtype) / (a | b).sum(-1)
    mixture = (q + p) / 2
    entropies = [torch.special.entr(one).sum(-1) for one in (mixture, q, p)]
    jensen_shannon = (entropies[0] - (entropies[1] + entropies[2]) / 2).clamp(min=0)
    if mask is not None:
        jaccard, jensen_shannon = (value.masked_fill(~mask.bool(), torch.nan) for value in (jaccard, jensen_shannon))
    return RouterDivergence(jaccard, jensen_shannon)


def _chosen(like: Tensor, indices: Tensor) -> Tensor:
    """Whether each expert was chosen, of the shape of `like`."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(-1, indices, value=True)


def _check_routing(scores: Tensor, indices: Tensor, mask: Tensor | None) -> None:
    if scores.shape[:-1] != indices.shape[:-1]:
        raise ValueError(f"scores {tuple(scores.shape)} and indices {tuple(indices.shape)} are of different tokens")
    if mask is not None and mask.shape != scores.shape[:-1]:
        raise ValueError(f"the mask {tuple(mask.shape)} is not of the tokens' shape {tuple(scores.shape[:-1])}")
