"""Held-out figures of the zoo's models, and of counts to hold them against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geohooks.measures import LogitStats, compare_logits, logit_stats
from geohooks.zoo.exercises import Exercise

__all__ = ["SURE", "answer_nll", "bigram_nll", "held_out_figures", "unigram_nll", "windows"]

SURE = 0.9
_ROWS_AT_ONCE = 8


def windows(ids: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts `ids` `[length]` into rows of at most `context` tokens that overlap by half; each counts once.

    Yields rows `[batch, width]` and targets `[batch, width - 1]`, -100 where the token counts in another
    row. The first token of all has nothing before it and does not count.
    """
    last = max(0, len(ids) - context)
    starts = [*range(0, last, context // 2), last]
    counted_to = [1, *(start + context for start in starts[:-1])]
    for i in range(0, len(starts), _ROWS_AT_ONCE):
        rows = torch.stack([ids[start : start + context] for start in starts[i : i + _ROWS_AT_ONCE]])
        positions = torch.tensor(starts[i : i + _ROWS_AT_ONCE])[:, None] + torch.arange(1, rows.shape[1])
        old = positions < torch.tensor(counted_to[i : i + _ROWS_AT_ONCE])[:, None]
        yield rows, rows[:, 1:].masked_fill(old, -100)


@torch.no_grad()
def held_out_figures(models: Sequence[Any], texts: Iterable[Tensor]) -> dict[str, float]:
    """Figures of one causal model, or of a base and the model tuned from it, over texts of ids `[length]`.

    `nll` (mean, nats), `perplexity`, and `sure_and_wrong`: the share of tokens where another than the one that
    came had more than 0.9. Of a pair: those of the tuned model, those of the base with `base_` before their names,
    and of the forward KL (nats) its mean, its largest and the share of tokens where it is above 2.
    """
    *base, model = models
    columns: dict[str, list[Tensor]] = {}
    for ids in texts:
        for rows, targets in windows(ids, model.config.max_position_embeddings):
            for name, values in _columns(model, *base, rows=rows, targets=targets).items():
                columns.setdefault(name, []).append(values)
    joined = {name: torch.cat(parts).double() for name, parts in columns.items()}
    figures = {name: values.mean().item() for name, values in joined.items()}
    if base:
        figures["forward_kl_largest"] = joined["forward_kl"].max().item()
    perplexities = {
        name.replace("nll", "perplexity"): math.exp(value) for name, value in figures.items() if name.endswith("nll")
    }
    return {**figures, **perplexities}


def _columns(model: Any, base: Any = None, *, rows: Tensor, targets: Tensor) -> dict[str, Tensor]:
    counted = targets != -100
    logits = model(input_ids=rows).logits[:, :-1][counted]
    if base is None:
        return _judged(logit_stats(logits, targets[counted]))
    pair = compare_logits(logits, base(input_ids=rows).logits[:, :-1][counted], targets[counted])
    return {
        **_judged(pair.tuned),
        **{f"base_{name}": values for name, values in _judged(pair.base).items()},
        "forward_kl": pair.forward_kl,
        "forward_kl_above_2": (pair.forward_kl > 2).float(),
    }


def _judged(stats: LogitStats) -> dict[str, Tensor]:
    assert stats.nll is not None
    wrong = (stats.top1_probability > SURE) & (stats.nll > -math.log(1 - SURE))
    return {"nll": stats.nll, "sure_and_wrong": wrong.float()}


def unigram_nll(training: Tensor, texts: Sequence[Tensor], vocabulary: int) -> float:
    """Mean NLL (nats) of all tokens but the firsts, from counts in `training` `[length]` plus one."""
    after = torch.cat([ids[1:] for ids in texts])
    return float(-_unigram(training, vocabulary)[after].log().mean())


def bigram_nll(training: Tensor, texts: Sequence[Tensor], vocabulary: int) -> float:
    """Mean NLL (nats) of all tokens but the firsts, from counts of pairs backed off to single tokens.

    Source: Witten, Bell, "The zero-frequency problem" (1991), method C, interpolated.
    """
    pairs = torch.bincount(training[:-1] * vocabulary + training[1:], minlength=vocabulary**2)
    counts = pairs.view(vocabulary, vocabulary).double()
    kinds = (counts > 0).sum(1).clamp(min=1)
    before = torch.cat([ids[:-1] for ids in texts])
    after = torch.cat([ids[1:] for ids in texts])
    backed_off = kinds[before] * _unigram(training, vocabulary)[after]
    return float(-((counts[before, after] + backed_off) / (counts.sum(1) + kinds)[before]).log().mean())


def _unigram(training: Tensor, vocabulary: int) -> Tensor:
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    return counts / counts.sum()


@torch.no_grad()
def answer_nll(model: Any, exercises: Sequence[Exercise]) -> float:
    """Mean NLL (nats) of the tokens of the answers."""
    total, count = 0.0, 0
    for exercise in exercises:
        logits = model(input_ids=torch.tensor([exercise.ids])).logits[0, exercise.answer_start - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(exercise.answer_ids), reduction="sum").item()
        count += len(exercise.answer_ids)
    return total / count
