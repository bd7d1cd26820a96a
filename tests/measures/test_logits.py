from __future__ import annotations

import doctest
import math

import attrs
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import textbook
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import geohooks.measures.logits
from geohooks.measures import LogitStats, compare_logits, logit_stats, row_chunks
from geohooks.measures.top_two import top_two

INF, NAN = math.inf, math.nan
LN2 = math.log(2)

seeds = st.integers(0, 2**32 - 1)
widths = st.one_of(st.integers(2, 40), st.sampled_from([255, 256, 511, 512, 513, 700, 1500]))
leadings = st.lists(st.integers(0, 4), max_size=3).map(tuple)
spreads = st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0])


def randn(*shape: int, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def fields(measured: object) -> dict[str, Tensor]:
    """Every tensor of a result by name; those of the two sides of a comparison with the side before."""
    found: dict[str, Tensor] = {}
    for name, value in attrs.asdict(measured, recurse=False).items():  # type: ignore[call-overload]
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, LogitStats):
            found |= {f"{name}.{inner}": tensor for inner, tensor in fields(value).items()}
    return found


def assert_same(left: object, right: object, tolerance: float) -> None:
    ours, others = fields(left), fields(right)
    assert ours.keys() == others.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], others[name], rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False, msg=name
        )


def test_documented_examples() -> None:
    outcome = doctest.testmod(geohooks.measures.logits)
    assert outcome.attempted >= 4
    assert outcome.failed == 0


# -- literal values and closed forms ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (torch.tensor([0.7, 0.2, 0.1]), (0.801819, 0.616186, 0.494387, 0.061561)),
        (1 / torch.arange(1.0, 1001.0), (5.191011, 3.528835, 4.580030, 0.627839)),
    ],
)
def test_literal_values_of_one(p: Tensor, expected: tuple[float, ...]) -> None:
    stats = logit_stats(p.double().log())
    found = [stats.entropy, stats.renyi2, stats.varentropy, stats.residual]
    assert [float(value) for value in found] == pytest.approx(expected, abs=1e-6)


def test_literal_values_of_a_pair() -> None:
    comparison = compare_logits(torch.tensor([0.1, 0.6, 0.3]).log(), torch.tensor([0.5, 0.3, 0.2]).log())
    assert float(comparison.forward_kl) == pytest.approx(0.515682, abs=1e-6)
    assert float(comparison.reverse_kl) == pytest.approx(0.376584, abs=1e-6)
    assert float(comparison.top1_agreement) == 0


@pytest.mark.parametrize("width", [1, 2, 7, 300, 2000])
def test_uniform(width: int) -> None:
    stats = logit_stats(torch.full((2, width), -3.5), torch.zeros(2, dtype=torch.long))
    expected = torch.full((2,), math.log(width))
    for value in (stats.entropy, stats.renyi2, stats.nll):
        torch.testing.assert_close(value, expected)
    assert torch.equal(stats.varentropy, torch.zeros(2))
    assert torch.equal(stats.calibration_z, torch.zeros(2))
    torch.testing.assert_close(stats.margin, torch.full((2,), 1.0 if width == 1 else 0.0))


@pytest.mark.parametrize("width", [1, 3, 600])
def test_one_hot(width: int) -> None:
    logits = torch.full((width,), -INF)
    logits[width // 2] = 4.0
    stats = logit_stats(logits, torch.tensor(width // 2))
    for value in (stats.entropy, stats.renyi2, stats.varentropy, stats.residual, stats.nll, stats.calibration_z):
        assert float(value) == 0
    assert float(stats.margin) == float(stats.top1_probability) == 1


def test_calibration_gap_is_zero_on_average() -> None:
    logits = randn(50, spread=2.0)
    p = logits.softmax(0)
    stats = logit_stats(logits.expand(50, 50), torch.arange(50))
    assert float((p * stats.calibration_gap).sum()) == pytest.approx(0, abs=1e-12)
    assert float((p * stats.calibration_z**2).sum()) == pytest.approx(1, abs=1e-12)


# -- independent oracles ---------------------------------------------------------------------------


@given(leading=leadings, width=widths, seed=seeds, spread=spreads)
@settings(deadline=None, max_examples=60)
def test_one_agrees_with_the_textbook_and_scipy(leading: tuple[int, ...], width: int, seed: int, spread: float) -> None:
    logits = randn(*leading, width, seed=seed, spread=spread)
    targets = torch.randint(0, width, leading, generator=torch.Generator().manual_seed(seed))
    stats = fields(logit_stats(logits, targets))
    for name, expected in textbook.statistics(logits, targets).items():
        assert stats[name].shape == leading
        if not (name == "calibration_z" and spread == 0):
            torch.testing.assert_close(stats[name], expected, rtol=1e-7, atol=1e-9, msg=name)
    p = scipy.special.softmax(logits.numpy(), -1)
    np.testing.assert_allclose(stats["entropy"].numpy(), scipy.stats.entropy(p, axis=-1), atol=1e-10)


@given(leading=leadings, width=widths, seed=seeds, spread=spreads, step=st.sampled_from([1e-3, 0.3, 3.0]))
@settings(deadline=None, max_examples=60)
def test_pair_agrees_with_the_textbook_and_scipy(
    leading: tuple[int, ...], width: int, seed: int, spread: float, step: float
) -> None:
    base = randn(*leading, width, seed=seed, spread=spread)
    tuned = base + randn(*leading, width, seed=seed + 1, spread=step)
    comparison = compare_logits(tuned, base)
    assert_same(comparison.tuned, logit_stats(tuned), 1e-12)
    assert_same(comparison.base, logit_stats(base), 1e-12)
    for name, expected in textbook.divergences(tuned, base).items():
        torch.testing.assert_close(getattr(comparison, name), expected, rtol=1e-7, atol=1e-12, msg=name)
    q, p = (scipy.special.softmax(one.numpy(), -1) for one in (tuned, base))
    np.testing.assert_allclose(comparison.forward_kl, scipy.special.rel_entr(p, q).sum(-1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(comparison.reverse_kl, scipy.special.rel_entr(q, p).sum(-1), rtol=1e-6, atol=1e-12)
    assert torch.equal(comparison.top1_agreement, (tuned.argmax(-1) == base.argmax(-1)).double())
    for name in ("entropy", "renyi2", "varentropy", "residual"):
        change = getattr(comparison.tuned, name) - getattr(comparison.base, name)
        assert torch.equal(getattr(comparison, f"{name}_change"), change)


@given(rows=st.integers(1, 5), width=st.integers(2, 1500), seed=seeds, spread=st.sampled_from([0.0, 1.0, 30.0]))
@settings(deadline=None, max_examples=60)
def test_top_two_are_the_two_largest(rows: int, width: int, seed: int, spread: float) -> None:
    logits = randn(rows, width, seed=seed, spread=spread).round(decimals=1)
    values, places = top_two(logits)
    assert torch.equal(values, logits.sort(1, descending=True).values[:, :2])
    assert torch.equal(logits.gather(1, places), values)
    assert bool((places[:, 0] != places[:, 1]).all())
    assert torch.equal(places[:, 0], logits.argmax(1))


# -- properties ------------------------------------------------------------------------------------


@given(width=widths, seed=seeds, spread=spreads, shift=st.floats(-1e3, 1e3))
@settings(deadline=None, max_examples=40)
def test_shifts_and_permutations_change_nothing(width: int, seed: int, spread: float, shift: float) -> None:
    tuned, base = randn(3, width, seed=seed, spread=spread), randn(3, width, seed=seed + 1, spread=spread)
    targets = torch.arange(3) % width
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    plain = compare_logits(tuned, base, targets)
    assert_same(compare_logits(tuned + shift, base - shift, targets), plain, 1e-6)
    moved = compare_logits(tuned[:, order], base[:, order], order.argsort()[targets])
    if spread > 0:
        assert_same(moved, plain, 1e-6)


@given(width=widths, seed=seeds, spread=spreads, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(deadline=None, max_examples=60)
def test_bounds(width: int, seed: int, spread: float, dtype: torch.dtype) -> None:
    tuned, base = (randn(4, width, seed=seed + n, spread=spread, dtype=dtype) for n in range(2))
    comparison = compare_logits(tuned, base)
    for stats in (comparison.tuned, comparison.base):
        assert bool((stats.entropy >= 0).all())
        assert bool((stats.entropy <= math.log(width) + 1e-5).all())
        assert bool((stats.renyi2 <= stats.entropy + 1e-5).all())
        assert bool((stats.renyi2 >= 0).all())
        assert bool((stats.varentropy >= 0).all())
        assert bool(((stats.margin >= 0) & (stats.margin <= stats.top1_probability)).all())
        assert bool((stats.top1_probability <= 1).all())
    assert bool((comparison.forward_kl >= 0).all())
    assert bool((comparison.reverse_kl >= 0).all())
    assert bool(((comparison.jensen_shannon >= 0) & (comparison.jensen_shannon <= LN2 + 1e-6)).all())


@given(width=widths, seed=seeds, spread=spreads, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(deadline=None, max_examples=40)
def test_equal_logits_diverge_by_exactly_nothing(width: int, seed: int, spread: float, dtype: torch.dtype) -> None:
    logits = randn(3, width, seed=seed, spread=spread, dtype=dtype)
    logits[0, 0] = -INF
    comparison = compare_logits(logits, logits.clone())
    for value in (comparison.forward_kl, comparison.reverse_kl, comparison.jensen_shannon, comparison.entropy_change):
        assert torch.equal(value, torch.zeros(3, dtype=value.dtype))
    assert torch.equal(comparison.top1_agreement, torch.ones(3, dtype=value.dtype))


@given(rows=st.integers(1, 9), width=widths, seed=seeds, at_once=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_chunks_and_batches_change_nothing(rows: int, width: int, seed: int, at_once: int) -> None:
    tuned, base = randn(rows, width, seed=seed), randn(rows, width, seed=seed + 1)
    targets = torch.arange(rows) % width
    whole = compare_logits(tuned, base, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_chunks, "_CPU_SCRATCH_BYTES", at_once * width * 8)
        assert_same(compare_logits(tuned, base, targets), whole, 1e-12)
    row = seed % rows
    alone = fields(compare_logits(tuned[row], base[row], targets[row]))
    for name, value in fields(whole).items():
        torch.testing.assert_close(alone[name], value[row], rtol=1e-12, atol=1e-12)


@given(width=widths, seed=seeds, spread=spreads)
@settings(deadline=None, max_examples=40)
def test_precisions(width: int, seed: int, spread: float) -> None:
    tuned, base = (randn(2, 3, width, seed=seed + n, spread=spread, dtype=torch.bfloat16) for n in range(2))
    half = compare_logits(tuned, base)
    single = compare_logits(tuned.float(), base.float())
    for name, value in fields(half).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, fields(single)[name]), name
    double = compare_logits(tuned.double(), base.double())
    assert fields(double)["forward_kl"].dtype == torch.float64
    assert_same(single, double, 2e-5)
    assert compare_logits(tuned, base.double()).forward_kl.dtype == torch.float64


def strided(kind: str, tensor: Tensor) -> Tensor:
    """The same values in other strides."""
    if kind == "positions":
        return torch.cat((tensor, tensor[:, :1]), 1)[:, :-1]
    if kind == "batch inside":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "vocabulary first":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "padded vocabulary":
        return torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]
    return tensor.flip(-1)[..., torch.arange(tensor.shape[-1] - 1, -1, -1)]


@pytest.mark.parametrize("kind", ["positions", "batch inside", "vocabulary first", "padded vocabulary", "indexed"])
def test_strides_change_nothing(kind: str) -> None:
    tuned, base = randn(3, 4, 600), randn(3, 4, 600, seed=1)
    targets = torch.arange(12).view(4, 3).t()
    expected = compare_logits(tuned, base, targets)
    assert_same(compare_logits(strided(kind, tuned), base, targets), expected, 1e-12)
    assert_same(compare_logits(tuned, strided(kind, base), targets), expected, 1e-12)
    leaf = tuned.clone().requires_grad_()
    compare_logits(strided(kind, leaf), base, targets).forward_kl.sum().backward()
    torch.testing.assert_close(leaf.grad, tuned.softmax(-1) - base.softmax(-1), rtol=1e-9, atol=1e-12)


# -- masked, broken and ignored --------------------------------------------------------------------


@given(width=st.integers(4, 700), seed=seeds)
@settings(deadline=None, max_examples=40)
def test_masked_ids_are_as_good_as_absent(width: int, seed: int) -> None:
    tuned, base = randn(3, width, seed=seed), randn(3, width, seed=seed + 1)
    kept = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: width - width // 3].sort().values
    masked = [torch.full_like(one, -INF).index_copy(1, kept, one[:, kept]) for one in (tuned, base)]
    targets = torch.zeros(3, dtype=torch.long)
    expected = compare_logits(tuned[:, kept], base[:, kept], targets)
    assert_same(compare_logits(*masked, kept[targets]), expected, 1e-9)


def test_a_masked_target_and_a_one_sided_mask_are_infinite() -> None:
    open_, masked = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, -INF])
    assert float(logit_stats(masked, torch.tensor(2)).nll) == INF
    comparison = compare_logits(masked, open_)
    assert float(comparison.forward_kl) == INF
    q, p = (scipy.special.softmax(one.numpy()) for one in (masked, open_))
    assert float(comparison.reverse_kl) == pytest.approx(scipy.special.rel_entr(q, p).sum(), abs=1e-6)
    mixed = (scipy.special.rel_entr(p, (p + q) / 2) + scipy.special.rel_entr(q, (p + q) / 2)).sum() / 2
    assert float(comparison.jensen_shannon) == pytest.approx(mixed, abs=1e-6)


@pytest.mark.parametrize("width", [3, 600])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, -1])
def test_broken_rows_are_nan_and_their_neighbours_are_not(width: int, bad: float, place: int) -> None:
    logits, base = randn(3, width), randn(3, width, seed=1)
    broken = logits.clone()
    broken[1, slice(None) if bad == -INF else place] = bad
    targets = torch.tensor([0, 1, 2])
    for measured, whole, sound in (
        (logit_stats(broken, targets), logit_stats(logits, targets), "nothing"),
        (compare_logits(broken, base, targets), compare_logits(logits, base, targets), "base."),
        (compare_logits(base, broken, targets), compare_logits(base, logits, targets), "tuned."),
    ):
        expected = fields(whole)
        for name, value in fields(measured).items():
            torch.testing.assert_close(value[[0, 2]], expected[name][[0, 2]], rtol=1e-12, atol=1e-12)
            assert bool(value[1].isnan()) != name.startswith(sound), name


def test_ignored_positions_are_nan_and_give_no_gradient() -> None:
    logits = randn(2, 3, 5).requires_grad_()
    targets = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    stats = logit_stats(logits, targets)
    for value in (stats.nll, stats.calibration_gap, stats.calibration_z):
        assert torch.equal(value.isnan(), targets == -100)
    assert not stats.entropy.isnan().any()
    stats.nll.nanmean().backward()
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits)[
        0
    ]
    torch.testing.assert_close(logits.grad, expected)
    other = logit_stats(logits.detach(), targets.masked_fill(targets == -100, -1), ignore_index=-1)
    torch.testing.assert_close(other.nll, stats.nll.detach(), equal_nan=True)


def test_shared_ids_are_compared_renormalised() -> None:
    tuned, base = randn(2, 7).requires_grad_(), randn(2, 5, seed=1).requires_grad_()
    targets = torch.tensor([6, 2])
    comparison = compare_logits(tuned, base, targets)
    expected = compare_logits(tuned[:, :5], base, torch.tensor([-100, 2]))
    assert comparison.shared_ids == 5
    assert_same(comparison, expected, 1e-12)
    gradient = torch.autograd.grad(comparison.forward_kl.sum(), tuned)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.forward_kl.sum(), tuned)[0])
    assert torch.equal(gradient[:, 5:], torch.zeros(2, 2, dtype=torch.float64))


# -- memory ----------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The sizes in bytes of the storages that operations make, none of them `inputs`."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        # Kept alive, so that no address is given out twice.
        self.storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in inputs}
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self.storages:
                self.storages[one.untyped_storage().data_ptr()] = one.untyped_storage()
                self.made.append(one.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_logits_size_is_made(dtype: torch.dtype) -> None:
    whole = tuple(torch.zeros(32, 65, 4000, dtype=dtype).normal_() for _ in range(2))
    tuned, base = (one[:, :-1] for one in whole)
    with Allocations(*whole) as seen:
        compare_logits(tuned, base, torch.zeros(32, 64, dtype=torch.long))
    scratch = [made for made in seen.made if made > 1 << 20]
    assert len(scratch) == 1
    assert scratch[0] <= 5 * 32 * 4000 * 4 < tuned.numel() * tuned.itemsize / 4


def test_backward_makes_one_buffer() -> None:
    tuned = randn(8, 200, 4000, dtype=torch.float32).requires_grad_()
    base = randn(8, 200, 4000, seed=1, dtype=torch.float32)
    comparison = compare_logits(tuned, base, torch.zeros(8, 200, dtype=torch.long))
    loss = comparison.forward_kl + comparison.jensen_shannon + comparison.varentropy_change + comparison.tuned.nll
    with Allocations(tuned, base) as seen:
        torch.autograd.grad(loss.sum(), tuned)
    size = tuned.numel() * 4
    assert [made for made in seen.made if made >= size] == [size]
    assert sum(made for made in seen.made if 1 << 20 < made < size) < 16 << 20


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 700)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    comparison = compare_logits(logits, logits, torch.zeros(shape[:-1], dtype=torch.long))
    assert all(value.shape == shape[:-1] for value in fields(comparison).values())
    comparison.forward_kl.sum().backward()
    assert logits.grad is not None


def test_errors_say_what_was_wrong() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="target 5 is outside the vocabulary of 5 ids"):
        logit_stats(logits, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="target -1 is outside"):
        logit_stats(logits, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"leading shape \(2,\), got torch.int64 of shape \(3,\)"):
        logit_stats(logits, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="token ids"):
        logit_stats(logits, torch.zeros(2))
    with pytest.raises(ValueError, match="at least one id"):
        logit_stats(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="at least one id"):
        logit_stats(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"torch.int64; convert it with .float\(\)"):
        logit_stats(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="of the same positions"):
        compare_logits(torch.zeros(2, 5), torch.zeros(3, 5))


def test_an_impossible_target_of_a_settled_row_is_no_calibration() -> None:
    logits = torch.tensor([[0.0, -INF, -INF], [0.0, -INF, -INF]]).requires_grad_()
    stats = logit_stats(logits, torch.tensor([0, 1]))
    assert stats.nll is not None
    assert stats.calibration_z is not None
    assert stats.nll.tolist() == [0.0, INF]
    assert stats.calibration_z.tolist() == [0.0, INF]
    stats.entropy.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
