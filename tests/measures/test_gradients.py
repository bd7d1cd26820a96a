from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import textbook
from torch import Tensor

from geohooks.measures import compare_logits, logit_stats

OWN = ["entropy", "renyi2", "varentropy", "residual", "top1_probability", "margin"]
SCORED = ["nll", "calibration_gap", "calibration_z"]
BETWEEN = ["forward_kl", "reverse_kl", "jensen_shannon"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weigh(values: dict[str, Tensor], names: list[str], seed: int) -> Tensor:
    """Some sum of the named statistics, each position with a weight of its own."""
    return sum(((values[name] * randn(*values[name].shape, seed=seed + n)).sum() for n, name in enumerate(names)))


def own(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    stats = logit_stats(logits, targets)
    return {name: getattr(stats, name) for name in OWN + SCORED}


def between(tuned: Tensor, base: Tensor) -> dict[str, Tensor]:
    comparison = compare_logits(tuned, base)
    return {name: getattr(comparison, name) for name in BETWEEN}


def test_gradcheck_of_everything() -> None:
    tuned, base = randn(2, 3, 7).requires_grad_(), randn(2, 3, 9, seed=1).requires_grad_()
    targets = torch.randint(0, 7, (2, 3), generator=torch.Generator().manual_seed(0))
    targets[0, 0] = -100

    def everything(tuned: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        comparison = compare_logits(tuned, base, targets)
        changes = [f"{name}_change" for name in ("entropy", "renyi2", "varentropy", "residual")]
        found = [getattr(comparison, name) for name in BETWEEN + changes]
        for stats in (comparison.tuned, comparison.base):
            found += [getattr(stats, name).nan_to_num() for name in OWN + SCORED]
        return tuple(found)

    assert torch.autograd.gradcheck(everything, (tuned, base))


@given(
    names=st.sets(st.sampled_from(OWN + SCORED), min_size=1).map(sorted),
    width=st.integers(2, 600),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_any_statistics_agree_with_autograd_of_the_textbook(names: list[str], width: int, seed: int) -> None:
    logits = randn(2, 3, width, seed=seed).mul(3).requires_grad_()
    targets = torch.randint(0, width, (2, 3), generator=torch.Generator().manual_seed(seed))
    gradients = [
        torch.autograd.grad(weigh(form(logits, targets), names, seed), logits)[0] for form in (own, textbook.statistics)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


@given(
    names=st.sets(st.sampled_from(BETWEEN), min_size=1).map(sorted),
    sides=st.sampled_from([(True, False), (False, True), (True, True)]),
    width=st.integers(2, 600),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_any_divergences_agree_with_autograd_of_the_textbook(
    names: list[str], sides: tuple[bool, bool], width: int, seed: int
) -> None:
    pair = [randn(2, 3, width, seed=seed + n).mul(2).requires_grad_(wanted) for n, wanted in enumerate(sides)]
    leaves = [leaf for leaf in pair if leaf.requires_grad]
    ours, theirs = (
        torch.autograd.grad(weigh(form(*pair), names, seed), leaves) for form in (between, textbook.divergences)
    )
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_have_the_logits_dtype(dtype: torch.dtype) -> None:
    logits = randn(3, 40).to(dtype).requires_grad_()
    gradient = torch.autograd.grad(logit_stats(logits).varentropy.sum(), logits)[0]
    double = logits.detach().double().requires_grad_()
    expected = torch.autograd.grad(logit_stats(double).varentropy.sum(), double)[0]
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=8e-3 if dtype == torch.bfloat16 else 1e-6)


def test_masked_ids_have_finite_gradients_of_zero() -> None:
    logits, base = randn(2, 6), randn(2, 6, seed=1)
    logits[:, 2] = base[:, 2] = -math.inf
    kept = [0, 1, 3, 4, 5]
    targets = torch.tensor([0, 4])

    def loss(tuned: Tensor, base: Tensor, targets: Tensor) -> Tensor:
        comparison = compare_logits(tuned, base, targets)
        values = {name: getattr(comparison, name) for name in BETWEEN}
        values |= {name: getattr(comparison.tuned, name) for name in OWN + SCORED}
        return weigh(values, BETWEEN + OWN + SCORED, 3)

    full = [one.clone().requires_grad_() for one in (logits, base)]
    part = [one[:, kept].clone().requires_grad_() for one in (logits, base)]
    ours = torch.autograd.grad(loss(*full, targets), full)
    expected = torch.autograd.grad(loss(*part, torch.tensor([0, 3])), part)
    for gradient, cut in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient[:, kept], cut)
        assert torch.equal(gradient[:, 2], torch.zeros(2, dtype=torch.float64))


def test_a_masked_target_has_a_finite_gradient() -> None:
    logits = torch.tensor([0.5, 1.0, -math.inf], requires_grad=True)
    logit_stats(logits, torch.tensor(2)).nll.backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(0) - torch.tensor([0.0, 0.0, 1.0]))


def test_broken_rows_do_not_spoil_what_leaves_them_out() -> None:
    logits = randn(3, 5)
    logits[1, 2] = math.nan
    logits.requires_grad_()
    base = randn(3, 5, seed=1)
    for value in (logit_stats(logits).varentropy, compare_logits(logits, base).forward_kl):
        gradient = torch.autograd.grad(value.nansum(), logits)[0]
        assert torch.equal(gradient[1], torch.zeros(5, dtype=torch.float64))
        assert bool((gradient[[0, 2]] != 0).all())
    assert bool(torch.autograd.grad(logit_stats(logits).entropy.sum(), logits)[0][1].isnan().all())


@pytest.mark.parametrize(
    "measure", [lambda x: logit_stats(x).entropy, lambda x: compare_logits(x, torch.zeros(2, 4)).forward_kl]
)
def test_second_derivatives_are_refused(measure: Callable[[Tensor], Tensor]) -> None:
    logits = randn(2, 4).float().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(measure(logits).sum(), logits, create_graph=True)


def test_what_has_no_gradient_says_so() -> None:
    tuned = randn(2, 4).requires_grad_()
    comparison = compare_logits(tuned, randn(2, 4, seed=1))
    assert not comparison.top1_agreement.requires_grad
    assert comparison.forward_kl.requires_grad
    with torch.no_grad():
        assert not compare_logits(tuned, tuned).forward_kl.requires_grad


def test_changed_logits_are_noticed_before_a_wrong_gradient() -> None:
    logits = randn(2, 4).requires_grad_()
    doubled = logits * 2
    entropy = logit_stats(doubled).entropy.sum()
    doubled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.backward()


def test_without_jensen_shannon_the_rest_is_the_same() -> None:
    tuned, base = randn(2, 3, 600).requires_grad_(), randn(2, 3, 600, seed=1)
    whole, less = (compare_logits(tuned, base, jensen_shannon=wanted) for wanted in (True, False))
    assert less.jensen_shannon is None
    assert torch.equal(whole.forward_kl, less.forward_kl)
    gradients = [torch.autograd.grad((one.forward_kl + one.reverse_kl).sum(), tuned)[0] for one in (whole, less)]
    assert torch.equal(*gradients)
