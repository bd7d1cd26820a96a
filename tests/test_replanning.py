"""Plugins that come and go while calls are under way, and what else must hold for any model and input."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Recorder
from transformers import Gemma2Config, Gemma2ForCausalLM

import geohooks
from geohooks import GeohooksError, Plugin, hookimpl, zoo

LLAMA = zoo.untrained("llama")


class Adds(Plugin):
    name = "adds"

    @hookimpl
    def sites(self):
        return ["decoder.0.output"]

    @hookimpl
    def on_hidden(self, event):
        event.value = event.value + 1


class Ends(Plugin):
    """Counts what each call has heard by its end."""

    name = "ends"

    def __init__(self):
        self.heard = []

    @hookimpl
    def on_hidden(self, event):
        event.call.share["heard"] = event.call.share.get("heard", 0) + 1

    @hookimpl
    def on_call_end(self, call):
        self.heard.append(call.share.get("heard", 0))


def test_plugins_come_and_go_while_other_threads_run_the_model():
    inputs = zoo.example_inputs(LLAMA)
    ends = Ends()
    with torch.no_grad(), geohooks.instrument(LLAMA, [Adds()]):
        expected = LLAMA(**inputs).logits
    edited = []

    def runs():
        with torch.no_grad():
            edited.extend(torch.equal(LLAMA(**inputs).logits, expected) for _ in range(40))

    with geohooks.instrument(LLAMA, [Adds(), ends]) as host:
        threads = [threading.Thread(target=runs) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            host.remove(host.add(Recorder()))
        for thread in threads:
            thread.join()
    assert edited == [True] * 80
    hidden = sum(site.kind not in ("router", "pattern", "logits") for site in host.anatomy.sites)
    assert ends.heard == [hidden] * 80
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in LLAMA.modules())


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_calls_in_threads_do_not_mix(lengths, seed):
    recorder = Recorder("decoder.-1.output")
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 99, (1, length), generator=generator) for length in lengths]
    with torch.no_grad():
        alone = [geohooks.capture(LLAMA, sites="decoder.-1.output", input_ids=ids) for ids in prompts]
    kept = {}

    class Keeps(Plugin):
        @hookimpl
        def sites(self):
            return ["decoder.-1.output"]

        @hookimpl
        def on_hidden(self, event):
            kept[threading.get_ident(), event.call.token_ids.shape[1]] = event.value.detach()

    def run(ids):
        with torch.no_grad():
            LLAMA(input_ids=ids)

    with geohooks.instrument(LLAMA, [recorder, Keeps()]):
        threads = [threading.Thread(target=run, args=(ids,)) for ids in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = {length: value for (_, length), value in kept.items()}
    for ids, want in zip(prompts, alone, strict=True):
        have = found[ids.shape[1]]
        if lengths.count(ids.shape[1]) == 1:
            assert torch.equal(have, want["decoder.1.output"])
    assert len(recorder.records) == len(prompts)


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(["input", "attention", "mlp", "output"]),
    layer=st.integers(0, 1),
    reentrant=st.booleans(),
    scale=st.floats(0.5, 1.5),
)
def test_an_edit_has_the_same_gradients_under_checkpointing(kind, layer, reentrant, scale):
    class Scales(Plugin):
        @hookimpl
        def sites(self):
            return [f"decoder.{layer}.{kind}"]

        @hookimpl
        def on_hidden(self, event):
            event.value = event.value * scale

    def gradients(**options):
        model = zoo.untrained("llama").train()
        inputs = zoo.example_inputs(model)
        if options:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        with geohooks.instrument(model, [Scales()]):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(), gradients(use_reentrant=reentrant)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("softcap", [None, 0.5, 5.0])
def test_soft_capped_attention_is_what_the_model_computes(softcap):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=softcap,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(3, 99, (2, 7))
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    found = geohooks.capture(model, sites="decoder.*.pattern", input_ids=ids)
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(found[f"decoder.{layer}.pattern"], weights)


def test_guidance_is_refused_by_name():
    inputs = zoo.example_inputs(LLAMA)
    with geohooks.instrument(LLAMA, [Ends()]) as host:
        with pytest.raises(GeohooksError, match=r"guidance_scale=2\.0"):
            host.generate(**inputs, guidance_scale=2.0, max_new_tokens=2)
        with host.paused():
            assert (
                LLAMA.generate(**inputs, guidance_scale=2.0, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
            )


def test_all_plugins_leave_even_if_one_fails_to():
    class Stays(Plugin):
        name = "stays"

        @hookimpl
        def on_detach(self, host):
            raise ValueError("no")

        @hookimpl
        def on_call_end(self, call):
            raise AssertionError("heard after it left")

    ends = Ends()
    host = geohooks.instrument(LLAMA, [ends, Stays()])
    with pytest.raises(ValueError, match="no"):
        host.detach()
    assert not host.plugins
    with torch.no_grad():
        LLAMA(**zoo.example_inputs(LLAMA))
    assert ends.heard == []


def test_plugins_are_a_list():
    with pytest.raises(GeohooksError, match="is no list"):
        geohooks.instrument(LLAMA, None)
    with pytest.raises(GeohooksError, match="is no list"):
        geohooks.instrument(LLAMA, Ends())


def test_nan_logits_are_counted():
    model = zoo.untrained("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
        with geohooks.instrument(model, ["signals"]) as host:
            model(**zoo.example_inputs(model))
            summary = host["signals"].summary().to_pylist()
    (entropy,) = [row for row in summary if row["signal"] == "entropy"]
    assert (entropy["positions"], entropy["undefined"], entropy["mean"]) == (0, 16, None)
