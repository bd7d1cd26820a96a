"""Models under torch.compile: hosts are heard whenever they come, and gone when they leave."""

from __future__ import annotations

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
def subject():
    return zoo.example_inputs("vit", batch=1)


def fresh():
    """A model whose code the compiler reads quickly."""
    return zoo.untrained("vit", num_hidden_layers=1)


SITES = ["vision.0.output", "logits"]


def run(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or subject())).logits


def double():
    return Editor("vision.0.output", lambda h: h * 2)


@cache
def edited():
    """What the edit gives without a compiler."""
    model = fresh()
    with geohooks.instrument(model, [double()]):
        return run(model)


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
    for layer in model.vit.layers:
        layer.compile(backend="eager")
    return model


FORMS = {
    "wrapper": lambda model: torch.compile(model, backend="eager"),
    "function": FunctionAround,
    "in_place": in_place,
    "regional": regional,
}


def agree(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_host_that_comes_after_the_first_compiled_call_is_heard(form):
    model = fresh()
    bare = run(fresh())
    compiled = FORMS[form](model)
    agree(run(compiled), bare)
    recorder, calls = Recorder(SITES), Calls()
    with geohooks.instrument(model, [recorder, calls, double()]):
        agree(run(compiled), edited())
        assert sorted(recorder.heard()) == sorted(SITES)
        run(compiled)
        assert len(calls.ended) == 2
        assert len(recorder.records) == 2 * len(SITES)
    agree(run(compiled), bare)
    assert len(calls.ended) == 2
    assert hook_count(model) == 0


@pytest.mark.parametrize("form", ["wrapper", "regional"])
def test_a_host_that_comes_before_the_compiler_is_heard(form):
    model = fresh()
    recorder, calls = Recorder(SITES), Calls()
    host = geohooks.instrument(model, [recorder, calls])
    compiled = FORMS[form](model)
    agree(run(compiled), run(fresh()))
    assert sorted(recorder.heard()) == sorted(SITES)
    host.add(double())
    agree(run(compiled), edited())
    host.detach()
    agree(run(compiled), run(fresh()))
    assert len(calls.ended) == 2


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


def test_a_router_and_attention_under_a_compiler_are_heard():
    model = zoo.untrained("qwen3_moe", num_hidden_layers=1)
    inputs = zoo.example_inputs(model, batch=1, length=4) | {"use_cache": False}
    sites = ["decoder.0.router", "decoder.0.pattern"]
    plain, recorder = Recorder(sites), Recorder(sites)
    with geohooks.instrument(model, [plain]):
        bare = run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    agree(run(compiled, inputs), bare)
    with geohooks.instrument(model, [recorder]):
        agree(run(compiled, inputs), bare)
    assert recorder.heard() == plain.heard()
    for one, other in zip(recorder.records, plain.records, strict=True):
        agree(one.value, other.value)


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_inductor_compiles_an_instrumented_model():
    model = fresh()
    layer = model.vit.layers[0].mlp
    layer.compile()
    bare = run(fresh())
    agree(run(model), bare)
    recorder = Recorder(["vision.0.mlp"])
    with geohooks.instrument(model, [recorder, Editor("vision.0.mlp", lambda h: h * 3)]):
        assert not torch.allclose(run(model), bare)
    assert recorder.heard() == ["vision.0.mlp"]
    agree(run(model), bare)


# Which the compiler hides from users, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_gradients_pass_through_a_compiled_edit():
    model, other = fresh(), fresh()
    inputs = subject()
    with geohooks.instrument(other, [double()]):
        other(**inputs).logits.logsumexp(-1).sum().backward()
    expected = gradients(other)
    compiled = torch.compile(model, backend="aot_eager")
    with geohooks.instrument(model, [double()]):
        compiled(**inputs).logits.logsumexp(-1).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_plugins_may_do_what_no_graph_can():
    """What a plugin does is not traced: items, prints, numpy, files."""

    class Untraceable(Plugin):
        def __init__(self):
            self.numbers = []

        @hookimpl
        def sites(self):
            return ["vision.0.output"]

        @hookimpl
        def on_hidden(self, event):
            self.numbers.append(float(event.value.detach().numpy().sum()))
            event.value = event.value * (2.0 if self.numbers[-1] < 1e9 else 1.0)

    model = fresh()
    plugin = Untraceable()
    compiled = torch.compile(model, backend="eager")
    with geohooks.instrument(model, [plugin]):
        torch.testing.assert_close(run(compiled), edited())
        run(compiled, zoo.example_inputs("vit", batch=1, seed=7))
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
