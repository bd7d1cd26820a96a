"""What is heard is what the model computed, and hearing it changes nothing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Calls, Recorder, hook_count, logits_of, same

import geohooks
from geohooks import Plugin, hookimpl, zoo
from geohooks.host import Host

FAMILIES = zoo.families()


@cache
def subject(family):
    model = zoo.untrained(family)
    inputs = zoo.example_inputs(model)
    with torch.no_grad():
        bare = logits_of(model(**inputs))
    return model, inputs, bare


@cache
def sites_of(family):
    return geohooks.instrument(subject(family)[0]).anatomy.sites


@cache
def everything(family):
    """What one recorder of every site hears."""
    model, inputs, _ = subject(family)
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]), torch.no_grad():
        model(**inputs)
    return recorder.records


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_heard_once_and_the_output_is_the_same_bit_by_bit(family):
    model, inputs, bare = subject(family)
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]) as host, torch.no_grad():
        output = logits_of(model(**inputs))
    assert same(output, bare)
    assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
    assert hook_count(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_heard_is_what_the_model_reports_itself(family):
    model, inputs, _ = subject(family)
    values = geohooks.capture(model, sites=["*.*.output", "logits"], **inputs)
    with torch.no_grad():
        output = zoo.untrained(family)(**inputs, output_hidden_states=True)
    assert same(values["logits"], output.logits)
    states = output.decoder_hidden_states if family == "t5" else output.hidden_states
    stack = geohooks.instrument(model).anatomy.main
    # The last of the model's own states is after the final norm in the families that have one there.
    for layer in range(len(stack.blocks) - 1):
        assert same(values[f"{stack.name}.{layer}.output"], states[layer + 1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_subset_and_order_of_recorders_hears_the_same(data):
    family = data.draw(st.sampled_from(FAMILIES))
    model, inputs, bare = subject(family)
    names = [str(site) for site in sites_of(family)]
    subsets = data.draw(st.lists(st.lists(st.sampled_from(names), max_size=6), max_size=4))
    recorders = [Recorder(wanted, f"recorder{index}") for index, wanted in enumerate(subsets)]
    with geohooks.instrument(model, data.draw(st.permutations(recorders))), torch.no_grad():
        assert same(logits_of(model(**inputs)), bare)
    for recorder in recorders:
        expected = [record for record in everything(family) if record.site in recorder.wanted]
        assert recorder.heard() == [record.site for record in expected]
        for record, wanted in zip(recorder.records, expected, strict=True):
            assert same(record.value, wanted.value)
            assert (record.positions is None) == (wanted.positions is None)
            assert record.positions is None or torch.equal(record.positions, wanted.positions)
    assert hook_count(model) == 0


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_only_the_sites_that_are_heard_have_a_hook(data):
    family = data.draw(st.sampled_from([name for name in FAMILIES if name != "t5"]))
    model, _, _ = subject(family)
    kinds = ("input", "attention", "mlp", "output", "embedding", "router")
    names = [str(site) for site in sites_of(family) if site.kind in kinds]
    wanted = data.draw(st.sets(st.sampled_from(names), min_size=1))
    with geohooks.instrument(model, [Recorder(sorted(wanted))]) as host:
        hooked = {id(module) for module in model.modules() if module._forward_hooks or module._forward_pre_hooks}
        sites = host.anatomy.select(sorted(wanted))
        allowed = {id(host.anatomy.tap(site).module) for site in sites}
        around = {id(model), *(id(stack.module) for stack in host.anatomy.stacks)}
        assert hooked - around == allowed - around


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "t5", "vit"])
def test_half_precision_is_the_same_bit_by_bit(family):
    for dtype in (torch.bfloat16, torch.float16):
        model = zoo.untrained(family).to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in zoo.example_inputs(model).items()}
        recorder = Recorder()
        with torch.no_grad():
            bare = logits_of(model(**inputs))
            with geohooks.instrument(model, [recorder]):
                assert same(logits_of(model(**inputs)), bare)
        hidden = [one for one in recorder.records if one.site.endswith(("input", "output", "embedding"))]
        assert {one.value.dtype for one in hidden} == {dtype}
        weights = [one.value for one in recorder.records if one.site.endswith("pattern")]
        assert {one.dtype for one in weights} <= {torch.float32}


def test_tensors_come_live_with_their_graph():
    model, inputs, _ = subject("llama")

    class Live(Plugin):
        @hookimpl
        def on_hidden(self, event):
            self.value = event.value

    live = Live()
    with geohooks.instrument(model, [live]):
        output = model(**inputs)
    assert live.value.requires_grad
    (gradient,) = torch.autograd.grad(output.logits.sum(), live.value)
    assert gradient.abs().sum() > 0


def test_plugins_run_in_the_order_of_the_list_and_priorities_are_kept():
    model, inputs, _ = subject("llama")
    order = []

    def plugin(name, **options):
        class One(Plugin):
            @hookimpl(**options)
            def on_call_start(self, call):
                order.append(("start", self.name))

            @hookimpl(**options)
            def on_hidden(self, event):
                order.append(("hidden", self.name))

            @hookimpl
            def sites(self):
                return "decoder.0.output"

        one = One()
        one.name = name
        return one

    plugins = [plugin("last", trylast=True), plugin("a"), plugin("first", tryfirst=True), plugin("b")]
    with geohooks.instrument(model, plugins), torch.no_grad():
        model(**inputs)
    expected = ["first", "a", "b", "last"]
    assert order == [("start", name) for name in expected] + [("hidden", name) for name in expected]


class Around(Plugin):
    """A wrapper implementation: it runs around the others."""

    def __init__(self, order):
        self.order = order

    @hookimpl
    def sites(self):
        return ["decoder.0.output", "decoder.1.output"]

    @hookimpl(wrapper=True)
    def on_hidden(self, event):
        self.order.append(f"before {event.site}")
        result = yield
        self.order.append(f"after {event.site}")
        return result


def test_a_wrapper_runs_around_the_others_and_changes_nothing():
    model, inputs, bare = subject("llama")
    order = []

    class Inside(Plugin):
        @hookimpl
        def sites(self):
            return "decoder.0.output"

        @hookimpl
        def on_hidden(self, event):
            order.append(f"inside {event.site}")

    for plugins in ([Around(order), Inside()], [Inside(), Around(order)]):
        order.clear()
        with geohooks.instrument(model, plugins), torch.no_grad():
            assert same(model(**inputs).logits, bare)
        assert order == [
            "before decoder.0.output",
            "inside decoder.0.output",
            "after decoder.0.output",
            "before decoder.1.output",
            "after decoder.1.output",
        ]


def test_a_wrapper_does_not_let_a_plugin_hear_what_it_did_not_ask_for():
    model, inputs, _ = subject("llama")
    recorder = Recorder("decoder.0.output")
    with geohooks.instrument(model, [recorder, Around([])]), torch.no_grad():
        model(**inputs)
    assert recorder.heard() == ["decoder.0.output"]


def test_an_edit_beside_a_wrapper_is_an_edit():
    from recorders import Editor

    model, inputs, _ = subject("llama")
    with torch.no_grad():
        with geohooks.instrument(model, [Editor("decoder.0.output", lambda h: h * 1.5)]):
            edited = model(**inputs).logits
        with geohooks.instrument(model, [Around([]), Editor("decoder.0.output", lambda h: h * 1.5)]):
            assert same(model(**inputs).logits, edited)


def test_implementations_may_leave_out_the_argument():
    model, inputs, _ = subject("llama")

    class Counts(Plugin):
        count = 0

        @hookimpl
        def sites(self):
            return ["decoder.*.output"]

        @hookimpl
        def on_hidden(self):
            self.count += 1

        @hookimpl
        def on_call_end(self):
            self.count += 10

        @hookimpl
        def on_attach(self):
            self.count += 100

    counts = Counts()
    with geohooks.instrument(model, [counts]), torch.no_grad():
        model(**inputs)
    assert counts.count == 112


def test_an_implementation_may_have_another_name():
    model, inputs, _ = subject("llama")

    class Renamed(Plugin):
        heard = ()

        @hookimpl(specname="sites")
        def where(self):
            return ["decoder.0.output"]

        @hookimpl(specname="on_hidden")
        def residual(self, event):
            self.heard = (*self.heard, str(event.site))

    renamed = Renamed()
    with geohooks.instrument(model, [renamed]), torch.no_grad():
        model(**inputs)
    assert renamed.heard == ("decoder.0.output",)


def test_a_plugin_without_sites_hears_every_site_of_its_hooks():
    model, inputs, _ = subject("qwen3_moe")

    class Routers(Plugin):
        def __init__(self):
            self.heard = []

        @hookimpl
        def on_router(self, event):
            self.heard.append(str(event.site))

    routers = Routers()
    with geohooks.instrument(model, [routers]), torch.no_grad():
        model(**inputs)
    assert routers.heard == ["decoder.0.router", "decoder.1.router"]


def test_capture_is_a_quick_look():
    model, inputs, bare = subject("qwen3_moe")
    sites = ["decoder.*.output", geohooks.Site("decoder", 0, "router"), "decoder.-1.pattern", "logits"]
    values = geohooks.capture(model, sites=sites, **inputs)
    assert set(values) == {"decoder.0.router", "decoder.0.output", "decoder.1.pattern", "decoder.1.output", "logits"}
    assert same(values["logits"], bare)
    assert values["decoder.0.router"].shape == (2, 8, 8)
    assert values["decoder.1.pattern"].shape == (2, 4, 8, 8)
    assert not any(value.requires_grad for value in values.values())
    assert hook_count(model) == 0


def test_calls_end_after_every_event_and_nothing_is_heard_after_detach():
    model, inputs, _ = subject("llama")
    calls, recorder = Calls(), Recorder()
    host = geohooks.instrument(model, [calls, recorder])
    assert isinstance(host, Host)
    with torch.no_grad():
        model(**inputs)
        heard = len(recorder.records)
        host.detach()
        model(**inputs)
    assert len(calls.started) == len(calls.ended) == 1
    assert len(recorder.records) == heard > 0
