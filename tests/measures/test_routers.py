from __future__ import annotations

import doctest
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import geohooks.measures.routers
from geohooks.measures import router_divergence, router_stats

tokens = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)


def routing(rows: int, experts: int, chosen: int, seed: int) -> SimpleNamespace:
    logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SimpleNamespace(scores=logits, probabilities=logits.softmax(-1), indices=logits.topk(chosen).indices)


def test_documented_examples() -> None:
    outcome = doctest.testmod(geohooks.measures.routers)
    assert outcome.attempted >= 4
    assert outcome.failed == 0


@given(rows=tokens, experts=st.integers(2, 12), data=st.data(), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_stats_agree_with_a_count_by_hand(rows: int, experts: int, data: st.DataObject, seed: int) -> None:
    chosen = data.draw(st.integers(1, experts - 1))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    mask[0] = True
    one = routing(rows, experts, chosen, seed)
    stats = router_stats(one.scores, one.indices, mask=mask)
    counts: Counter[int] = Counter()
    for row in range(rows):
        if not mask[row]:
            assert all(value[row].isnan() for value in (stats.entropy, stats.top_mass, stats.margin))
            continue
        counts.update(one.indices[row].tolist())
        p = one.probabilities[row].numpy()
        ordered = sorted(one.scores[row].tolist(), reverse=True)
        assert float(stats.entropy[row]) == pytest.approx(scipy.stats.entropy(p))
        assert float(stats.top_mass[row]) == pytest.approx(sum(sorted(p)[-chosen:]))
        assert float(stats.margin[row]) == pytest.approx(ordered[chosen - 1] - ordered[chosen])
    load = np.array([counts[expert] for expert in range(experts)]) / (chosen * int(mask.sum()))
    np.testing.assert_allclose(stats.load, load)
    assert float(stats.load.sum()) == pytest.approx(1)
    assert float(stats.load_entropy) == pytest.approx(scipy.stats.entropy(load))
    assert float(stats.utilisation) == pytest.approx(np.mean(load > 0))


def test_experts_that_were_not_eligible_do_not_set_the_margin() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, -math.inf], [0.9, -math.inf, 0.5, -math.inf]])
    stats = router_stats(scores, torch.tensor([[0, 2], [0, 2]]), probabilities=torch.full((2, 4), 0.25))
    assert float(stats.margin[0]) == pytest.approx(0.4)
    assert float(stats.margin[1]) == math.inf
    assert stats.top_mass.tolist() == [0.5, 0.5]
    torch.testing.assert_close(stats.entropy, torch.full((2,), math.log(4)))


def test_nothing_but_padding_has_no_load() -> None:
    stats = router_stats(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long), mask=torch.zeros(2, dtype=torch.long))
    assert bool(stats.load.isnan().all())
    assert bool(stats.load_entropy.isnan())
    assert bool(stats.utilisation.isnan())


@given(rows=tokens, experts=st.integers(2, 12), data=st.data(), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_divergence_agrees_with_sets_and_scipy(rows: int, experts: int, data: st.DataObject, seed: int) -> None:
    tuned, base = (routing(rows, experts, data.draw(st.integers(1, experts)), seed + n) for n in range(2))
    found = router_divergence(tuned, base)
    for row in range(rows):
        a, b = set(tuned.indices[row].tolist()), set(base.indices[row].tolist())
        assert float(found.jaccard[row]) == pytest.approx(1 - len(a & b) / len(a | b))
        distance = scipy.spatial.distance.jensenshannon(tuned.probabilities[row], base.probabilities[row])
        assert float(found.jensen_shannon[row]) == pytest.approx(distance**2, abs=1e-9)
    same = router_divergence(tuned, tuned)
    assert torch.equal(same.jaccard, torch.zeros(rows, dtype=torch.float64))
    assert torch.equal(same.jensen_shannon, torch.zeros(rows, dtype=torch.float64))


def test_gradients_of_the_distribution() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    indices = logits.topk(2).indices
    base = routing(3, 5, 2, 1)

    def measures(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stats = router_stats(logits, indices)
        moved = router_divergence(SimpleNamespace(probabilities=logits.softmax(-1), indices=indices), base)
        return stats.entropy, stats.top_mass, stats.margin, moved.jensen_shannon

    assert torch.autograd.gradcheck(measures, (logits,))
    assert not router_divergence(
        SimpleNamespace(probabilities=logits.softmax(-1), indices=indices), base
    ).jaccard.requires_grad


def test_padding_and_half_precision() -> None:
    tuned, base = routing(4, 6, 2, 0), routing(4, 6, 2, 1)
    found = router_divergence(tuned, base, mask=torch.tensor([1, 0, 1, 0]))
    assert found.jaccard.isnan().tolist() == found.jensen_shannon.isnan().tolist() == [False, True, False, True]
    half = router_stats(tuned.scores.bfloat16(), tuned.indices)
    assert half.entropy.dtype == half.load.dtype == torch.float32


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="different tokens"):
        router_stats(torch.zeros(3, 4), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask \(2,\)"):
        router_stats(torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.long), mask=torch.ones(2))
    with pytest.raises(ValueError, match="4 and 5 experts"):
        router_divergence(routing(2, 4, 1, 0), routing(2, 5, 1, 0))
    with pytest.raises(ValueError, match="different tokens"):
        router_divergence(routing(2, 4, 1, 0), routing(3, 4, 1, 0))
