"""The weights of an attention call, computed when asked, are those of the model's own eager attention."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Recorder, logits_of, same

import geohooks
from geohooks import AttentionEvent, Plugin, Site, hookimpl, zoo
from geohooks.events import AttentionEvent as Event

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gpt2", "bert", "t5", "vit"]


class Attends(Plugin):
    """Keeps weights, sink weights and arguments by site."""

    name = "attends"

    def __init__(self):
        self.weights = {}
        self.sinks = {}
        self.events = []

    @hookimpl
    def on_attention(self, event):
        self.weights.setdefault(str(event.site), []).append(event.weights().detach())
        self.sinks.setdefault(str(event.site), []).append(event.sink_weight().detach())
        self.events.append(event)


@cache
def subject(family, implementation):
    model = zoo.untrained(family, attn_implementation=implementation)
    model.config._attn_implementation = implementation
    return model


def own_weights(family, **inputs):
    """The model's own eager weights by site, with its logits."""
    model = subject(family, "eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    if family == "t5":
        names = ("encoder.{}.pattern", "encoder_attentions"), ("decoder.{}.pattern", "decoder_attentions")
        names = (*names, ("decoder.{}.cross_pattern", "cross_attentions"))
    else:
        stack = geohooks.instrument(model).anatomy.main.name
        names = ((stack + ".{}.pattern", "attentions"),)
    return {form.format(layer): one for form, key in names for layer, one in enumerate(output[key])}


def heard(model, **inputs):
    attends = Attends()
    with torch.no_grad():
        bare = logits_of(model(**inputs))
        with geohooks.instrument(model, [attends]):
            assert same(logits_of(model(**inputs)), bare)
    return attends


def agree(attends, expected, mask=None):
    assert set(attends.weights) == set(expected)
    for site, (weights,) in attends.weights.items():
        own = expected[site]
        assert weights.shape == own.shape
        assert weights.dtype == torch.float32
        keep = slice(None) if mask is None else mask.bool()[:, None, :].expand(-1, own.shape[1], -1)
        torch.testing.assert_close(weights[keep], own[keep].float(), rtol=1e-4, atol=1e-6)
        (sink,) = attends.sinks[site]
        total = (weights.sum(-1) + sink)[keep]
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_own(family, implementation):
    if family == "gpt_oss" and implementation == "sdpa":
        implementation = "eager"
    inputs = zoo.example_inputs(family)
    attends = heard(subject(family, implementation), **inputs)
    agree(attends, own_weights(family, **inputs))


def test_sinks_take_what_the_weights_leave():
    attends = heard(subject("gpt_oss", "eager"), **zoo.example_inputs("gpt_oss"))
    assert all((sink > 0.01).all() for (sink,) in attends.sinks.values())
    others = heard(subject("llama", "sdpa"), **zoo.example_inputs("llama"))
    assert all((sink == 0).all() for (sink,) in others.sinks.values())


def test_a_sliding_window_hides_what_is_before_it():
    inputs = zoo.example_inputs("gpt_oss", length=24)
    attends = heard(subject("gpt_oss", "eager"), **inputs)
    agree(attends, own_weights("gpt_oss", **inputs))
    hidden = [site for site, (weights,) in attends.weights.items() if (weights[:, :, -1, :8] == 0).all()]
    assert len(hidden) == 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "bert", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_attended_to(family, side, implementation):
    implementation = "eager" if family == "gpt_oss" else implementation
    inputs = zoo.example_inputs(family)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    inputs["attention_mask"] = mask
    model = subject(family, implementation)
    attends = heard(model, **inputs)
    tokens = {"encoder": mask, "decoder": None if family == "t5" else mask}
    expected = own_weights(family, **inputs)
    for site, (weights,) in attends.weights.items():
        stack, _, kind = site.split(".")
        rows = tokens[stack]
        keys = mask if kind == "cross_pattern" or rows is not None else None
        real = slice(None) if rows is None else rows.bool()[:, None].expand(-1, weights.shape[1], -1)
        torch.testing.assert_close(weights[real], expected[site][real], rtol=1e-4, atol=1e-6)
        if keys is not None:
            seen = weights * (1 - keys[:, None, None]) if rows is None else weights * (1 - keys)[:, None, None]
            assert (seen[real] == 0).all()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_cached_step_has_the_last_rows_of_the_whole(data):
    family = data.draw(st.sampled_from(["llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "gpt2"]))
    model = subject(family, "eager" if family == "gpt_oss" else data.draw(st.sampled_from(["eager", "sdpa"])))
    ids = zoo.example_inputs(family, length=9)["input_ids"]
    cut = data.draw(st.integers(1, 8))
    whole = own_weights(family, input_ids=ids)
    attends = Attends()
    with geohooks.instrument(model, [attends]), torch.no_grad():
        first = model(input_ids=ids[:, :cut], use_cache=True)
        model(input_ids=ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
    for site, (before, after) in attends.weights.items():
        torch.testing.assert_close(before, whole[site][:, :, :cut, :cut], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after, whole[site][:, :, cut:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generation_has_the_rows_of_the_whole(cache_implementation):
    model = subject("llama", "sdpa")
    attends = Attends()
    options = {"cache_implementation": cache_implementation} if cache_implementation else {}
    with geohooks.instrument(model, [attends]):
        tokens = model.generate(
            **zoo.example_inputs("llama"), max_new_tokens=3, do_sample=False, eos_token_id=None, **options
        )
    whole = own_weights("llama", input_ids=tokens[:, :-1])
    for site, parts in attends.weights.items():
        start = 0
        for part in parts:
            stop = start + part.shape[2]
            torch.testing.assert_close(part[..., :stop], whole[site][:, :, start:stop, :stop], rtol=1e-4, atol=1e-6)
            assert (part[..., stop:] == 0).all()
            start = stop


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_packed_documents_do_not_attend_to_each_other(lengths):
    ids = zoo.example_inputs("llama", batch=1, length=sum(lengths))["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    attends = heard(subject("llama", "sdpa"), input_ids=ids, position_ids=positions, use_cache=False)
    agree(attends, own_weights("llama", input_ids=ids, position_ids=positions, use_cache=False))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    apart = document[:, None] != document[None, :]
    assert all((weights[:, :, apart] == 0).all() for (weights,) in attends.weights.values())


def test_a_long_query_is_computed_in_blocks_and_is_the_same():
    inputs = zoo.example_inputs("llama", batch=1, length=700)
    attends = heard(subject("llama", "sdpa"), **inputs)
    agree(attends, own_weights("llama", **inputs))


def test_an_event_has_the_arguments_of_the_call():
    attends = heard(subject("llama", "sdpa"), **zoo.example_inputs("llama"))
    event = attends.events[0]
    assert isinstance(event, AttentionEvent)
    assert event.query.shape == (2, 4, 8, 8)
    assert event.key.shape == event.value_states.shape == (2, 2, 8, 8)
    assert event.scaling == 8**-0.5
    assert event.bias is event.sinks is None
    assert event.value is event.query
    biased = heard(subject("t5", "sdpa"), **zoo.example_inputs("t5"))
    by_site = {str(event.site): event for event in biased.events}
    assert by_site["encoder.1.pattern"].bias.shape == (1, 4, 8, 8)
    assert by_site["decoder.0.pattern"].site == Site("decoder", 0, "pattern")


def test_weights_have_a_gradient():
    model = zoo.untrained("llama")

    class Concentration(Plugin):
        @hookimpl
        def sites(self):
            return ["decoder.1.pattern"]

        @hookimpl
        def on_attention(self, event):
            self.value = event.weights().square().sum(-1).mean()

    plugin = Concentration()
    with geohooks.instrument(model, [plugin]):
        model(**zoo.example_inputs(model))
    plugin.value.backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_half_precision_is_computed_in_single_and_double_in_double():
    inputs = zoo.example_inputs("llama")
    for dtype, computing in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        model = zoo.untrained("llama").to(dtype)
        attends = heard(model, **inputs)
        for (weights,) in attends.weights.values():
            assert weights.dtype == computing
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 8, dtype=computing), rtol=0, atol=1e-5)


def test_a_query_that_sees_no_key_has_zeros():
    states = torch.randn(3, 1, 2, 3, 4)
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])[None, None]
    for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        event = Event(
            Site("decoder", 0, "pattern"),
            None,
            tuple(states),
            form,
            0.5,
            bias=None,
            sinks=None,
            causal=False,
            recomputing=False,
        )
        assert (event.weights()[:, :, 1] == 0).all()
        torch.testing.assert_close(event.weights().sum(-1), torch.tensor([1.0, 0.0, 1.0]).expand(1, 2, 3))
        torch.testing.assert_close(event.weights()[:, :, 2], torch.softmax(states[0] @ states[1].mT * 0.5, -1)[:, :, 2])


def test_the_implementation_may_be_changed_under_a_host():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    recorder = Recorder("decoder.*.pattern")
    with geohooks.instrument(model, [recorder]), torch.no_grad():
        model(**inputs)
        model.set_attn_implementation("eager")
        output = model(**inputs, output_attentions=True)
    assert len(recorder.records) == 4
    for layer, own in enumerate(output.attentions):
        torch.testing.assert_close(recorder.at(f"decoder.{layer}.pattern")[1], own, rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert model(**inputs, output_attentions=True).attentions[0] is not None


def test_attention_heard_by_two_hosts_is_heard_by_each_once():
    model = zoo.untrained("llama")
    one, other = Recorder("decoder.0.pattern"), Recorder("decoder.*.pattern")
    config = model.model.layers[0].self_attn.config
    first = geohooks.instrument(model, [one])
    with geohooks.instrument(model, [other]), torch.no_grad():
        model(**zoo.example_inputs(model))
        first.detach()
        model(**zoo.example_inputs(model))
    assert one.heard() == ["decoder.0.pattern"]
    assert other.heard() == ["decoder.0.pattern", "decoder.1.pattern"] * 2
    assert model.model.layers[0].self_attn.config is config
