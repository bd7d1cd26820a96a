from __future__ import annotations

import doctest
import math

import pytest
import torch

import geohooks.measures.health
from geohooks.measures import distribution_health, logit_stats, perplexity


def test_documented_examples() -> None:
    outcome = doctest.testmod(geohooks.measures.health)
    assert outcome.attempted >= 3
    assert outcome.failed == 0


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    stats = logit_stats(torch.zeros(2, 3, 17), torch.tensor([[1, 2, -100], [-100, 5, 16]]))
    assert float(perplexity(stats.nll)) == pytest.approx(17)


def test_perplexity_of_nothing_and_of_the_impossible() -> None:
    assert math.isnan(perplexity(torch.tensor([math.nan])))
    assert float(perplexity(torch.tensor([0.0, math.inf]))) == math.inf


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        (0.0, "healthy"),
        (0.5, "healthy"),
        (0.501, "warning"),
        (2.0, "warning"),
        (2.001, "critical"),
        (math.inf, "critical"),
    ],
)
def test_health(mean: float, expected: str) -> None:
    assert distribution_health(mean) == expected
    if math.isfinite(mean):
        values = torch.tensor([mean - 1, math.nan, mean + 1], dtype=torch.float64)
        assert distribution_health(values) == expected


@pytest.mark.parametrize("nothing", [math.nan, torch.tensor([math.nan]), torch.tensor([])])
def test_nothing_to_judge(nothing: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="nothing to judge"):
        distribution_health(nothing)
