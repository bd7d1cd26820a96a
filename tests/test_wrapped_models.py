"""Models inside other libraries' wrappers: PEFT, data parallel, offloaded, compiled over an adapter."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import torch
from recorders import Calls, Editor, Recorder, Scores, gradients, logits_of, same, state_of
from torch.nn.parallel import DistributedDataParallel

import geohooks
from geohooks import zoo

# What PEFT asks of a model when it wraps it is deprecated in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


def adapted(family="llama", **options):
    base = zoo.untrained(family)
    base.generation_config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})
        return peft.get_peft_model(base, config).eval()


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_every_site_of_an_adapted_model_is_heard(family):
    model = adapted(family)
    inputs = zoo.example_inputs(family)
    bare, before = run(model, inputs), state_of(model)
    recorder, calls = Recorder(), Calls(lambda call: call.token_ids)
    with geohooks.instrument(model, [recorder, calls]) as host:
        assert same(run(model, inputs), bare)
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
        assert host.check(**inputs).silent == ()
    assert calls.seen[0] is inputs["input_ids"]
    assert state_of(model) == before


def test_adapted_experts_and_routers_are_heard_and_edited():
    model = adapted(
        "qwen3_moe",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    inputs = zoo.example_inputs("qwen3_moe")
    bare = run(model, inputs)
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]) as host:
        assert same(run(model, inputs), bare)
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
    with geohooks.instrument(model, [Editor("decoder.*.router", lambda x: -x)]):
        assert not same(run(model, inputs), bare)
    assert same(run(model, inputs), bare)


def test_an_adapted_model_generates_under_a_host():
    model = adapted()
    inputs = zoo.example_inputs("llama")
    bare = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    scores, calls = Scores(), Calls(lambda call: call.step)
    with geohooks.instrument(model, [scores, calls]) as host:
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), bare)
        assert torch.equal(host.generate(**inputs, max_new_tokens=3, do_sample=False), bare)
    assert len(scores.heard) == 6
    assert calls.seen == [0, 1, 2] * 2


def test_a_copy_of_an_adapted_model_is_clean():
    model = adapted()
    inputs = zoo.example_inputs("llama")
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]):
        made = copy.deepcopy(model)
        assert same(run(made, inputs), run(model, inputs))
        heard = len(recorder.records)
        run(made, inputs)
    assert len(recorder.records) == heard


def test_an_adapter_is_trained_under_an_edit():
    model = adapted().train()
    inputs = zoo.example_inputs("llama")
    with geohooks.instrument(model, [Editor("decoder.0.output", lambda h: h * 1.5)]):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = gradients(model)
    assert found
    assert all("lora" in name and gradient.abs().sum() > 0 for name, gradient in found.items())


def test_a_data_parallel_model_is_instrumented_inside_and_outside(one_process):
    inputs = zoo.example_inputs("llama")
    labels = {"labels": inputs["input_ids"]}
    plain = zoo.untrained("llama")
    with geohooks.instrument(plain, [Editor("decoder.0.output", lambda h: h * 1.5)]):
        plain(**inputs, **labels).loss.backward()
    expected = gradients(plain)
    for outside in (True, False):
        model = zoo.untrained("llama")
        parallel = DistributedDataParallel(model)
        recorder = Recorder()
        editor = Editor("decoder.0.output", lambda h: h * 1.5)
        with geohooks.instrument(parallel if outside else model, [recorder, editor]) as host:
            parallel(**inputs, **labels).loss.backward()
            assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_offloaded_model_is_heard(when):
    model = zoo.untrained("qwen3_moe")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    recorder = Recorder()
    calls = Calls(lambda call: call.token_ids)
    edited = []
    host = geohooks.instrument(model, [recorder, calls]) if when == "before" else None
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    host = host or geohooks.instrument(model, [recorder, calls])
    with host, torch.no_grad():
        assert same(model(inputs["input_ids"]).logits, bare)
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
        host.add(Editor("decoder.0.router", lambda x: -x))
        edited.append(run(model, inputs))
    assert calls.seen[0] is inputs["input_ids"]
    plain = zoo.untrained("qwen3_moe")
    with geohooks.instrument(plain, [Editor("decoder.0.router", lambda x: -x)]):
        assert same(edited[0], run(plain, inputs))
    assert same(run(model, inputs), bare)


def test_arguments_by_position_are_named_where_the_forward_was_wrapped():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    calls = Calls(lambda call: (call.token_ids, call.batch_size))
    with geohooks.instrument(model, [calls]), torch.no_grad():
        model(inputs["input_ids"])
    assert calls.seen[0][0] is inputs["input_ids"]
    assert calls.seen[0][1] == 2
