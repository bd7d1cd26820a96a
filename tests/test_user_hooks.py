"""Hooks and methods that users put on the model themselves survive hosts, and hosts survive each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Calls, Editor, Logits, Recorder, Scores, hook_count, logits_of, same, state_of

import geohooks
from geohooks import Plugin, hookimpl, zoo


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


# Hooks of the user


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("leaves_first", ["host", "user"])
def test_hooks_of_the_user_survive_and_run_after_ours(late, leaves_first):
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    layer = model.model.layers[0]
    order = []

    class Ours(Plugin):
        @hookimpl
        def sites(self):
            return ["decoder.0.input", "decoder.0.output"]

        @hookimpl
        def on_hidden(self, event):
            order.append(f"our {event.site.kind}")

    def theirs():
        return [
            layer.register_forward_pre_hook(lambda m, a: order.append("their input")),
            layer.register_forward_pre_hook(lambda m, a, k: order.append("their input kw"), with_kwargs=True),
            layer.register_forward_hook(lambda m, a, o: order.append("their output")),
            layer.register_forward_hook(lambda m, a, k, o: order.append("their output kw"), with_kwargs=True),
            layer.register_forward_hook(lambda m, a, o: order.append("their always"), always_call=True),
        ]

    handles = [] if late else theirs()
    host = geohooks.instrument(model, [Ours()])
    handles = handles or theirs()
    run(model, inputs)
    own = ["their input", "their input kw", "their output", "their output kw", "their always"]
    assert order == ["our input", *own[:2], "our output", *own[2:]]
    order.clear()
    if leaves_first == "host":
        host.detach()
        run(model, inputs)
        assert order == own
        for handle in handles:
            handle.remove()
    else:
        for handle in handles:
            handle.remove()
        run(model, inputs)
        assert order == ["our input", "our output"]
        host.detach()
    order.clear()
    run(model, inputs)
    assert order == []
    assert hook_count(model) == 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_hooks_run_ours_first_however_everybody_came(data):
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model, batch=1, length=2)
    layer = model.model.layers[0]
    order = []
    ours, theirs = [], []

    class Ours(Plugin):
        @hookimpl
        def sites(self):
            return ["decoder.0.output"]

        @hookimpl
        def on_hidden(self, event):
            order.append(self.name)

    for step in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["host", "hook", "leave", "detach"]))
        if what == "host":
            plugin = Ours()
            plugin.name = f"host{step}"
            ours.append((plugin.name, geohooks.instrument(model, [plugin])))
        elif what == "hook":
            name = f"hook{step}"
            theirs.append((name, layer.register_forward_hook(lambda m, a, o, name=name: order.append(name))))
        elif what == "detach" and ours:
            ours.pop(data.draw(st.integers(0, len(ours) - 1)))[1].detach()
        elif what == "leave" and theirs:
            theirs.pop(data.draw(st.integers(0, len(theirs) - 1)))[1].remove()
    run(model, inputs)
    assert order == [name for name, _ in ours] + [name for name, _ in theirs]
    for _, one in ours:
        one.detach()
    for _, one in theirs:
        one.remove()
    assert hook_count(model) == 0


def test_a_user_who_edits_after_us_is_not_undone():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    handle = model.model.layers[0].register_forward_hook(lambda m, a, output: output * 2)
    edited = run(model, inputs)
    recorder = Recorder(["decoder.0.output", "decoder.1.input"])
    with geohooks.instrument(model, [recorder]):
        assert same(run(model, inputs), edited)
    assert same(recorder.at("decoder.0.output")[0] * 2, recorder.at("decoder.1.input")[0])
    handle.remove()


def test_a_generate_that_the_user_put_there_survives():
    model = zoo.untrained("llama")
    calls = []
    original = model.generate

    def mine(*args, **kwargs):
        calls.append("mine")
        return original(*args, **kwargs)

    model.generate = mine
    with geohooks.instrument(model, [Scores()]) as host:
        model.generate(**zoo.example_inputs(model), max_new_tokens=2, do_sample=False)
        assert calls == ["mine"]
        assert host["scores"].steps
    assert model.generate is mine


def test_a_generate_that_the_user_puts_there_later_stays():
    model = zoo.untrained("llama")
    host = geohooks.instrument(model, [Scores()])
    other = geohooks.instrument(model, [Scores()])
    model.generate = "theirs"
    host.detach()
    other.detach()
    assert model.generate == "theirs"
    del model.generate
    assert "__reduce_ex__" not in model.__dict__


# Two hosts


@pytest.mark.parametrize("first", [0, 1])
def test_two_hosts_hear_in_order_of_attachment_and_leave_in_any_order(first):
    model = zoo.untrained("qwen3_moe")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    before = state_of(model)
    recorders = [Recorder(), Recorder()]
    hosts = [geohooks.instrument(model, [recorder]) for recorder in recorders]
    assert same(run(model, inputs), bare)
    assert recorders[0].heard() == recorders[1].heard()
    hosts[first].detach()
    heard = len(recorders[first].records)
    assert same(run(model, inputs), bare)
    assert (len(recorders[first].records), len(recorders[1 - first].records)) == (heard, 2 * heard)
    hosts[1 - first].detach()
    assert state_of(model) == before


def test_two_hosts_that_edit_compose_in_order_of_attachment():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    site = "decoder.0.output"
    with geohooks.instrument(model, [Editor(site, lambda h: h * 2, "a"), Editor(site, lambda h: h + 1, "b")]):
        together = run(model, inputs)
    with (
        geohooks.instrument(model, [Editor(site, lambda h: h * 2)]),
        geohooks.instrument(model, [Editor(site, lambda h: h + 1)]),
    ):
        assert same(run(model, inputs), together)
    with geohooks.instrument(model, [Editor("logits", lambda x: x * 2)]):
        recorder = Recorder("logits")
        with geohooks.instrument(model, [recorder]):
            output = run(model, inputs)
        assert same(recorder.at("logits")[0], output)
        assert not same(output, run(zoo.untrained("llama"), inputs))


def test_a_host_in_a_host_hears_the_call_too():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    outer, inner = Calls(), Logits(lambda event: event.call)
    with geohooks.instrument(model, [outer]), geohooks.instrument(model, [inner]):
        run(model, inputs)
    assert len(outer.ended) == len(inner.seen) == 1
    assert outer.ended[0] is not inner.seen[0]
