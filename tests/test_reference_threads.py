"""Several threads, and wrapped models, with a reference."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bases import Asks, adapted, pair, run
from recorders import Recorder, same, state_of, switching_often

import geohooks
from geohooks import Plugin, hookimpl, zoo

# What PEFT asks of a model when it wraps it is deprecated in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("how", ["memory", "adapter"])
def test_threads_get_the_base_s_answer_to_their_own_inputs(how):
    base, tuned, _ = pair("llama")
    model = tuned if how == "memory" else adapted()
    batches = [zoo.example_inputs(base, batch=1, length=3 + index, seed=index) for index in range(6)]
    expected = [(run(model, inputs), run(base, inputs)) for inputs in batches]

    class ByInput(Plugin):
        def __init__(self):
            self.seen = {}

        @hookimpl
        def on_logits(self, event):
            self.seen[event.call.token_ids.shape[1]] = (event.value.detach().clone(), event.call.reference)

    plugin = ByInput()
    with (
        switching_often(),
        geohooks.instrument(model, [plugin], reference=base if how == "memory" else "disable_adapter"),
    ):
        for _ in range(4):
            plugin.seen.clear()
            with ThreadPoolExecutor(4) as pool:
                outputs = list(pool.map(lambda inputs: run(model, inputs), batches))
            for index, (own, of_base) in enumerate(expected):
                heard, answered = plugin.seen[3 + index]
                torch.testing.assert_close(outputs[index], own)
                torch.testing.assert_close(heard, own)
                torch.testing.assert_close(answered, of_base)


def test_a_peft_model_is_instrumented_as_what_it_wraps():
    model = adapted()
    inputs = pair("llama")[2]
    recorder = Recorder()
    before = state_of(model)
    bare = run(model, inputs)
    with geohooks.instrument(model, [recorder]) as host:
        assert same(run(model, inputs), bare)
        assert host.model is model
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
    assert state_of(model) == before


def test_no_thread_runs_the_model_while_its_adapter_is_off():
    model, inputs = adapted(), pair("llama")[2]
    tuned = run(model, inputs)
    main = threading.current_thread()
    projection = model.get_base_model().model.layers[0].self_attn.q_proj
    elsewhere = []

    class Asks(Plugin):
        @hookimpl
        def on_logits(self, event):
            if threading.current_thread() is main:
                self.base = event.call.reference

    def start_another(*_):
        if projection.disable_adapters and not elsewhere:
            thread = threading.Thread(target=lambda: elsewhere.append(run(model, inputs)))
            elsewhere.append(thread)
            thread.start()
            thread.join(0.1)

    handle = projection.register_forward_pre_hook(start_another)
    asks = Asks()
    with geohooks.instrument(model, [asks], reference="disable_adapter"):
        run(model, inputs)
        elsewhere[0].join()
    handle.remove()
    assert same(elsewhere[1], tuned)
    assert same(asks.base, run(zoo.untrained("llama"), inputs))


def test_an_interrupted_call_does_not_keep_other_threads_from_the_model():
    model, inputs = adapted(), pair("llama")[2]
    tuned = run(model, inputs)
    layer = model.get_base_model().model.layers[1]
    outputs = []
    with geohooks.instrument(model, [Asks()], reference="disable_adapter"):
        handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        handle.remove()
        thread = threading.Thread(target=lambda: outputs.append(run(model, inputs)), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
    assert same(outputs[0], tuned)
