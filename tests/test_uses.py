"""Hosts in the ways that people run models: assistants, embeddings, autocast, inference mode, hosts nobody keeps."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from recorders import Calls, Editor, Logits, Recorder, Scores, hook_count, logits_of, same, state_of

import geohooks
from geohooks import Plugin, PluginError, hookimpl, zoo


@pytest.fixture
def llama():
    model = zoo.untrained("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def inputs(llama):
    return zoo.example_inputs(llama, batch=1)


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


def test_a_host_that_nobody_keeps_is_active(llama, inputs):
    recorder = Recorder("logits")
    geohooks.instrument(llama, [recorder])
    gc.collect()
    run(llama, inputs)
    assert len(recorder.records) == 1


def test_a_model_with_a_host_that_nobody_keeps_can_be_freed():
    model = zoo.untrained("llama")
    recorder = Recorder()
    geohooks.instrument(model, [recorder, Scores()])
    run(model, zoo.example_inputs(model))
    alive = weakref.ref(model)
    recorder.records.clear()
    del model
    gc.collect()
    assert alive() is None


def test_an_assistant_changes_no_token_and_is_not_heard(llama, inputs):
    assistant = zoo.untrained("llama", seed=1)
    assistant.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "assistant_model": assistant}
    bare = llama.generate(**inputs, **options)
    calls, recorder, of_assistant = Calls(), Recorder(), Recorder("logits")
    with geohooks.instrument(llama, [calls, recorder]), geohooks.instrument(assistant, [of_assistant]):
        assert torch.equal(llama.generate(**inputs, **options), bare)
    assert len(calls.ended) == len(recorder.at("logits"))
    assert {call.anatomy.model for call in calls.ended} == {llama}
    assert {record.call.anatomy.model for record in of_assistant.records} == {assistant}


def test_generation_may_begin_with_embeddings(llama, inputs):
    embedded = llama.get_input_embeddings()(inputs["input_ids"]).detach()
    bare = llama.generate(inputs_embeds=embedded, max_new_tokens=3, do_sample=False)
    recorder = Recorder("decoder.0.output")
    calls = Calls(lambda call: (call.step, call.token_ids is None, call.positions("decoder")[0].tolist()))
    with geohooks.instrument(llama, [recorder, calls]):
        assert torch.equal(llama.generate(inputs_embeds=embedded, max_new_tokens=3, do_sample=False), bare)
    assert [seen[0] for seen in calls.seen] == [0, 1, 2]
    assert [seen[1] for seen in calls.seen] == [True, False, False]
    assert [seen[2] for seen in calls.seen] == [list(range(8)), [8], [9]]


def test_inference_mode_is_bit_identical_and_can_be_edited(llama, inputs):
    with torch.inference_mode():
        bare = llama(**inputs).logits
        with geohooks.instrument(llama, [Recorder(), Logits(lambda event: event.stats)]):
            assert same(llama(**inputs).logits, bare)
        with geohooks.instrument(llama, [Editor("decoder.0.output", lambda h: h * 2)]):
            assert not same(llama(**inputs).logits, bare)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_autocast_is_bit_identical(family):
    model = zoo.untrained(family)
    inputs = zoo.example_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        bare = run(model, inputs)
        recorder = Recorder()
        with geohooks.instrument(model, [recorder]) as host:
            assert same(run(model, inputs), bare)
            assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
        with geohooks.instrument(model, [Editor("*.*.attention", lambda x: x.clone())]):
            assert same(run(model, inputs), bare)


def test_a_copy_taken_while_checkpointing_is_clean():
    model = zoo.untrained("llama").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    inputs = zoo.example_inputs(model)
    before = state_of(model)
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        made = copy.deepcopy(model)
        loss.backward()
        heard = len(recorder.records)
        made(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert len(recorder.records) == heard
    assert state_of(model) == before
    again = copy.deepcopy(made)
    for one in (model, made, again):
        one.disable_input_require_grads()
        assert hook_count(one) == 0


def test_a_copy_outlives_the_model_and_its_host():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    recorder = Recorder()
    geohooks.instrument(model, [recorder])
    made = copy.deepcopy(model)
    del model
    gc.collect()
    fresh = Recorder()
    with geohooks.instrument(made, [fresh]):
        assert same(run(made, inputs), bare)
    assert fresh.records
    assert recorder.records == []


def test_moving_the_model_to_another_type_does_not_disturb_a_host(llama, inputs):
    recorder = Recorder("decoder.0.output")
    with geohooks.instrument(llama, [recorder]):
        run(llama, inputs)
        llama.double()
        run(llama, inputs)
    assert [value.dtype for value in recorder.at("decoder.0.output")] == [torch.float32, torch.float64]


def test_sizes_may_change_from_call_to_call(llama):
    recorder = Recorder(["decoder.0.output", "decoder.0.pattern"])
    shapes = [(1, 1), (3, 5), (2, 9), (1, 30)]
    with geohooks.instrument(llama, [recorder]):
        for batch, length in shapes:
            run(llama, zoo.example_inputs(llama, batch=batch, length=length))
    assert [value.shape[:2] for value in recorder.at("decoder.0.output")] == shapes
    assert [value.shape[2] for value in recorder.at("decoder.0.pattern")] == [length for _, length in shapes]


def test_a_model_called_in_a_users_own_hook_is_a_call_of_its_own(llama, inputs):
    """A hook of the user that runs the whole model again inside a block does not confuse the outer call."""
    depth = []

    def again(module, args, output):
        if not depth:
            depth.append(1)
            run(llama, inputs)

    handle = llama.model.layers[0].register_forward_hook(again)
    recorder, calls = Recorder("decoder.*.output"), Calls()
    bare = run(llama, inputs)
    depth.clear()
    with geohooks.instrument(llama, [recorder, calls]):
        assert same(run(llama, inputs), bare)
        handle.remove()
        recorder.records.clear()
        ended = len(calls.ended)
        assert same(run(llama, inputs), bare)
    assert len(calls.ended) == ended + 1
    assert recorder.heard() == ["decoder.0.output", "decoder.1.output"]


def test_a_plugin_that_runs_the_model_without_a_pause_does_not_break_the_outer_call(llama, inputs):
    class Runs(Plugin):
        inside = False

        @hookimpl
        def sites(self):
            return ["decoder.0.output"]

        @hookimpl
        def on_hidden(self, event):
            if not self.inside:
                self.inside = True
                run(llama, inputs)
                self.inside = False

    recorder, calls = Recorder("decoder.*.output"), Calls()
    with geohooks.instrument(llama, [Runs(), recorder, calls]):
        try:
            run(llama, inputs)
        except PluginError as error:
            # A refusal that says what to do is as good as two calls, one in the other.
            assert "paused" in str(error)  # noqa: PT017
            return
    assert [recorder.heard().count(f"decoder.{layer}.output") for layer in range(2)] == [2, 2]
    assert len(calls.ended) == 2
