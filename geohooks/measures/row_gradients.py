"""The statistics of logits as differentiable functions, with closed-form gradients made in the same row chunks.

With y = log p and u = y + H, by the logits of the row: dH = -p u, dH2 = 2 p (1 - p / sum p^2),
dV = p (u^2 + 2 u - V), dNLL = p - [target], dp_k = p_k ([k] - p); for KL(p||q), by p's logits p (log p/q - KL),
by q's q - p; for the Jensen-Shannon divergence with mixture m, p (log p/m - KL(p||m)) / 2.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from geohooks.measures.moments import Divergences, Moments
from geohooks.measures.row_chunks import chunks, rows_at_once
from geohooks.measures.row_passes import pair_moments, row_moments

__all__ = ["PairStatistics", "RowStatistics"]

# Stands for log 0 where a product with p = 0 has to be 0, and its square has to be finite.
_LOG_ZERO = -1e15


class RowStatistics(torch.autograd.Function):
    """`(logits, targets, compiled)` to entropy, renyi2, varentropy, top probability, second, NLL, ids of the top two.

    `targets` are ids `[rows]`, -1 where there is nothing to score, or None: then there is no NLL.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor | None,
        compiled: bool,  # noqa: FBT001 - autograd passes by position
    ) -> tuple[Tensor | None, ...]:
        """Every statistic `[rows]`."""
        ctx.set_materialize_grads(False)
        found = row_moments(logits, compiled=compiled)
        ctx.save_for_backward(logits, targets, *attrs.astuple(found, recurse=False))
        ctx.mark_non_differentiable(found.top)
        return *_statistics(logits, targets, found), found.top

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        """One buffer of the logits' size, filled chunk by chunk."""
        _refuse_second_order()
        logits, targets, *moments = ctx.saved_tensors
        side = _Side(logits, logits.shape[-1], Moments(*moments), targets, gradients[:6])
        _fill((side,), None)
        return side.buffer, None, None


class PairStatistics(torch.autograd.Function):
    """`(tuned, base, targets, shared, jensen_shannon, compiled)` to the statistics of each and the divergences.

    Those of each are what `RowStatistics` gives. Both are read up to their first `shared` ids.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tuned: Tensor,
        base: Tensor,
        targets: Tensor | None,
        shared: int,
        jensen_shannon: bool,  # noqa: FBT001 - autograd passes by position
        compiled: bool,  # noqa: FBT001
    ) -> tuple[Tensor | None, ...]:
        """Every statistic `[rows]`: seven of tuned, seven of base, three of the pair, the last None if left out."""
        ctx.set_materialize_grads(False)
        ctx.shared = shared
        of_tuned, of_base, between = pair_moments(
            tuned[..., :shared], base[..., :shared], jensen_shannon=jensen_shannon, compiled=compiled
        )
        saved = [value for part in (of_tuned, of_base, between) for value in attrs.astuple(part, recurse=False)]
        ctx.save_for_backward(tuned, base, targets, *saved)
        ctx.mark_non_differentiable(of_tuned.top, of_base.top)
        return (
            *_statistics(tuned, targets, of_tuned),
            of_tuned.top,
            *_statistics(base, targets, of_base),
            of_base.top,
            *attrs.astuple(between, recurse=False),
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """One buffer of the logits' size for each of the two that needs a gradient."""
        _refuse_second_order()
        tuned, base, targets, *saved = ctx.saved_tensors
        width = len(attrs.fields(Moments))
        of_tuned, of_base = Moments(*saved[:width]), Moments(*saved[width : 2 * width])
        forward, reverse, shannon = gradients[14:]
        sides = (
            _Side(tuned, ctx.shared, of_tuned, targets, gradients[:6], needed=ctx.needs_input_grad[0]),
            _Side(base, ctx.shared, of_base, targets, gradients[7:13], needed=ctx.needs_input_grad[1]),
        )
        between = Divergences(*saved[2 * width :])
        sides[0].add_divergence(reverse, between.reverse_kl, forward)
        sides[1].add_divergence(forward, between.forward_kl, reverse)
        _fill(sides, None if shannon is None else shannon[:, None] / 2)
        return sides[0].buffer, sides[1].buffer, None, None, None, None


def _refuse_second_order() -> None:
    # torch's once_differentiable would let a gradient penalty pass as a constant.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the measures of logits are differentiable once: create_graph=True is not supported; "
            "for second derivatives write the statistic with log_softmax"
        )


def _statistics(logits: Tensor, targets: Tensor | None, moments: Moments) -> tuple[Tensor | None, ...]:
    top1 = moments.log_sum.neg().exp_()
    second = (moments.second - moments.log_sum).exp_()
    nll = None
    if targets is not None:
        of_target = logits.gather(-1, targets.clamp(min=0).view(*logits.shape[:-1], 1)).flatten()
        nll = moments.log_sum - (of_target.to(top1.dtype) - moments.maximum)
        nll.masked_fill_(targets < 0, torch.nan)
    return moments.entropy, moments.renyi2, moments.varentropy, top1, second, nll


class _Side:
    """One distribution's part in a backward pass: coefficients `[rows, 1]` of a polynomial in u, p and log p/q."""

    def __init__(
        self,
        logits: Tensor,
        width: int,
        moments: Moments,
        targets: Tensor | None,
        gradients: tuple[Tensor | None, ...],
        *,
        needed: bool = True,
    ) -> None:
        self.logits = logits[..., :width]
        self.log_total = (moments.maximum + moments.log_sum)[:, None]
        self.entropy = moments.entropy[:, None]
        self.buffer = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if needed else None
        if self.buffer is not None:
            self.buffer[..., width:] = 0
        zero = torch.zeros_like(moments.entropy)
        entropy, renyi2, varentropy, top1, second, nll = gradients
        self.quadratic = None if varentropy is None else varentropy[:, None]
        self.linear = None
        if entropy is not None or varentropy is not None:
            self.linear = (2 * _or(varentropy, zero) - _or(entropy, zero))[:, None]
        self.square = None if renyi2 is None else _scaled(-2 * renyi2, moments.renyi2.exp())[:, None]
        self.constant = (2 * _or(renyi2, zero) - _scaled(_or(varentropy, zero), moments.varentropy))[:, None]
        self.ratio: Tensor | None = None
        self.other: Tensor | None = None
        self.points: list[tuple[Tensor, Tensor]] = []
        p1, p2 = moments.log_sum.neg().exp(), (moments.second - moments.log_sum).exp()
        for gradient, ids, probability in ((top1, moments.top[:, 0], p1), (second, moments.top[:, 1], p2)):
            if gradient is not None:
                self._add_point(ids, _scaled(gradient, probability))
        if nll is not None and targets is not None:
            self._add_point(targets.clamp(min=0), -nll.masked_fill(targets < 0, 0))

    def _add_point(self, ids: Tensor, weight: Tensor) -> None:
        """Add `weight` times (the indicator of `ids` - p)."""
        self.constant = self.constant - weight[:, None]
        self.points.append((ids[:, None], weight[:, None]))

    def add_divergence(self, own: Tensor | None, own_kl: Tensor, other: Tensor | None) -> None:
        """Add the gradients of KL(p||q), `own`, and of KL(q||p), `other`."""
        if own is not None:
            self.ratio = own[:, None]
            self.constant = self.constant - _scaled(own, own_kl)[:, None]
        if other is not None:
            self.other = other[:, None]
            self.constant = self.constant + other[:, None]

    def log_probabilities(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        """log p of a chunk, in `out`."""
        return out.copy_(logits).sub_(self.log_total[rows]).clamp_(min=_LOG_ZERO)

    def add_own_terms(self, rows: slice, log: Tensor, probability: Tensor, total: Tensor, spare: Tensor) -> None:
        """Start `total` with the polynomial in p and u, to be multiplied by p."""
        if self.square is None:
            total.copy_(self.constant[rows].expand_as(total))
        else:
            torch.addcmul(self.constant[rows], probability, self.square[rows], out=total)
        if self.linear is not None:
            u = torch.add(log, self.entropy[rows], out=spare)
            total.addcmul_(u, self.linear[rows])
            if self.quadratic is not None:
                total.addcmul_(u.square_(), self.quadratic[rows])

    def silent(self, shannon: Tensor | None) -> Tensor:
        """Rows whose statistics no gradient reaches: theirs is 0, whatever the row holds."""
        terms = [self.constant, self.linear, self.quadratic, self.square, self.ratio, self.other, shannon]
        weights = [weight for _, weight in self.points]
        return torch.stack([term == 0 for term in (*terms, *weights) if term is not None]).all(0)


def _or(gradient: Tensor | None, zero: Tensor) -> Tensor:
    return zero if gradient is None else gradient


def _scaled(gradient: Tensor, value: Tensor) -> Tensor:
    """`gradient * value`, 0 where no gradient comes, whatever the value."""
    return torch.where(gradient == 0, 0, gradient * value)


def _fill(sides: tuple[_Side, ...], shannon: Tensor | None) -> None:
    """Write the gradient of every side that has a buffer; `shannon` is half of the Jensen-Shannon gradient."""
    dtype, device, width = sides[0].entropy.dtype, sides[0].logits.device, sides[0].logits.shape[-1]
    at_once = max(1, min(len(sides[0].entropy), rows_at_once(width, dtype, device)))
    scratch = torch.empty((2 * len(sides) + 3, at_once, width), dtype=dtype, device=device)
    written = [number for number, side in enumerate(sides) if side.buffer is not None]
    silent = [side.silent(shannon) for side in sides]
    buffers = [side.buffer[..., :width] for side in sides if side.buffer is not None]
    for rows, parts in chunks((*(side.logits for side in sides), *buffers), at_once):
        total, spare, blend, *work = scratch[:, : len(parts[0])]
        logs = [side.log_probabilities(rows, part, out) for side, part, out in zip(sides, parts, work, strict=False)]
        probabilities = [torch.exp(log, out=out) for log, out in zip(logs, work[len(sides) :], strict=True)]
        if shannon is not None:
            torch.add(*probabilities, out=blend).div_(2).log_().clamp_(min=_LOG_ZERO)
        for number, out in zip(written, parts[len(sides) :], strict=True):
            side, log, probability = sides[number], logs[number], probabilities[number]
            side.add_own_terms(rows, log, probability, total, spare)
            if side.ratio is not None:
                total.addcmul_(torch.sub(log, logs[1 - number], out=spare), side.ratio[rows])
            if shannon is not None:
                mean = torch.sub(log, blend, out=spare).mul_(probability).sum(1, keepdim=True)
                total.addcmul_(torch.sub(log, blend, out=spare).sub_(mean), shannon[rows])
            total.mul_(probability)
            if side.other is not None:
                total.addcmul_(probabilities[1 - number], side.other[rows], value=-1)
            for ids, weight in side.points:
                total.scatter_add_(1, ids[rows], weight[rows])
            out.copy_(total.masked_fill_(silent[number][rows], 0))
