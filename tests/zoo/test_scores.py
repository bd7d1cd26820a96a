from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geohooks import zoo
from geohooks.zoo.exercises import Exercise
from geohooks.zoo.scores import answer_nll, bigram_nll, held_out_figures, unigram_nll, windows

VOCABULARY = 5
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=40).map(torch.tensor)


@given(length=st.integers(2, 400), context=st.integers(2, 24).map(lambda half: 2 * half))
def test_windows_count_each_token_once(length: int, context: int) -> None:
    ids = torch.arange(length)
    counted: list[int] = []
    for rows, targets in windows(ids, context):
        assert rows.shape[1] == min(length, context)
        assert (rows.diff(dim=1) == 1).all()
        assert ((targets == rows[:, 1:]) | (targets == -100)).all()
        for row, kept in zip(rows, targets, strict=True):
            found = kept[kept != -100].tolist()
            counted += found
            assert row[0] == 0 or found[0] - row[0] >= context // 2
    assert sorted(counted) == list(range(1, length))


@settings(deadline=None)
@given(training=TOKENS, text=TOKENS)
def test_counts_match_a_plain_loop(training: Tensor, text: Tensor) -> None:
    ids, seen = training.tolist(), Counter(training.tolist())
    pairs = Counter(pairwise(ids))
    before = Counter(ids[:-1])

    def unigram(token: int) -> float:
        return (seen[token] + 1) / (len(ids) + VOCABULARY)

    def bigram(first: int, second: int) -> float:
        kinds = max(1, sum(pair[0] == first for pair in pairs))
        return (pairs[first, second] + kinds * unigram(second)) / (before[first] + kinds)

    after = text.tolist()[1:]
    expected = -sum(math.log(unigram(token)) for token in after) / len(after)
    assert unigram_nll(training, [text], VOCABULARY) == pytest.approx(expected)
    steps = list(pairwise(text.tolist()))
    expected = -sum(math.log(bigram(*step)) for step in steps) / len(steps)
    assert bigram_nll(training, [text], VOCABULARY) == pytest.approx(expected)
    for first in range(VOCABULARY):
        assert sum(bigram(first, second) for second in range(VOCABULARY)) == pytest.approx(1)


@torch.no_grad()
def test_figures_of_a_pair_match_the_textbook() -> None:
    base, tuned = zoo.untrained("llama"), zoo.untrained("llama", seed=1)
    for model in (base, tuned):
        model.lm_head.weight *= 12
    texts = [zoo.example_inputs(base, 1, length, length)["input_ids"][0] for length in (40, 90)]
    p, q, targets = [], [], torch.cat([ids[1:] for ids in texts])
    for ids in texts:
        p.append(base(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1))
        q.append(tuned(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1))
    log_p, log_q = torch.cat(p), torch.cat(q)
    forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    figures = held_out_figures([base, tuned], texts)
    for prefix, log in (("base_", log_p), ("", log_q)):
        nll = -log.gather(1, targets[:, None]).mean().item()
        sure_and_wrong = (log.max(-1).values.exp() > 0.9) & (log.argmax(-1) != targets)
        assert 0 < sure_and_wrong.double().mean() < 1
        assert figures[f"{prefix}nll"] == pytest.approx(nll, rel=1e-5)
        assert figures[f"{prefix}perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
        assert figures[f"{prefix}sure_and_wrong"] == pytest.approx(sure_and_wrong.double().mean().item())
    assert figures["forward_kl"] == pytest.approx(forward_kl.mean().item(), rel=1e-4)
    assert figures["forward_kl_largest"] == pytest.approx(forward_kl.max().item(), rel=1e-4)
    assert figures["forward_kl_above_2"] == pytest.approx((forward_kl > 2).double().mean().item())


def test_one_model_is_its_own_half_of_a_pair() -> None:
    model = zoo.untrained("qwen3_moe")
    texts = [zoo.example_inputs(model, 1, 300)["input_ids"][0]]
    alone, pair = held_out_figures([model], texts), held_out_figures([model, model], texts)
    assert pair["forward_kl_largest"] == 0
    assert alone == {name: pair[name] for name in alone}


@torch.no_grad()
def test_answer_nll_is_the_loss_on_the_answers() -> None:
    model = zoo.untrained("qwen3")
    chats = [Exercise(tuple(zoo.example_inputs(model, 1, 12, seed)["input_ids"][0].tolist()), 7) for seed in (0, 1)]
    ids = torch.tensor([chat.ids for chat in chats])
    labels = ids.clone()
    labels[:, :7] = -100
    assert answer_nll(model, chats) == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
