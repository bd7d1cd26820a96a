"""What one output distribution looks like, and how far a tuned one has moved from its base's."""

from __future__ import annotations

from typing import Any, cast

import attrs
import torch
from torch import Tensor

from geohooks.measures.row_chunks import computing_dtype
from geohooks.measures.row_gradients import PairStatistics, RowStatistics

__all__ = ["LogitComparison", "LogitStats", "compare_logits", "logit_stats"]


@attrs.frozen(eq=False)
class LogitStats:
    """Statistics of output distributions p, each of the logits' leading shape, in nats where a unit applies."""

    entropy: Tensor
    """Shannon entropy H = -sum p log p."""
    renyi2: Tensor
    """Renyi entropy of order 2, H2 = -log sum p^2."""
    varentropy: Tensor
    """V, the variance of -log p under p (nats squared)."""
    residual: Tensor
    """R = H2 - (H - V / 2): what the second-order expansion of the Renyi entropy at order 1 leaves over."""
    top1_probability: Tensor
    margin: Tensor
    """The largest probability minus the second largest (0 for one where the vocabulary has one id)."""
    nll: Tensor | None
    """-log p(target): +inf where the target is masked, NaN at ignored positions; None without targets."""
    calibration_gap: Tensor | None
    """NLL - H, mean zero for targets drawn from p."""
    calibration_z: Tensor | None
    """The gap over its spread sqrt(V); where V = 0, it is 0, or +inf for a target that can't occur."""


@attrs.frozen(eq=False)
class LogitComparison:
    """What lies between a tuned distribution q and its base p, each of the logits' leading shape, in nats."""

    forward_kl: Tensor
    """KL(base || tuned)."""
    reverse_kl: Tensor
    """KL(tuned || base)."""
    jensen_shannon: Tensor | None
    """The mean divergence of both from their mixture, between 0 and log 2; None where it was left out."""
    entropy_change: Tensor
    renyi2_change: Tensor
    varentropy_change: Tensor
    residual_change: Tensor
    top1_agreement: Tensor
    """1 where both have the same likeliest id (of equals the lowest), else 0; no gradient."""
    tuned: LogitStats
    base: LogitStats
    shared_ids: int
    """How many ids the distributions were compared on."""


def logit_stats(
    logits: Tensor, targets: Tensor | None = None, *, ignore_index: int = -100, compiled: bool = False
) -> LogitStats:
    """Entropy, Renyi-2 entropy, varentropy and their kin of every output distribution, in one pass over row chunks.

    `logits` `[..., vocabulary]` in any strides; half and single precision compute in float32, double in float64. -inf
    is p = 0; a row with NaN, +inf, or nothing but -inf, is NaN throughout. `targets` are token ids of the leading
    shape, aligned: `targets[t]` is what `logits[t]` predicts, nothing is shifted; `ignore_index` is not scored.

    Every field has a closed-form gradient, once: `create_graph=True` is a `RuntimeError`. Rows that no gradient
    reaches get 0, NaN or not. Where several logits tie for the largest, the top probability's gradient goes to one.

    `compiled` fuses the sums through `torch.compile` (the first calls compile, about ten seconds each); rows narrower
    than 1,024 ids, and every backward pass, stay eager. See `compiler_available`.

    Errors: `ValueError` for a vocabulary of no ids, targets of another shape, and, on a CPU, an id outside the
    vocabulary (elsewhere looking would make the device wait: such a target is NaN); `TypeError` for integer logits;
    `RuntimeError` for `compiled` without a compiler.

    >>> stats = logit_stats(torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor(1))
    >>> [round(float(x), 4) for x in (stats.entropy, stats.renyi2, stats.varentropy, stats.residual)]
    [0.8018, 0.6162, 0.4944, 0.0616]
    """
    _check(logits)
    wanted = _scored(targets, logits, logits.shape[-1], logits.shape[-1], ignore_index)
    *statistics, _ = cast(Any, RowStatistics).apply(logits, wanted, compiled)
    return _stats(statistics, logits.shape[:-1])


def compare_logits(
    tuned: Tensor,
    base: Tensor,
    targets: Tensor | None = None,
    *,
    ignore_index: int = -100,
    jensen_shannon: bool = True,
    compiled: bool = False,
) -> LogitComparison:
    """Both divergences between two models' distributions, and the statistics of each, in one pass over the pair.

    `tuned` and `base` `[..., vocabulary]` have one leading shape and device. Vocabularies of different sizes are
    compared on their first shared ids, renormalised, and so are the statistics of each; a target beyond them is NaN.
    A token that one model masks (-inf) and the other does not makes the KL from the other +inf. Equal logits have
    divergences of exactly 0; below 0, where only rounding leads, they are cut off, and the gradient is not. Rows that
    are NaN in either are NaN in what compares them. Otherwise as `logit_stats`, errors too.

    Jensen-Shannon needs a further pass, of a logarithm an id: `jensen_shannon=False` leaves it out. It is kept within a
    quarter of the two KLs' sum: J. Lin, IEEE Trans. Inf. Theory 37 (1991).

    >>> tuned, base = torch.tensor([0.1, 0.6, 0.3]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    >>> comparison = compare_logits(tuned, base)
    >>> round(float(comparison.forward_kl), 4), round(float(comparison.reverse_kl), 4)
    (0.5157, 0.3766)
    """
    _check(tuned)
    _check(base)
    if tuned.shape[:-1] != base.shape[:-1]:
        raise ValueError(
            f"tuned and base logits are of the same positions, got the shapes {tuple(tuned.shape)} and "
            f"{tuple(base.shape)}: run both models on the same inputs"
        )
    shared = min(tuned.shape[-1], base.shape[-1])
    wanted = _scored(targets, tuned, shared, max(tuned.shape[-1], base.shape[-1]), ignore_index)
    leading = tuned.shape[:-1]
    found = cast(Any, PairStatistics).apply(tuned, base, wanted, shared, jensen_shannon, compiled)
    of_tuned, of_base = _stats(found[:6], leading), _stats(found[7:13], leading)
    top_tuned, top_base = found[6], found[13]
    forward_kl, reverse_kl = (value.view(leading) for value in found[14:16])
    agreement = (top_tuned[:, 0] == top_base[:, 0]).to(forward_kl.dtype).view(leading)
    return LogitComparison(
        forward_kl=forward_kl,
        reverse_kl=reverse_kl,
        jensen_shannon=found[16].view(leading) if jensen_shannon else None,
        entropy_change=of_tuned.entropy - of_base.entropy,
        renyi2_change=of_tuned.renyi2 - of_base.renyi2,
        varentropy_change=of_tuned.varentropy - of_base.varentropy,
        residual_change=of_tuned.residual - of_base.residual,
        top1_agreement=agreement.masked_fill(forward_kl.isnan(), torch.nan),
        tuned=of_tuned,
        base=of_base,
        shared_ids=shared,
    )


def _check(logits: Tensor) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits are [..., vocabulary] with at least one id, got the shape {tuple(logits.shape)}")
    computing_dtype(logits.dtype)


def _scored(targets: Tensor | None, logits: Tensor, known: int, vocabulary: int, ignore_index: int) -> Tensor | None:
    if targets is None:
        return None
    if targets.is_floating_point() or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets are token ids of the logits' leading shape {tuple(logits.shape[:-1])}, "
            f"got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    ids = targets.reshape(-1).to(device=logits.device, dtype=torch.int64)
    counted = ids != ignore_index
    if ids.device.type == "cpu":
        wrong = ids[counted & ((ids < 0) | (ids >= vocabulary))]
        if len(wrong):
            raise ValueError(f"target {int(wrong[0])} is outside the vocabulary of {vocabulary} ids")
    return ids.masked_fill(~counted | (ids < 0) | (ids >= known), -1)


def _stats(statistics: tuple[Tensor | None, ...], leading: torch.Size) -> LogitStats:
    entropy, renyi2, varentropy, top1, second, nll = (
        None if value is None else value.view(leading) for value in statistics
    )
    entropy, renyi2, varentropy = cast(Tensor, entropy), cast(Tensor, renyi2), cast(Tensor, varentropy)
    top1, second = cast(Tensor, top1), cast(Tensor, second)
    gap = z = None
    if nll is not None:
        gap = nll - entropy
        unknown = gap.isnan()
        settled = unknown | ((varentropy == 0) & gap.isfinite())
        z = gap.masked_fill(settled, 0) / varentropy.masked_fill(settled, 1).sqrt()
        z = z.masked_fill(unknown, torch.nan)
    return LogitStats(
        entropy=entropy,
        renyi2=renyi2,
        varentropy=varentropy,
        residual=renyi2 - entropy + varentropy / 2,
        top1_probability=top1,
        margin=top1 - second,
        nll=nll,
        calibration_gap=gap,
        calibration_z=z,
    )
