"""What a call knows of its forward pass: inputs, tokens, positions, mask, targets."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Calls, Logits, Recorder

import geohooks
from geohooks import Plugin, hookimpl, measures, zoo
from geohooks.events import LogitsEvent


def look_at(model, look, *args, **inputs):
    """What `look` says of the one call."""
    calls = Calls(look)
    with geohooks.instrument(model, [calls]), torch.no_grad():
        model(*args, **inputs)
    (seen,) = calls.seen
    return seen


def targets_of(model, **inputs):
    looks = Logits(lambda event: event.targets)
    with geohooks.instrument(model, [looks]), torch.no_grad():
        model(**inputs)
    (seen,) = looks.seen
    return seen


@pytest.fixture
def llama():
    return zoo.untrained("llama")


@pytest.fixture
def ids(llama):
    return zoo.example_inputs(llama)["input_ids"]


# Inputs


def test_inputs_are_known_by_name_however_they_were_given(llama, ids):
    mask = torch.ones_like(ids)
    for args, kwargs in [((ids, mask), {}), ((ids,), {"attention_mask": mask}), ((), {"input_ids": ids})]:
        call_inputs, tokens = look_at(llama, lambda call: (call.inputs, call.token_ids), *args, **kwargs)
        assert call_inputs["input_ids"] is ids
        assert tokens is ids
        assert ("attention_mask" in call_inputs) == (bool(kwargs.get("attention_mask") is mask) or len(args) == 2)


def test_a_call_knows_its_training_labels_and_mask(llama, ids):
    mask = torch.ones_like(ids)
    seen = look_at(
        llama,
        lambda call: (call.training, call.labels, call.attention_mask, call.batch_size, call.generation, call.step),
        input_ids=ids,
        labels=ids,
        attention_mask=mask,
    )
    assert seen[0] is False
    assert seen[1] is ids
    assert seen[2] is mask
    assert seen[3:] == (2, None, None)
    llama.train()
    assert look_at(llama, lambda call: call.training, input_ids=ids)
    assert look_at(llama, lambda call: (call.labels, call.attention_mask, call.reference), input_ids=ids) == (
        None,
        None,
        None,
    )


def test_the_output_is_known_while_the_call_ends_and_not_kept_after(llama, ids):
    calls = Calls(lambda call: call.output.logits.shape)
    with geohooks.instrument(llama, [calls]), torch.no_grad():
        llama(input_ids=ids)
    assert calls.seen == [(2, 8, 99)]
    assert calls.ended[0].output is None


def test_what_one_plugin_leaves_another_finds_in_that_call_alone(llama, ids):
    found = []

    class Leaves(Plugin):
        @hookimpl
        def sites(self):
            return "decoder.0.output"

        @hookimpl
        def on_hidden(self, event):
            assert event.call.share == {}
            event.call.share["norm"] = event.value.norm()

    class Finds(Plugin):
        @hookimpl
        def on_logits(self, event):
            found.append(event.call.share["norm"])

    with geohooks.instrument(llama, [Finds(), Leaves()]), torch.no_grad():
        for seed in range(2):
            llama(**zoo.example_inputs(llama, seed=seed))
    assert len(found) == 2
    assert not torch.equal(*found)


def test_a_vision_model_has_patches_and_classes():
    model = zoo.untrained("vit")
    inputs = zoo.example_inputs(model, batch=3)
    recorder = Recorder()
    calls = Calls(lambda call: (call.token_ids, call.positions("vision"), call.batch_size))
    with geohooks.instrument(model, [recorder, calls]), torch.no_grad():
        model(**inputs)
    assert calls.seen == [(None, None, 3)]
    assert {record.positions for record in recorder.records} == {None}
    assert targets_of(model, **inputs) is None
    labels = torch.tensor([1, 2, 3])
    assert torch.equal(targets_of(model, **inputs, labels=labels), labels)


# Positions


def test_positions_are_counted_where_none_are_given(llama, ids):
    assert look_at(llama, lambda call: call.positions("decoder"), input_ids=ids).tolist() == [list(range(8))] * 2


def test_positions_are_those_of_a_packed_batch(llama, ids):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    given_ids = ids[:1]
    seen = look_at(
        llama, lambda call: call.positions("decoder"), input_ids=given_ids, position_ids=positions, use_cache=False
    )
    assert torch.equal(seen, positions)
    shared = look_at(llama, lambda call: call.positions("decoder"), input_ids=ids, position_ids=torch.arange(8)[None])
    assert shared.tolist() == [list(range(8))] * 2


def test_positions_of_a_pair_are_those_of_each_stack():
    model = zoo.untrained("t5")
    inputs = zoo.example_inputs(model, length=5)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :3].contiguous()
    seen = look_at(
        model,
        lambda call: (call.positions("encoder"), call.positions("decoder"), call.mask("encoder"), call.mask()),
        **inputs,
    )
    assert [value.shape for value in seen] == [(2, 5), (2, 3), (2, 5), (2, 3)]
    labelled = look_at(
        model,
        lambda call: (call.positions("encoder").shape, call.positions("decoder").shape),
        input_ids=inputs["input_ids"],
        labels=inputs["decoder_input_ids"],
    )
    assert labelled == ((2, 5), (2, 3))


def test_tokens_of_a_pair_are_those_of_the_decoder():
    model = zoo.untrained("t5")
    inputs = zoo.example_inputs(model)
    assert look_at(model, lambda call: call.token_ids, **inputs) is inputs["decoder_input_ids"]


# Masks


def test_the_mask_says_what_is_a_token(llama, ids):
    assert look_at(llama, lambda call: call.mask(), input_ids=ids).all()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert torch.equal(look_at(llama, lambda call: call.mask(), input_ids=ids, attention_mask=mask), mask.bool())


def test_the_mask_of_a_cached_pass_is_that_of_its_own_tokens(llama, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    past = transformers.DynamicCache(config=llama.config)
    calls = Calls(lambda call: (call.mask(), call.positions("decoder")))
    with geohooks.instrument(llama, [calls]), torch.no_grad():
        llama(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=past)
        llama(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=past)
    assert torch.equal(calls.seen[0][0], mask[:, :6].bool())
    assert calls.seen[1][0].tolist() == [[True, True]] * 2
    assert calls.seen[1][1].tolist() == [[6, 7]] * 2


# Targets


def shifted(rows):
    return [[*row[1:], -100] for row in rows]


def test_targets_are_the_next_tokens(llama, ids):
    assert targets_of(llama, input_ids=ids).tolist() == shifted(ids.tolist())


def test_targets_are_the_labels_shifted(llama, ids):
    labels = ids.flip(1).contiguous()
    labels[1, :4] = -100
    assert targets_of(llama, input_ids=ids, labels=labels).tolist() == shifted(labels.tolist())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_padding_is_no_target_and_has_none(data):
    model = zoo.untrained("llama")
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    left = data.draw(st.booleans())
    ids = zoo.example_inputs(model, batch=len(lengths), length=6)["input_ids"]
    mask = torch.tensor([[0] * (6 - n) + [1] * n if left else [1] * n + [0] * (6 - n) for n in lengths])
    targets = targets_of(model, input_ids=ids, attention_mask=mask).tolist()
    for row, wanted in enumerate(targets):
        for position in range(6):
            known = position < 5 and mask[row, position] and mask[row, position + 1]
            assert wanted[position] == (ids[row, position + 1] if known else -100)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_another_packed_document_is_no_target(lengths):
    model = zoo.untrained("llama")
    ids = zoo.example_inputs(model, batch=1, length=sum(lengths))["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    targets = targets_of(model, input_ids=ids, position_ids=positions, use_cache=False)[0].tolist()
    starts = {sum(lengths[:index]) for index in range(len(lengths) + 1)}
    for position, target in enumerate(targets):
        assert target == (-100 if position + 1 in starts else ids[0, position + 1])


def test_targets_of_a_pair_are_its_labels_as_they_stand():
    model = zoo.untrained("t5")
    inputs = zoo.example_inputs(model)
    labels = inputs["decoder_input_ids"]
    assert torch.equal(targets_of(model, input_ids=inputs["input_ids"], labels=labels), labels)
    assert targets_of(model, **inputs).tolist() == shifted(labels.tolist())


def test_targets_of_a_masked_model_are_its_labels_alone():
    model = zoo.untrained("bert")
    ids = zoo.example_inputs(model)["input_ids"]
    assert targets_of(model, input_ids=ids) is None
    assert torch.equal(targets_of(model, input_ids=ids, labels=ids), ids)


def test_targets_of_a_classifier_are_its_labels():
    whole = zoo.untrained("llama")
    model = transformers.LlamaForSequenceClassification(whole.config).eval()
    ids = zoo.example_inputs(whole)["input_ids"]
    labels = torch.tensor([1, 0])
    assert torch.equal(targets_of(model, input_ids=ids, labels=labels), labels)
    assert targets_of(model, input_ids=ids) is None
    positions = []
    with geohooks.instrument(model, [Logits(lambda event: positions.append(event.positions))]), torch.no_grad():
        model(input_ids=ids)
    assert positions == [None]


def test_targets_and_embeddings_in_the_place_of_tokens(llama, ids):
    assert targets_of(llama, inputs_embeds=llama.model.embed_tokens(ids).detach()) is None


def test_the_nll_is_the_loss_of_the_model(llama, ids):
    labels = ids.clone()
    labels[0, :4] = -100
    looks = Logits(lambda event: event.stats.nll)
    with geohooks.instrument(llama, [looks]), torch.no_grad():
        loss = llama(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(looks.seen[0].nanmean(), loss)


def test_a_model_that_shifts_its_labels_before_has_the_same_targets(llama, ids):
    ahead = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    looks = Logits(lambda event: (event.targets, event.stats.nll))
    with geohooks.instrument(llama, [looks]), torch.no_grad():
        loss = llama(input_ids=ids, labels=ids, shift_labels=ahead).loss
    targets, nll = looks.seen[0]
    assert torch.equal(targets, ahead)
    torch.testing.assert_close(nll.nanmean(), loss)


# Statistics are computed once


def counted(monkeypatch, name):
    import geohooks.events as events

    calls = []
    original = getattr(measures, name)

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(events, name, counting)
    return calls


def test_statistics_are_computed_once_whoever_asks(llama, ids, monkeypatch):
    calls = counted(monkeypatch, "logit_stats")
    looks = [Logits(lambda event: event.stats, f"look{index}") for index in range(3)]
    quiet = Logits(lambda event: None, "quiet")
    with geohooks.instrument(llama, [*looks, quiet]), torch.no_grad():
        llama(input_ids=ids)
    assert len(calls) == 1
    assert looks[0].seen[0] is looks[1].seen[0] is looks[2].seen[0]
    with geohooks.instrument(llama, [quiet]), torch.no_grad():
        llama(input_ids=ids)
    assert len(calls) == 1


def test_a_comparison_gives_the_statistics_too(llama, ids, monkeypatch):
    stats, comparisons = counted(monkeypatch, "logit_stats"), counted(monkeypatch, "compare_logits")
    base = zoo.untrained("llama", seed=1)
    looks = Logits(lambda event: (event.comparison, event.stats, event.comparison))
    with geohooks.instrument(llama, [looks], reference=base), torch.no_grad():
        llama(input_ids=ids)
    comparison, own, again = looks.seen[0]
    assert comparison is again
    assert own is comparison.tuned
    assert (len(stats), len(comparisons)) == (0, 1)


def test_without_a_reference_there_is_no_comparison(llama, ids):
    looks = Logits(lambda event: event.comparison)
    with geohooks.instrument(llama, [looks]), torch.no_grad():
        llama(input_ids=ids)
    assert looks.seen == [None]


def test_events_have_a_site_a_call_and_a_value(llama, ids):
    events = []
    with geohooks.instrument(llama, [Logits(events.append)]), torch.no_grad():
        llama(input_ids=ids)
    (event,) = events
    assert isinstance(event, LogitsEvent)
    assert str(event.site) == "logits"
    assert event.call.anatomy.model is llama
    assert event.value.shape == (2, 8, 99)
