"""In generation, and wherever there is a cache, the base reads what the model writes."""

from __future__ import annotations

import pytest
import torch
from bases import Asks, adapted, pair, run
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Calls, same
from transformers import DynamicCache

import geohooks
from geohooks import Plugin, ReferenceMismatch, hookimpl, zoo

# What PEFT asks of a model when it wraps it is deprecated in transformers.
# What PEFT asks of a model when it wraps it is deprecated in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

DECODERS = ["llama", "qwen3_moe", "deepseek_v3", "gpt2"]


# Generation


def forced(base, ids):
    """The base's logits at every position of a whole text."""
    return run(base, {"input_ids": ids})


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}, {"do_sample": True}])
def test_in_generation_the_base_reads_what_the_model_writes(family, options):
    base, tuned, inputs = pair(family)
    asks = Asks()
    torch.manual_seed(0)
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(**inputs, max_new_tokens=4, **{"do_sample": False, **options})
    whole = forced(base, tokens)
    assert len(asks.base) >= 4
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        for row in range(2):
            torch.testing.assert_close(logits[row], whole[row, positions[row]], rtol=1e-4, atol=2e-5)


def test_in_generation_a_disabled_adapter_reads_what_the_model_writes():
    model = adapted()
    base, _, inputs = pair("llama")
    bare = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    asks = Asks()
    with geohooks.instrument(model, [asks], reference="disable_adapter"):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, bare)
    whole = forced(base, tokens)
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        torch.testing.assert_close(logits, whole[:, positions[0]], rtol=1e-4, atol=2e-5)


def test_in_generation_of_a_pair_the_base_reads_what_the_model_writes():
    base, tuned, inputs = pair("t5")
    ids = inputs["input_ids"]
    asks = Asks()
    bare = tuned.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, bare)
    whole = run(base, {"input_ids": ids, "decoder_input_ids": tokens[:, :-1]})
    for step, logits in enumerate(asks.base):
        torch.testing.assert_close(logits[:, 0], whole[:, step], rtol=1e-4, atol=2e-5)


def test_a_pair_given_its_encoding_is_compared_with_the_base_s_own_encoding():
    base, tuned, inputs = pair("t5")
    with torch.no_grad():
        encoded = tuned.encoder(input_ids=inputs["input_ids"])
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base), pytest.raises(ReferenceMismatch, match="encoder"):
        run(tuned, {"encoder_outputs": encoded, "decoder_input_ids": inputs["decoder_input_ids"]})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "t5"])
def test_beams_are_reordered_in_the_base_too(family):
    base, tuned, inputs = pair(family)
    ids = inputs["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 5, "num_beams": 3}
    bare = tuned.generate(**options)
    seen = []

    class Compares(Plugin):
        @hookimpl
        def on_scores(self, event):
            seen.append((event.call.reference[:, -1], event.input_ids))

    with geohooks.instrument(tuned, [Compares()], reference=base):
        assert torch.equal(tuned.generate(**options), bare)
    assert len(seen) == 5
    for logits, tokens in seen:
        full = {"input_ids": tokens}
        if family == "t5":
            full = {"input_ids": ids.repeat_interleave(3, 0), "decoder_input_ids": tokens}
        torch.testing.assert_close(logits, run(base, full)[:, -1], rtol=1e-4, atol=2e-5)


@settings(max_examples=8, deadline=None)
@given(family=st.sampled_from(DECODERS), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3))
def test_left_padding_is_padding_for_the_base_too(family, lengths):
    base, tuned, _ = pair(family)
    ids = zoo.example_inputs(base, batch=len(lengths))["input_ids"]
    rows, mask = torch.zeros(len(lengths), 7, dtype=torch.int64), torch.zeros(len(lengths), 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        rows[row, 7 - length :] = ids[row, :length]
        mask[row, 7 - length :] = 1
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(input_ids=rows, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for row, length in enumerate(lengths):
        whole = forced(base, tokens[row : row + 1, 7 - length :])[0]
        for step, logits in enumerate(asks.base):
            torch.testing.assert_close(logits[row, -1], whole[length - 1 + step], rtol=1e-4, atol=2e-5)


def test_a_static_cache_has_a_cache_of_the_base_beside_it():
    base, tuned, inputs = pair("llama")
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    whole = forced(base, tokens)
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        torch.testing.assert_close(logits, whole[:, positions[0]], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("static", [False, True])
def test_one_generation_after_another_begins_with_an_empty_base(static):
    base, tuned, inputs = pair("llama")
    options = {"cache_implementation": "static"} if static else {}
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        for _ in range(2):
            tuned.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
    for one, other in zip(asks.base[:3], asks.base[3:], strict=True):
        assert same(one, other)


def test_a_cache_that_the_model_makes_itself_is_followed():
    base, tuned, inputs = pair("llama")
    ids = inputs["input_ids"]
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base), torch.no_grad():
        first = tuned(input_ids=ids[:, :5], use_cache=True)
        tuned(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    whole = forced(base, ids)
    torch.testing.assert_close(torch.cat(asks.base, 1), whole, rtol=1e-4, atol=2e-5)


def test_a_cache_that_is_cropped_is_cropped_in_the_base_too():
    base, tuned, inputs = pair("llama")
    ids = inputs["input_ids"]
    asks = Asks()
    past = DynamicCache(config=tuned.config)
    with geohooks.instrument(tuned, [asks], reference=base), torch.no_grad():
        tuned(input_ids=ids, past_key_values=past)
        past.crop(-5)
        tuned(input_ids=ids[:, 3:6], past_key_values=past)
    torch.testing.assert_close(asks.base[1], forced(base, ids)[:, 3:6], rtol=1e-4, atol=2e-5)


def test_prompt_lookup_drafts_are_answered_by_the_base():
    base, tuned, _ = pair("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    asks = Asks()
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False, "prompt_lookup_num_tokens": 3}
    bare = tuned.generate(**options)
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(**options)
    assert torch.equal(tokens, bare)
    whole = forced(base, tokens)
    # The first token of each pass was accepted; those after it may be drafts that were not.
    assert len(asks.base) > 1
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        torch.testing.assert_close(logits[:, 0], whole[:, positions[0, 0]], rtol=1e-4, atol=2e-5)


def test_a_base_that_missed_a_call_is_a_mismatch():
    base, tuned, inputs = pair("llama")
    ids = inputs["input_ids"]
    past = DynamicCache(config=tuned.config)
    with torch.no_grad():
        tuned(input_ids=ids[:, :4], past_key_values=past)
        with (
            geohooks.instrument(tuned, [Asks()], reference=base),
            pytest.raises(ReferenceMismatch, match=r"holds 4 tokens and the reference's 0"),
        ):
            tuned(input_ids=ids[:, 4:], past_key_values=past)


def test_a_cache_that_was_followed_is_not_kept_alive():
    import gc
    import weakref

    base, tuned, inputs = pair("llama")
    past = DynamicCache(config=tuned.config)
    alive = weakref.ref(past)
    with geohooks.instrument(tuned, [Calls(lambda call: call.reference.shape)], reference=base) as host:
        run(tuned, {**inputs, "past_key_values": past})
        del past
        host["calls"].started.clear()
        host["calls"].ended.clear()
        gc.collect()
        assert alive() is None
