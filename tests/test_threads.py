"""Several threads run one instrumented model, and what each hears and edits is its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from recorders import Calls, Editor, Recorder, Scores, gradients, hook_count, logits_of, same, switching_often

import geohooks
from geohooks import Plugin, hookimpl, zoo


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


def batches_of(model, count=8):
    return [zoo.example_inputs(model, batch=1 + index % 3, length=3 + index, seed=index) for index in range(count)]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_calls_in_several_threads_do_not_mix(family):
    model = zoo.untrained(family)
    batches = batches_of(model)
    alone = []
    for inputs in batches:
        recorder = Recorder()
        with geohooks.instrument(model, [recorder]):
            alone.append((run(model, inputs), recorder.records))
    recorder, calls = Recorder(), Calls()
    with switching_often(), geohooks.instrument(model, [recorder, calls]), ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda inputs: run(model, inputs), batches * 2))
    assert len(calls.ended) == len({id(call) for call in calls.ended}) == 16
    for call in calls.ended:
        index = next(i for i, inputs in enumerate(batches) if inputs["input_ids"] is call.token_ids)
        own = [record for record in recorder.records if record.call is call]
        assert [record.site for record in own] == [record.site for record in alone[index][1]]
        for record, expected in zip(own, alone[index][1], strict=True):
            torch.testing.assert_close(record.value, expected.value)
    for index, output in enumerate(outputs):
        torch.testing.assert_close(output, alone[index % 8][0])


def test_edits_in_several_threads_are_those_of_their_call():
    model = zoo.untrained("llama")
    batches = batches_of(model)

    class ByInput(Plugin):
        @hookimpl
        def sites(self):
            return ["decoder.0.output"]

        @hookimpl
        def on_hidden(self, event):
            event.value = event.value * event.call.token_ids.shape[1]

    with switching_often(), geohooks.instrument(model, [ByInput()]):
        alone = [run(model, inputs) for inputs in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda inputs: run(model, inputs), batches))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_generations_in_several_threads_count_their_own_steps():
    model = zoo.untrained("llama")
    model.generation_config.eos_token_id = None
    batches = [zoo.example_inputs(model, batch=1, seed=seed) for seed in range(4)]
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = [model.generate(**inputs, **options) for inputs in batches]
    scores, calls = Scores(), Calls(lambda call: (call.generation, call.step))
    with switching_often(), geohooks.instrument(model, [scores, calls]), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda inputs: model.generate(**inputs, **options), batches))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    steps = {}
    for generation, step in calls.seen:
        steps.setdefault(id(generation), []).append(step)
    assert list(steps.values()) == [[0, 1, 2, 3]] * 4
    assert len(scores.heard) == 16


def test_a_pause_is_for_the_calling_thread():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    editor = Editor("decoder.0.output", lambda h: h * 2)
    paused, done = threading.Event(), threading.Event()
    outputs = {}

    def elsewhere():
        assert paused.wait(60)
        outputs["other"] = run(model, inputs)
        done.set()

    with geohooks.instrument(model, [editor]) as host:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        with host.paused():
            paused.set()
            assert done.wait(60)
            outputs["own"] = run(model, inputs)
        thread.join()
        edited = run(model, inputs)
    assert same(outputs["own"], bare)
    assert same(outputs["other"], edited)
    assert not same(edited, bare)


def test_an_error_in_one_thread_does_not_reach_another():
    model = zoo.untrained("llama")
    batches = batches_of(model)

    class FailsOnShort(Plugin):
        @hookimpl
        def on_hidden(self, event):
            if event.call.token_ids.shape[1] % 2:
                raise ValueError("odd")

    def attempt(inputs):
        try:
            return run(model, inputs)
        except ValueError as error:
            return str(error)

    calls = Calls()
    with switching_often(), geohooks.instrument(model, [FailsOnShort(), calls]), ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(attempt, batches))
    assert [isinstance(one, str) for one in outputs] == [bool(inputs["input_ids"].shape[1] % 2) for inputs in batches]
    assert len(calls.ended) == sum(not isinstance(one, str) for one in outputs)


def test_a_plugin_that_is_dropped_in_one_thread_leaves_the_others_running():
    model = zoo.untrained("llama")
    batches = batches_of(model)
    alone = [run(model, inputs) for inputs in batches]

    class FailsOnce(Plugin):
        @hookimpl
        def on_hidden(self, event):
            if event.call.token_ids.shape[1] == 5:
                raise ValueError

    recorder = Recorder("logits")
    with switching_often(), geohooks.instrument(model, [FailsOnce(), recorder], on_error="detach") as host:
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda inputs: run(model, inputs), batches * 3))
        assert list(host.plugins) == ["recorder"]
    for index, output in enumerate(outputs):
        torch.testing.assert_close(output, alone[index % 8])
    assert len(recorder.records) == 24
    assert hook_count(model) == 0


def test_hosts_of_several_threads_come_and_go_on_one_model():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)

    def session(index):
        recorder = Recorder(["decoder.0.output", "logits"], f"recorder{index}")
        with geohooks.instrument(model, [recorder]):
            output = run(model, inputs)
        return output, recorder

    with switching_often(), ThreadPoolExecutor(4) as pool:
        results = list(pool.map(session, range(24)))
    for output, recorder in results:
        assert same(output, bare)
        assert {"decoder.0.output", "logits"} == set(recorder.heard())
    assert hook_count(model) == 0
    assert "generate" not in model.__dict__


def test_checkpointed_passes_in_several_threads_have_their_own_gradients():
    model = zoo.untrained("llama").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    batches = batches_of(model, 4)

    class ByLength(Plugin):
        @hookimpl
        def sites(self):
            return ["decoder.0.mlp"]

        @hookimpl
        def on_hidden(self, event):
            event.value = event.value * event.value.shape[1]

    def input_gradient(inputs):
        embedded = model.get_input_embeddings().weight[inputs["input_ids"]].detach().requires_grad_()
        loss = model(inputs_embeds=embedded).logits.logsumexp(-1).mean()
        return torch.autograd.grad(loss, embedded)[0]

    with switching_often(), geohooks.instrument(model, [ByLength()]):
        alone = [input_gradient(inputs) for inputs in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(input_gradient, batches))
    gradients(model)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)
