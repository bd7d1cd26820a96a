"""Assigning `event.value` edits the model's own computation, exactly as a hook written by hand does."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Editor, Logits, Recorder, Scores, gradients, logits_of, raw_edit, same

import geohooks
from geohooks import Plugin, PluginError, hookimpl, zoo
from geohooks.sites import HIDDEN_KINDS

FAMILIES = zoo.families()


@cache
def subject(family, **config):
    model = zoo.untrained(family, **config)
    return model, zoo.example_inputs(model)


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


@cache
def hidden_sites(family):
    return [site for site in geohooks.instrument(subject(family)[0]).anatomy.sites if site.kind in HIDDEN_KINDS]


def bend(hidden):
    return hidden * 1.25 + 0.5 * hidden.roll(1, -1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_edit_equals_the_same_edit_by_a_hook_written_by_hand(data):
    family = data.draw(st.sampled_from(FAMILIES))
    model, inputs = subject(family)
    site = data.draw(st.sampled_from(hidden_sites(family)))
    tap = geohooks.instrument(model).anatomy.tap(site)
    bare = run(model, inputs)
    with geohooks.instrument(model, [Editor(str(site), bend)]):
        edited = run(model, inputs)
    with raw_edit(tap.module, bend, before=tap.side == "input"):
        assert same(run(model, inputs), edited)
    assert not same(edited, bare)
    assert same(run(model, inputs), bare)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_edits_at_many_sites_equal_hooks_at_all_of_them(data):
    family = data.draw(st.sampled_from(FAMILIES))
    model, inputs = subject(family)
    anatomy = geohooks.instrument(model).anatomy
    sites = data.draw(st.lists(st.sampled_from(hidden_sites(family)), min_size=2, max_size=5, unique=True))
    with geohooks.instrument(model, [Editor(sites, bend)]):
        edited = run(model, inputs)
    with ExitStack() as stack:
        for site in sites:
            tap = anatomy.tap(site)
            stack.enter_context(raw_edit(tap.module, bend, before=tap.side == "input"))
        assert same(run(model, inputs), edited)


def test_the_next_plugin_sees_the_edit():
    model, inputs = subject("llama")
    before, after = Recorder("decoder.0.output", "before"), Recorder("decoder.0.output", "after")
    with geohooks.instrument(model, [before, Editor("decoder.0.output", bend), after]):
        run(model, inputs)
    assert same(bend(before.at("decoder.0.output")[0]), after.at("decoder.0.output")[0])


def test_a_value_assigned_back_is_no_edit():
    model, inputs = subject("llama")
    bare = run(model, inputs)

    class Back(Plugin):
        @hookimpl
        def on_hidden(self, event):
            kept = event.value
            event.value = kept * 2
            event.value = kept

    with geohooks.instrument(model, [Back()]):
        assert same(run(model, inputs), bare)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_an_edit_is_visible_in_the_models_own_hidden_states(family):
    model = zoo.untrained(family)
    inputs = zoo.example_inputs(model)
    recorder = Recorder("decoder.1.input")
    with (
        geohooks.instrument(model, [Editor(["decoder.0.input", "decoder.0.output"], bend), recorder]),
        torch.no_grad(),
    ):
        states = model(**inputs, output_hidden_states=True).hidden_states
        again = model(**inputs, output_hidden_states=True).hidden_states
    assert same(states[1], recorder.at("decoder.1.input")[0])
    assert same(again[1], states[1])
    assert not same(states[1], model(**inputs, output_hidden_states=True).hidden_states[1].detach())


def test_an_edit_carries_gradient_to_what_it_was_made_of():
    model, inputs = subject("llama")
    direction = torch.zeros(32, requires_grad=True)
    with geohooks.instrument(model, [Editor("decoder.0.output", lambda h: h + direction)]):
        model(**inputs).logits.logsumexp(-1).sum().backward()
    model.zero_grad()
    assert direction.grad is not None
    assert direction.grad.abs().sum() > 0


BAD = {
    "shape": lambda value: value[:, :1],
    "dtype": lambda value: value.double(),
    "None": lambda value: None,
    "list": lambda value: value.tolist(),
    "device": lambda value: value.to("meta"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("family", "site"), [("llama", "decoder.0.output"), ("qwen3_moe", "decoder.0.router"), ("llama", "logits")]
)
def test_what_the_model_could_not_take_is_refused(bad, family, site):
    model, inputs = subject(family)
    bare = run(model, inputs)
    with geohooks.instrument(model, [Editor(site, BAD[bad])]), pytest.raises(PluginError, match=f"'{site}' was"):
        run(model, inputs)
    assert same(run(model, inputs), bare)


@pytest.mark.parametrize("bad", ["shape", "dtype", "None"])
def test_scores_that_generate_could_not_take_are_refused(bad):
    model, inputs = subject("llama")
    with geohooks.instrument(model, [Scores(BAD[bad])]), pytest.raises(PluginError, match="'scores' was"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("family", "hook"), [("llama", "on_hidden"), ("qwen3_moe", "on_router"), ("llama", "on_logits")]
)
def test_who_edits_must_say_where(family, hook):
    class Anywhere(Plugin):
        pass

    def edit(self, event):
        event.value = event.value * 2

    edit.__name__ = hook
    setattr(Anywhere, hook, hookimpl(edit))
    model, inputs = subject(family)
    with geohooks.instrument(model, [Anywhere()]), pytest.raises(PluginError, match="does not say which sites"):
        run(model, inputs)


def test_an_attention_call_can_not_be_edited():
    class Edits(Plugin):
        @hookimpl
        def sites(self):
            return "decoder.0.pattern"

        @hookimpl
        def on_attention(self, event):
            event.value = event.value * 2

    model, inputs = subject("llama")
    with geohooks.instrument(model, [Edits()]), pytest.raises(PluginError, match=r"decoder\.0\.attention"):
        run(model, inputs)


# Routers


def by_hand(family, site, change):
    """The router's decision made anew from changed logits, in plain torch."""
    block = geohooks.instrument(subject(family)[0]).anatomy.block(site)
    router = block.experts.router

    def on_output(module, args, output):
        logits = change(output[0])
        if family == "gpt_oss":
            top, indices = logits.topk(2, -1)
            return logits, top.softmax(-1), indices
        weights, indices = logits.float().softmax(-1).topk(2, -1)
        if family in ("qwen3_moe", "mixtral"):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(output[1].dtype), indices

    return router.register_forward_hook(on_output)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss"])
def test_an_edit_of_the_router_routes_by_the_rule_of_the_family(family):
    model, inputs = subject(family)
    site = geohooks.Site("decoder", 0, "router")
    before, after = Recorder(str(site), "before"), []

    class After(Plugin):
        @hookimpl
        def on_router(self, event):
            if event.site == site:
                after.append((event.value, event.indices, event.weights, event.probabilities, event.scores))

    with geohooks.instrument(model, [before, Editor(str(site), lambda x: -2 * x), After()]):
        edited = run(model, inputs)
    handle = by_hand(family, site, lambda x: -2 * x)
    torch.testing.assert_close(run(model, inputs), edited, rtol=1e-6, atol=1e-6)
    handle.remove()
    assert not torch.allclose(edited, run(model, inputs))
    value, indices, weights, probabilities, scores = after[0]
    assert same(value, -2 * before.at(str(site))[0])
    assert torch.equal(indices.sort(-1).values, value.topk(2, -1).indices.sort(-1).values)
    assert indices.shape == weights.shape == (2, 8, 2)
    torch.testing.assert_close(probabilities, value.softmax(-1))
    torch.testing.assert_close(scores.gather(-1, indices), scores.topk(2, -1).values)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_router_that_is_given_its_own_logits_changes_nothing(family):
    model, inputs = subject(family)
    with geohooks.instrument(model, [Editor("decoder.*.router", lambda x: x.clone())]):
        edited = run(model, inputs)
    assert same(edited, run(model, inputs))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_an_edited_router_has_a_gradient(family):
    model, inputs = subject(family)
    push = torch.zeros(8, requires_grad=True)
    with geohooks.instrument(model, [Editor("decoder.*.router", lambda x: x + push)]):
        model(**inputs).logits.logsumexp(-1).sum().backward()
    model.zero_grad()
    assert push.grad.abs().sum() > 0


# Logits and the loss


def sharper(logits):
    return logits * 1.5 + logits.roll(1, -1)


def labelled(family, model):
    inputs = zoo.example_inputs(model)
    if family == "vit":
        return inputs, torch.tensor([3, 7])
    labels = zoo.example_inputs(model, seed=5)["input_ids"]
    labels[0, :3] = -100
    return inputs, labels


def expected_loss(family, logits, labels):
    if family in ("t5", "bert", "vit"):
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3", "bert", "t5", "vit"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_follows_an_edit_of_the_logits(family, return_dict):
    model = zoo.untrained(family)
    inputs, labels = labelled(family, model)
    bare = run(model, inputs)
    with geohooks.instrument(model, [Editor("logits", sharper)]):
        output = model(**inputs, labels=labels, return_dict=return_dict)
    loss, logits = (output.loss, output.logits) if return_dict else output[:2]
    assert isinstance(output, tuple) != return_dict
    torch.testing.assert_close(logits, sharper(bare))
    torch.testing.assert_close(loss, expected_loss(family, logits, labels))
    loss.backward()
    edited = gradients(model)
    expected_loss(family, sharper(logits_of(model(**inputs))), labels).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(edited[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_auxiliary_loss_stays_when_the_logits_are_edited(return_dict):
    model, inputs = subject("qwen3_moe", router_aux_loss_coef=0.5)
    labels = inputs["input_ids"]
    options = {"labels": labels, "output_router_logits": True, "return_dict": return_dict}
    bare = model(**inputs, labels=labels, output_router_logits=True)
    plain = model(**inputs, labels=labels).loss
    auxiliary = bare.loss - plain
    assert auxiliary > 0.1
    recorder = Recorder("logits")
    with geohooks.instrument(model, [Editor("logits", sharper), recorder]):
        output = model(**inputs, **options)
    loss, logits = (output.loss, output.logits) if return_dict else (output[0], recorder.at("logits")[0])
    torch.testing.assert_close(loss, expected_loss("qwen3_moe", logits, labels) + auxiliary)
    if not return_dict:
        assert any(isinstance(item, torch.Tensor) and same(item.detach(), logits) for item in output)


@pytest.mark.parametrize("return_dict", [True, False])
def test_router_logits_asked_for_without_labels_do_not_hide_the_logits(return_dict):
    model, inputs = subject("qwen3_moe")
    bare = run(model, inputs)
    recorder = Recorder("logits")
    with geohooks.instrument(model, [recorder]), torch.no_grad():
        model(**inputs, output_router_logits=True, return_dict=return_dict)
    assert same(recorder.at("logits")[0], bare)


def test_a_loss_that_is_not_known_makes_the_edit_an_error():
    model, inputs = subject("llama")

    class Unknown(type(geohooks.instrument(model).anatomy.adapter)):
        def loss(self, model, logits, inputs):
            return None

    with geohooks.instrument(model, [Editor("logits", sharper)], adapter=Unknown(model.config)):
        run(model, inputs)
        with pytest.raises(PluginError, match="without labels"):
            model(**inputs, labels=inputs["input_ids"])


def test_statistics_follow_the_edit():
    model, inputs = subject("llama")
    first, second = (Logits(lambda event: event.stats.entropy, name) for name in ("first", "second"))
    with geohooks.instrument(model, [first, Editor("logits", lambda x: x * 0), second]):
        run(model, inputs)
    torch.testing.assert_close(second.seen[0], torch.full((2, 8), 99.0).log())
    assert (first.seen[0] < second.seen[0]).all()


def test_positions_kept_by_the_model_alone_are_the_last_ones():
    model, inputs = subject("llama")
    look = Logits(lambda event: (event.value.shape[1], event.positions, event.targets))
    with geohooks.instrument(model, [look]), torch.no_grad():
        model(**inputs, logits_to_keep=3)
    count, positions, targets = look.seen[0]
    assert count == 3
    assert positions.tolist() == [[5, 6, 7]] * 2
    assert targets.tolist() == [[*row[6:].tolist(), -100] for row in inputs["input_ids"]]
