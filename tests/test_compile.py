"""Models under torch.compile: hosts are heard whenever they come, and gone when they leave."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from recorders import Calls, Editor, Recorder, gradients, hook_count, same, state_of

import geohooks
from geohooks import Plugin, hookimpl, zoo


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cache
def subject(family="llama"):
    return zoo.example_inputs(family, batch=1, length=4)


def fresh(family="llama"):
    return zoo.untrained(family, num_hidden_layers=1)


SITES = ["decoder.0.input", "decoder.0.attention", "decoder.0.mlp", "decoder.0.output", "logits"]


def run(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or subject()), use_cache=False).logits


def expected_edit():
    model = fresh()
    with geohooks.instrument(model, [Editor("decoder.0.output", lambda h: h * 2)]):
        return run(model)


def double():
    return Editor("decoder.0.output", lambda h: h * 2)


class FunctionAround:
    """A user's compiled function that runs the model."""

    def __init__(self, model):
        def step(**inputs):
            return model(**inputs)

        self.step = torch.compile(step, backend="eager")

    def __call__(self, **inputs):
        return self.step(**inputs)


def in_place(model):
    model.compile(backend="eager")
    return model


def regional(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model




FORMS = {
    "wrapper": lambda model: torch.compile(model, backend="eager"),
    "function": FunctionAround,
    "in_place": in_place,
    "regional": regional,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("when", ["before_compile", "before_first_call", "after_first_call"])
def test_a_compiled_model_is_heard_and_edited(form, when):
    model = fresh()
    bare = run(fresh())
    recorder, calls, edit = Recorder(SITES), Calls(), expected_edit()
    host = geohooks.instrument(model, [recorder, calls]) if when == "before_compile" else None
    compiled = FORMS[form](model)
    if when == "after_first_call":
        torch.testing.assert_close(run(compiled), bare)
    host = host or geohooks.instrument(model, [recorder, calls])
    for count in (1, 2):
        torch.testing.assert_close(run(compiled), bare)
        assert len(calls.ended) == count
        assert sorted(recorder.heard()) == sorted(SITES * count)
    host.add(double())
    torch.testing.assert_close(run(compiled), edit)
    host.remove("editor")
    torch.testing.assert_close(run(compiled), bare)
    host.detach()
    heard = len(recorder.records)
    torch.testing.assert_close(run(compiled), bare)
    assert len(recorder.records) == heard
    assert hook_count(model) == 0


def test_the_wrapper_may_be_given_in_the_place_of_the_model():
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    run(compiled)
    recorder = Recorder(SITES)
    with geohooks.instrument(compiled, [recorder]) as host:
        assert host.model is compiled
        assert host.anatomy.model is model
        torch.testing.assert_close(run(compiled), run(fresh()))
        assert sorted(recorder.heard()) == sorted(SITES)
        assert len(host.check(**subject()).shapes) == len(SITES)


def test_routers_and_attention_of_a_compiled_mixture_are_heard():
    model = fresh("qwen3_moe")
    inputs = subject("qwen3_moe")
    plain, recorder = Recorder(), Recorder()
    with geohooks.instrument(model, [plain]):
        bare = run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    run(compiled, inputs)
    with geohooks.instrument(model, [recorder]):
        torch.testing.assert_close(run(compiled, inputs), bare)
    assert recorder.heard() == plain.heard()
    for one, other in zip(recorder.records, plain.records, strict=True):
        torch.testing.assert_close(one.value, other.value)
    torch.testing.assert_close(run(compiled, inputs), bare)


def test_inductor_compiles_an_instrumented_model():
    model = fresh()
    compiled = torch.compile(model)
    recorder = Recorder(SITES)
    bare = run(fresh())
    with warnings.catch_warnings():
        # The compiler's own notices about this machine.
        warnings.simplefilter("ignore")
        torch.testing.assert_close(run(compiled), bare, rtol=1e-4, atol=1e-5)
        with geohooks.instrument(model, [recorder]):
            torch.testing.assert_close(run(compiled), bare, rtol=1e-4, atol=1e-5)
            assert sorted(recorder.heard()) == sorted(SITES)
        torch.testing.assert_close(run(compiled), bare, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_a_compiled_edit():
    model, other = fresh(), fresh()
    inputs = subject()
    with geohooks.instrument(other, [double()]):
        other(**inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
    expected = gradients(other)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
    gradients(model)
    with geohooks.instrument(model, [double()]):
        compiled(**inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_plugins_may_do_what_no_graph_can():
    """What a plugin does is not traced: items, prints, numpy, files."""

    class Untraceable(Plugin):
        def __init__(self):
            self.numbers = []

        @hookimpl
        def sites(self):
            return ["decoder.0.output"]

        @hookimpl
        def on_hidden(self, event):
            self.numbers.append(float(event.value.detach().numpy().sum()))
            event.value = event.value * (2.0 if self.numbers[-1] < 1e9 else 1.0)

    model = fresh()
    plugin = Untraceable()
    compiled = torch.compile(model, backend="eager")
    with geohooks.instrument(model, [plugin]):
        torch.testing.assert_close(run(compiled), expected_edit())
        run(compiled, zoo.example_inputs("llama", batch=1, length=4, seed=7))
    assert len(set(plugin.numbers)) == 2


def test_a_pause_is_kept_under_compile():
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    bare = run(fresh())
    with geohooks.instrument(model, [double()]) as host:
        edited = run(compiled)
        with host.paused():
            torch.testing.assert_close(run(compiled), bare)
        torch.testing.assert_close(run(compiled), edited)


def test_an_error_under_compile_leaves_the_model_usable():
    model = fresh()
    compiled = torch.compile(model, backend="eager")

    class Fails(Plugin):
        @hookimpl
        def on_hidden(self, event):
            raise ValueError("on purpose")

    recorder = Recorder("logits")
    with geohooks.instrument(model, [Fails(), recorder]) as host:
        with pytest.raises(ValueError, match="on purpose"):
            run(compiled)
        host.remove("fails")
        torch.testing.assert_close(run(compiled), run(fresh()))
    assert len(recorder.records) == 1


def test_functions_of_the_user_without_a_model_are_right_after_a_host_came():
    calls = []

    def counts(graph, inputs):
        calls.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x.sin() + 1, backend=counts)
    x = torch.arange(3.0)
    function(x)
    with geohooks.instrument(fresh(), [Recorder()]):
        assert torch.equal(function(x), x.sin() + 1)
    assert torch.equal(function(x), x.sin() + 1)


def test_without_a_compiler_none_is_imported():
    import subprocess
    import sys

    code = (
        "import sys, torch, geohooks\n"
        "from geohooks import Plugin, hookimpl, zoo\n"
        "class P(Plugin):\n"
        "    @hookimpl\n"
        "    def on_hidden(self, event): pass\n"
        "model = zoo.untrained('llama')\n"
        "already = 'torch._dynamo.convert_frame' in sys.modules\n"
        "with geohooks.instrument(model, [P()]):\n"
        "    pass\n"
        "assert already or 'torch._dynamo.convert_frame' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_host_that_hears_nothing_leaves_compiled_graphs_alone():
    graphs = []

    def counts(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = fresh()
    compiled = torch.compile(model, backend=counts)
    run(compiled)
    before, state = len(graphs), state_of(model)
    with geohooks.instrument(model):
        run(compiled)
    assert len(graphs) == before
    assert state_of(model) == state
    assert same(run(compiled), run(compiled))
