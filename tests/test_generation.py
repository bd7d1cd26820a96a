"""Generation: the same values as in one pass at the same positions, the same tokens, and scores that can be edited."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Calls, Editor, Logits, Recorder, Scores, hook_count, same
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import geohooks
from geohooks import Plugin, hookimpl, zoo

DECODERS = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gpt2"]
KINDS = ("embedding", "input", "attention", "mlp", "output", "final_norm", "router", "logits")


@cache
def subject(family):
    model = zoo.untrained(family)
    # No token ends a text, so that every row is as long as was asked for.
    model.generation_config.eos_token_id = None
    return model, zoo.example_inputs(model)


def stackwise(anatomy):
    return [site for site in anatomy.sites if site.kind in KINDS]


class Everywhere(Recorder):
    @hookimpl
    def sites(self, anatomy):
        return stackwise(anatomy)


def by_position(recorder, rows=None):
    """The values of every site at every position of every row; one that is heard twice is an error."""
    found = defaultdict(dict)
    for record in recorder.records:
        for row, positions in enumerate(record.positions.tolist()):
            for index, position in enumerate(positions):
                key = (row, position)
                assert key not in found[record.site]
                found[record.site][key] = record.value[row, index]
    return found


def agree(some, whole, *, tolerance=2e-5):
    assert some.keys() == whole.keys()
    for site, values in some.items():
        for key, value in values.items():
            torch.testing.assert_close(value, whole[site][key], rtol=1e-4, atol=tolerance, msg=lambda m: f"{site} {m}")  # noqa: B023


def one_pass(model, ids):
    recorder = Everywhere()
    with geohooks.instrument(model, [recorder]), torch.no_grad():
        model(input_ids=ids)
    return by_position(recorder)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_cached_generation_hears_what_one_pass_hears(family, cache_implementation):
    model, inputs = subject(family)
    options = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    if cache_implementation:
        options["cache_implementation"] = cache_implementation
    bare = model.generate(**inputs, **options)
    recorder, calls = Everywhere(), Calls()
    with geohooks.instrument(model, [recorder, calls]):
        tokens = model.generate(**inputs, **options)
    assert torch.equal(tokens, bare)
    assert [call.step for call in calls.ended] == list(range(5))
    heard = by_position(recorder)
    assert sorted(heard["decoder.0.output"]) == [(row, position) for row in range(2) for position in range(12)]
    assert sorted(heard["logits"]) == [(row, position) for row in range(2) for position in range(7, 12)]
    agree(heard, one_pass(model, tokens[:, :-1]))


@pytest.mark.parametrize("family", DECODERS)
def test_chunked_prefill_hears_what_one_pass_hears(family):
    model, inputs = subject(family)
    recorder = Everywhere()
    with geohooks.instrument(model, [recorder]):
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, do_sample=False))
    agree(by_position(recorder), one_pass(model, tokens[:, :-1]))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_text_into_cached_passes_hears_the_same(data):
    model, _ = subject(data.draw(st.sampled_from(DECODERS)))
    length = data.draw(st.integers(2, 14))
    ids = zoo.example_inputs(model, length=length, seed=data.draw(st.integers(0, 5)))["input_ids"]
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    recorder = Everywhere()
    past = DynamicCache(config=model.config)
    with geohooks.instrument(model, [recorder]), torch.no_grad():
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            model(input_ids=ids[:, start:stop], past_key_values=past, use_cache=True)
    heard = by_position(recorder)
    assert len(heard["logits"]) == 2 * length
    agree(heard, one_pass(model, ids))


def padded(ids, lengths, width):
    """The last `lengths[row]` tokens of each row at the right end, with the mask of them."""
    rows = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        rows[row, width - length :] = ids[row, :length]
        mask[row, width - length :] = 1
    return rows, mask


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(DECODERS),
    lengths=st.lists(st.integers(1, 7), min_size=2, max_size=3),
)
def test_left_padding_changes_nothing_at_the_tokens(family, lengths):
    model, _ = subject(family)
    ids = zoo.example_inputs(model, batch=len(lengths))["input_ids"]
    rows, mask = padded(ids, lengths, 8)
    recorder = Everywhere()
    calls = Calls(lambda call: call.mask())
    with geohooks.instrument(model, [recorder, calls]):
        tokens = model.generate(input_ids=rows, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(calls.seen[0], mask.bool())
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids=ids[row : row + 1, :length], max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens[row, 8 - length :], alone[0])
        whole = one_pass(model, alone[:, :-1])
        for record, seen in zip(recorder.records, [call for call in calls.seen for _ in whole], strict=True):
            for index, position in enumerate(record.positions[row].tolist()):
                if seen[row, index - record.value.shape[1]]:
                    torch.testing.assert_close(
                        record.value[row, index], whole[record.site][0, position], rtol=1e-4, atol=2e-5
                    )


def test_a_pair_generates_what_one_pass_computes():
    model, inputs = subject("t5")
    recorder = Everywhere()
    with geohooks.instrument(model, [recorder]):
        tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False)
    once = Everywhere()
    with geohooks.instrument(model, [once]), torch.no_grad():
        model(input_ids=inputs["input_ids"], decoder_input_ids=tokens[:, :-1])
    agree(by_position(recorder), by_position(once))
    assert [r.step for r in recorder.records if r.site == "logits"] == [0, 1, 2, 3]
    assert {r.step for r in recorder.records if r.site.startswith("encoder")} == {0}


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False, "do_sample": False},
    ],
)
def test_the_tokens_are_those_of_the_bare_model(family, options):
    model, inputs = subject(family)
    ids = inputs["input_ids"]

    def generate():
        torch.manual_seed(3)
        return model.generate(input_ids=ids, max_new_tokens=4, **options)

    bare = generate()
    with geohooks.instrument(model, [Recorder(), Scores(), Calls()]):
        assert torch.equal(generate(), bare)
    assert hook_count(model) == 0


def test_beams_are_rows():
    model, inputs = subject("llama")
    recorder, scores = Recorder("decoder.0.output"), Scores()
    calls = Calls(lambda call: call.batch_size)
    with geohooks.instrument(model, [recorder, scores, calls]):
        model.generate(**inputs, max_new_tokens=2, num_beams=3)
    assert calls.seen == [6, 6]
    assert {len(value) for value in recorder.at("decoder.0.output")} == {6}
    torch.testing.assert_close(scores.heard[0].logsumexp(-1), torch.zeros(6), atol=1e-5, rtol=0)


def test_generation_is_known_inside_and_unknown_outside():
    model, inputs = subject("llama")
    calls = Calls(lambda call: (call.generation, call.step, call.past if isinstance(call.past, int) else None))
    with geohooks.instrument(model, [calls]):
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            model(**inputs)
    generations = [seen[0] for seen in calls.seen]
    assert [seen[1] for seen in calls.seen] == [0, 1, 2, 0, 1, 2, None]
    assert [seen[2] for seen in calls.seen] == [0, 8, 9, 0, 8, 9, 0]
    assert len({id(one) for one in generations[:6]}) == 2
    assert generations[6] is None


def test_the_arguments_of_generate_may_be_positional():
    model, inputs = subject("llama")
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    bare = model.generate(inputs["input_ids"], config)
    scores = Scores()
    with geohooks.instrument(model, [scores]) as host:
        assert torch.equal(model.generate(inputs["input_ids"], config), bare)
        assert torch.equal(host.generate(inputs["input_ids"], config), bare)
    assert len(scores.heard) == 6


# Scores


def force(token):
    def change(scores):
        return scores.new_full(scores.shape, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    return change


@pytest.mark.parametrize("through", ["model", "host"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_scores_are_heard_and_edited_whoever_calls(through, family):
    model, inputs = subject(family)
    scores, after = Scores(force(42)), Scores(name="after")
    with geohooks.instrument(model, [scores, after]) as host:
        generate = model.generate if through == "model" else host.generate
        tokens = generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert (tokens[:, -3:] == 42).all()
    assert len(scores.heard) == len(after.heard) == 3
    assert same(after.heard[0], force(42)(scores.heard[0]))
    assert [len(row[0]) for row in scores.tokens] == ([8, 9, 10] if family == "llama" else [1, 2, 3])


def test_scores_are_the_logits_of_the_call_that_gave_them():
    model, inputs = subject("llama")
    seen = []

    class Compares(Plugin):
        @hookimpl
        def on_logits(self, event):
            event.call.share["last"] = event.value[:, -1].clone()

        @hookimpl
        def on_scores(self, event):
            seen.append(same(event.call.share["last"].float(), event.value))

    with geohooks.instrument(model, [Compares()]):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert seen == [True] * 3


def test_an_edit_of_the_logits_reaches_the_scores():
    model, inputs = subject("llama")
    with geohooks.instrument(model, [Editor("logits", lambda x: x * 0 + torch.eye(99)[42])]):
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert (tokens[:, 8:] == 42).all()


class Bans(LogitsProcessor):
    def __init__(self, token):
        self.token = token
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.clone())
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


@pytest.mark.parametrize("kind", [list, LogitsProcessorList])
def test_processors_of_the_user_run_before_the_plugins(kind):
    model, inputs = subject("llama")
    mine = Bans(17)
    given = kind([mine])
    scores = Scores()
    with geohooks.instrument(model, [scores]):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, logits_processor=given, min_new_tokens=2)
    assert len(mine.seen) == len(scores.heard) == 2
    assert all((heard[:, 17] == -torch.inf).all() for heard in scores.heard)
    assert list(given) == [mine]


def test_scores_are_heard_before_sampling_warps_them():
    model, inputs = subject("llama")
    scores, logits = Scores(), Recorder("logits")
    with geohooks.instrument(model, [scores, logits]):
        model.generate(**inputs, max_new_tokens=2, do_sample=True, temperature=0.5, top_k=5)
    for heard, value in zip(scores.heard, logits.at("logits"), strict=True):
        assert heard.shape == (2, 99)
        assert not value[:, -1].isinf().any()


def test_two_hosts_hear_the_same_generation():
    model, inputs = subject("llama")
    outer, inner = Scores(), Scores(force(5))
    with geohooks.instrument(model, [inner]), geohooks.instrument(model, [outer]):
        tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert (tokens[:, 8:] == 5).all()
    assert len(inner.heard) == len(outer.heard) == 2
    assert outer.steps == inner.steps


def test_a_generation_inside_a_plugin_does_not_disturb_the_outer_one():
    model, inputs = subject("llama")

    class Looks(Plugin):
        def __init__(self):
            self.steps = []
            self.ahead = []

        @hookimpl
        def on_attach(self, host):
            self.host = host

        @hookimpl
        def sites(self):
            return []

        @hookimpl
        def on_scores(self, event):
            self.steps.append(event.call.step)
            with self.host.paused():
                self.ahead.append(self.host.generate(event.input_ids, max_new_tokens=2, do_sample=False))

    looks = Looks()
    bare = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with geohooks.instrument(model, [looks]):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), bare)
    assert looks.steps == [0, 1, 2, 3]
    assert torch.equal(looks.ahead[0], bare[:, :10])


def test_an_exception_in_generate_ends_the_generation():
    model, inputs = subject("llama")

    class Stops(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError

    calls = Calls(lambda call: call.step)
    with geohooks.instrument(model, [calls]):
        with pytest.raises(KeyError):
            model.generate(**inputs, max_new_tokens=3, logits_processor=[Stops()])
        with torch.no_grad():
            model(**inputs)
    assert calls.seen == [0, None]


def test_streaming_and_early_stops_are_heard_to_the_end():
    model, inputs = subject("llama")
    calls = Calls()
    with geohooks.instrument(model, [Scores(force(1)), calls]):
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=1)
    assert tokens.shape[1] == 9
    assert len(calls.ended) == 1


def test_drafts_that_are_rejected_are_at_their_positions():
    model, _ = subject("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"max_new_tokens": 5, "do_sample": False}
    bare = model.generate(input_ids=ids, **options)
    recorder = Recorder("decoder.0.input")
    with geohooks.instrument(model, [recorder]):
        tokens = model.generate(input_ids=ids, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(tokens, bare)
    embedded = model.model.embed_tokens.weight
    last = {}
    for record in recorder.records:
        for index, position in enumerate(record.positions[0].tolist()):
            last[position] = record.value[0, index]
    for position in range(tokens.shape[1] - 1):
        assert same(last[position], embedded[tokens[0, position]].detach())


def test_targets_inside_a_generation_are_not_known():
    model, inputs = subject("llama")
    look = Logits(lambda event: event.targets)
    with geohooks.instrument(model, [look]):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [targets.tolist() for targets in look.seen] == [[[-100], [-100]]] * 2
