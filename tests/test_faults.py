"""Plugins that fail, and models that fail under plugins: what comes after is right."""

from __future__ import annotations

import logging

import pytest
import torch
from recorders import Calls, Editor, Recorder, Scores, hook_count, logits_of, same, state_of

import geohooks
from geohooks import GeohooksError, Plugin, hookimpl, zoo


class BrokenError(Exception):
    pass


def breaking(hook, error=BrokenError, sites="*", *, edits=False):
    """A plugin that fails in `hook`."""

    class Breaks(Plugin):
        name = "breaks"
        left = 0

        @hookimpl
        def on_detach(self, host):
            self.left += 1

    def fail(self, event):
        if edits:
            event.value = event.value * 3
        raise error(hook)

    def fail_in_call(self, call):
        raise error(hook)

    setattr(Breaks, hook, hookimpl(fail_in_call if hook.startswith("on_call") else fail))
    if edits:
        Breaks.sites = hookimpl(lambda self, anatomy: sites)
    return Breaks()


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


PASS_HOOKS = ["on_hidden", "on_router", "on_attention", "on_call_start", "on_call_end", "on_logits"]


@pytest.mark.parametrize("hook", PASS_HOOKS)
@pytest.mark.parametrize("error", [BrokenError, StopIteration, KeyboardInterrupt])
def test_an_error_in_a_plugin_leaves_the_model_usable(hook, error):
    model = zoo.untrained("qwen3_moe")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    before = state_of(model)
    recorder, calls = Recorder(), Calls()
    with geohooks.instrument(model, [recorder, calls, breaking(hook, error)]) as host:
        for _ in range(2):
            with pytest.raises(error, match=hook):
                run(model, inputs)
        host.remove("breaks")
        recorder.records.clear()
        calls.ended.clear()
        assert same(run(model, inputs), bare)
        assert len(recorder.records) == len(host.anatomy.sites)
        assert len(calls.ended) == 1
        assert {record.call for record in recorder.records} == {calls.ended[0]}
    assert state_of(model) == before


@pytest.mark.parametrize("hook", PASS_HOOKS)
def test_a_plugin_that_fails_is_dropped_where_the_user_asked_for_that(hook, caplog):
    model = zoo.untrained("qwen3_moe")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    first, last, calls = Recorder(name="first"), Recorder(name="last"), Calls()
    breaks = breaking(hook)
    with (
        caplog.at_level(logging.ERROR, "geohooks"),
        geohooks.instrument(model, [first, breaks, last, calls], on_error="detach") as host,
    ):
        assert same(run(model, inputs), bare)
        assert list(host.plugins) == ["first", "last", "calls"]
        (call,) = calls.ended
        (fault,) = call.faults
        assert (fault.plugin, type(fault.error)) == ("breaks", BrokenError)
        assert (fault.site is None) == hook.startswith("on_call")
        assert breaks.left == 1
        assert "breaks" in caplog.text
        assert first.heard() == last.heard()
        assert sorted(first.heard()) == sorted(map(str, host.anatomy.sites))
        assert same(run(model, inputs), bare)
        assert calls.ended[1].faults == []
    assert breaks.left == 1
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("hook", "site"),
    [("on_hidden", "decoder.0.output"), ("on_router", "decoder.0.router"), ("on_logits", "logits")],
)
def test_what_a_failing_plugin_assigned_in_that_event_is_undone(hook, site):
    model = zoo.untrained("qwen3_moe")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    after = Recorder(site)
    with geohooks.instrument(model, [breaking(hook, sites=site, edits=True), after], on_error="detach"):
        assert same(run(model, inputs), bare)
    recorder = Recorder(site)
    with geohooks.instrument(model, [recorder]):
        run(model, inputs)
    assert same(after.at(site)[0], recorder.at(site)[0])


def test_what_a_failing_plugin_edited_before_stands():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)

    def doubled_then_broken(value):
        doubled_then_broken.count += 1
        if doubled_then_broken.count > 1:
            raise BrokenError
        return value * 2

    doubled_then_broken.count = 0
    with geohooks.instrument(model, [Editor("decoder.0.output", lambda h: h * 2)]):
        expected = run(model, inputs)
    editor = Editor(["decoder.0.output", "decoder.1.output"], doubled_then_broken)
    with geohooks.instrument(model, [editor], on_error="detach") as host:
        assert same(run(model, inputs), expected)
        assert host.plugins == {}
        assert same(run(model, inputs), run(zoo.untrained("llama"), inputs))


@pytest.mark.parametrize("bad", [lambda value: value[:, :1], lambda value: None])
@pytest.mark.parametrize("site", ["decoder.0.output", "decoder.0.router", "logits"])
def test_an_edit_that_is_refused_drops_the_plugin_where_the_user_asked_for_that(site, bad):
    model = zoo.untrained("qwen3_moe")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    after = Recorder(site, "after")
    with geohooks.instrument(model, [Editor(site, bad), after], on_error="detach") as host:
        assert same(run(model, inputs), bare)
        assert list(host.plugins) == ["after"]
        assert len(after.records) == 1


def test_an_editor_without_sites_is_dropped_where_the_user_asked_for_that():
    class Anywhere(Plugin):
        @hookimpl
        def on_hidden(self, event):
            event.value = event.value * 2

    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    with geohooks.instrument(model, [Anywhere()], on_error="detach") as host:
        assert same(run(model, inputs), bare)
        assert host.plugins == {}


def test_an_interrupt_is_never_a_fault():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    with geohooks.instrument(model, [breaking("on_hidden", KeyboardInterrupt)], on_error="detach") as host:
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        assert list(host.plugins) == ["breaks"]


@pytest.mark.parametrize("on_error", ["raise", "detach"])
def test_a_plugin_that_fails_on_scores(on_error):
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    bare = model.generate(**inputs, **options)
    scores = Scores()
    plugins = [breaking("on_scores", sites=[], edits=True), scores]
    with geohooks.instrument(model, plugins, on_error=on_error) as host:
        if on_error == "raise":
            with pytest.raises(BrokenError):
                model.generate(**inputs, **options)
            host.remove("breaks")
        assert torch.equal(model.generate(**inputs, **options), bare)
        assert list(host.plugins) == ["scores"]
        assert len(scores.heard) == bare.shape[1] - 8
        assert hook_count(model) == 0 or host.backend is not None
    assert "generate" not in model.__dict__


def test_refused_scores_drop_the_plugin_where_the_user_asked_for_that():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    bare = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with geohooks.instrument(model, [Scores(lambda s: s[:, :3])], on_error="detach") as host:
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), bare)
        assert host.plugins == {}


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["block", "stack", "model"])
def test_an_error_in_the_model_leaves_the_next_call_right(error, where):
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    recorder, calls = Recorder(), Calls()
    module = {"block": model.model.layers[1], "stack": model.model, "model": model}[where]
    forward = module.forward

    def fails(*args, **kwargs):
        forward(*args, **kwargs)
        raise error

    with geohooks.instrument(model, [recorder, calls]) as host:
        module.forward = fails
        for _ in range(2):
            with pytest.raises(error):
                run(model, inputs)
        del module.forward
        recorder.records.clear()
        assert calls.ended == []
        assert same(run(model, inputs), bare)
        assert len(calls.ended) == 1
        assert len(recorder.records) == len(host.anatomy.sites)
        assert {record.call for record in recorder.records} == {calls.ended[0]}


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_an_error_in_the_model_is_followed_by_a_call_of_a_stack_alone(error):
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    recorder, calls = Recorder("decoder.*.output"), Calls()
    layer = model.model.layers[1]
    forward = layer.forward
    with geohooks.instrument(model, [recorder, calls]):
        layer.forward = lambda *args, **kwargs: (_ for _ in ()).throw(error())
        with pytest.raises(error):
            run(model, inputs)
        del layer.forward
        assert layer.forward == forward
        recorder.records.clear()
        with torch.no_grad():
            model.model(**inputs)
        assert len(calls.ended) == 1
        assert calls.ended[0].stack == "decoder"
        assert {record.call for record in recorder.records} == {calls.ended[0]}


def test_what_on_error_may_be():
    with pytest.raises(GeohooksError, match="on_error='ignore'"):
        geohooks.instrument(zoo.untrained("llama"), on_error="ignore")
    with pytest.raises(GeohooksError, match="backend='jax'"):
        geohooks.instrument(zoo.untrained("llama"), backend="jax")


def test_a_plugin_that_fails_while_leaving_does_not_keep_the_others():
    model = zoo.untrained("llama")
    before = state_of(model)
    left = []

    class Leaves(Plugin):
        @hookimpl
        def on_hidden(self, event):
            pass

        @hookimpl
        def on_detach(self, host):
            left.append(self)
            raise BrokenError

    class Follows(Plugin):
        @hookimpl
        def on_hidden(self, event):
            pass

        @hookimpl
        def on_detach(self, host):
            left.append(self)

    host = geohooks.instrument(model, [Leaves(), Follows()])
    with pytest.raises(BrokenError):
        host.detach()
    assert state_of(model) == before
    host.detach()
    assert len(left) == 2
