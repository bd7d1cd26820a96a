"""Gradient checkpointing: recorders hear each site once, and edits have the gradients that they have without it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from recorders import Calls, Editor, Recorder, gradients, logits_of, same, state_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import geohooks
from geohooks import Plugin, PluginError, hookimpl, zoo

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "t5", "vit", "gpt2", "bert"]
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])


def trainable(family):
    config = {"dropout_rate": 0.0} if family == "t5" else {}
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family in ("bert", "vit") else {}
    model = zoo.untrained(family, **config).train()
    return model, zoo.example_inputs(model)


def enable(model, *, reentrant):
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        # The first pass of a reentrant checkpoint builds a graph only where an input needs a gradient.
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def loss_of(model, inputs):
    return logits_of(model(**inputs)).logsumexp(-1).square().mean()


def train(model, *batches):
    """The loss and the gradients of several passes before one backward pass."""
    loss = sum(loss_of(model, inputs) for inputs in batches)
    loss.backward()
    return loss.detach(), gradients(model)


def agree(one, other):
    assert one.keys() == other.keys()
    assert one
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


@REENTRANT
@pytest.mark.parametrize("family", FAMILIES)
def test_recorders_hear_each_site_once_and_change_no_gradient(family, reentrant):
    model, inputs = trainable(family)
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]):
        _, plain = train(model, inputs)
    enable(model, reentrant=reentrant)
    before = state_of(model)
    bare_loss, bare = train(model, inputs)
    under, calls = Recorder(), Calls()
    with geohooks.instrument(model, [under, calls]) as host:
        loss, found = train(model, inputs)
        wanted = sorted(map(str, host.anatomy.sites))
    assert same(loss, bare_loss)
    assert all(same(found[name], gradient) for name, gradient in bare.items())
    agree(found, plain)
    assert sorted(under.heard()) == wanted
    assert not any(record.recomputing for record in under.records)
    assert {record.call for record in under.records} == set(calls.ended)
    for one, other in zip(recorder.records, under.records, strict=True):
        assert (one.site, one.value.shape) == (other.site, other.value.shape)
        torch.testing.assert_close(one.value, other.value)
    assert state_of(model) == before


EDITS = {
    "llama": ["decoder.0.input", "decoder.0.attention", "decoder.1.mlp", "decoder.1.output", "decoder.final_norm"],
    "qwen3_moe": ["decoder.0.router", "decoder.1.mlp"],
    "deepseek_v3": ["decoder.1.router", "decoder.2.attention", "decoder.1.output"],
    "t5": ["encoder.0.mlp", "encoder.1.output", "decoder.0.cross_attention", "decoder.1.input"],
    "vit": ["vision.0.mlp", "vision.1.input", "vision.1.attention"],
    "gpt2": ["decoder.0.attention", "decoder.1.output"],
}


def bend(value):
    return value * 1.5 + 0.25 * value.roll(1, -1)


@REENTRANT
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("family", EDITS)
def test_an_edit_has_the_gradients_that_it_has_without_checkpointing(family, passes, reentrant):
    model, _ = trainable(family)
    batches = [zoo.example_inputs(model, seed=seed) for seed in range(passes)]
    bare_loss, _ = train(model, *batches)
    with geohooks.instrument(model, [Editor(EDITS[family], bend)]):
        plain_loss, plain = train(model, *batches)
    assert not same(plain_loss, bare_loss)
    enable(model, reentrant=reentrant)
    editor, recorder = Editor(EDITS[family], bend), Recorder()
    with geohooks.instrument(model, [recorder, editor]):
        loss, found = train(model, *batches)
    torch.testing.assert_close(loss, plain_loss)
    agree(found, plain)
    assert editor.recomputed > 0
    assert not any(record.recomputing for record in recorder.records)


@REENTRANT
def test_the_calls_of_several_passes_are_kept_apart_in_the_backward_pass(reentrant):
    """An edit that depends on the call is repeated with its own call."""
    model, _ = trainable("llama")
    batches = [zoo.example_inputs(model, seed=seed) for seed in range(3)]

    class ByCall(Plugin):
        @hookimpl
        def sites(self):
            return ["decoder.*.mlp"]

        @hookimpl
        def on_call_start(self, call):
            call.share["factor"] = float(call.token_ids.sum() % 7) + 1

        @hookimpl
        def on_hidden(self, event):
            event.value = event.value * event.call.share["factor"]

    with geohooks.instrument(model, [ByCall()]):
        _, plain = train(model, *batches)
    enable(model, reentrant=reentrant)
    with geohooks.instrument(model, [ByCall()]):
        _, found = train(model, *batches)
    agree(found, plain)


@REENTRANT
def test_an_edit_with_parameters_of_its_own_has_their_gradient(reentrant):
    model, inputs = trainable("llama")
    direction = torch.full((32,), 0.1, requires_grad=True)
    editor = Editor(["decoder.0.mlp", "decoder.1.attention"], lambda h: h + direction * h.square().mean())
    with geohooks.instrument(model, [editor]):
        train(model, inputs)
        plain, direction.grad = direction.grad, None
        enable(model, reentrant=reentrant)
        train(model, inputs)
    torch.testing.assert_close(direction.grad, plain, rtol=1e-5, atol=1e-6)


def test_a_recorder_that_keeps_what_autograd_saves_does_not_disturb_the_checkpoint():
    """A loss of hidden states that were heard under a checkpoint has its gradient."""
    model, inputs = trainable("llama")

    class Keeps(Plugin):
        @hookimpl
        def on_hidden(self, event):
            event.call.share.setdefault("terms", []).append(event.value.square().tanh().mean())

        @hookimpl
        def sites(self):
            return ["decoder.*.output"]

        @hookimpl
        def loss_terms(self, call):
            return {"size": sum(call.share["terms"])}

    with geohooks.instrument(model, [Keeps()]) as host:
        found = []
        for _ in range(2):
            (loss_of(model, inputs) + host.loss()["size"]).backward()
            found.append(gradients(model))
            enable(model, reentrant=False)
    agree(*found)


def test_two_hosts_under_one_checkpoint_do_not_disturb_each_other():
    model, inputs = trainable("llama")
    both = [Editor("decoder.0.mlp", lambda h: h * 2, "a"), Editor("decoder.0.mlp", lambda h: h + h.tanh(), "b")]
    with geohooks.instrument(model, both):
        _, plain = train(model, inputs)
    enable(model, reentrant=False)
    recorder = Recorder()
    with geohooks.instrument(model, both[:1]), geohooks.instrument(model, [both[1], recorder]):
        _, found = train(model, inputs)
    agree(found, plain)
    assert recorder.heard().count("decoder.0.mlp") == 1


def test_checkpointing_may_be_enabled_after_the_host_came():
    model, inputs = trainable("llama")
    editor, recorder = Editor("decoder.*.mlp", bend), Recorder()
    with geohooks.instrument(model, [editor, recorder]) as host:
        _, plain = train(model, inputs)
        recorder.records.clear()
        enable(model, reentrant=False)
        _, found = train(model, inputs)
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
        model.activation_checkpointing_disable()
        _, after = train(model, inputs)
    agree(found, plain)
    agree(after, plain)
    enable(model, reentrant=False)
    train(model, inputs)


@REENTRANT
@pytest.mark.parametrize("leaves", ["host", "editor"])
def test_an_edit_is_missed_in_the_backward_pass_of_a_host_that_left(leaves, reentrant):
    """The recompute would run without the edit: an error, not wrong gradients."""
    model, inputs = trainable("llama")
    enable(model, reentrant=reentrant)
    with geohooks.instrument(model, [Editor("decoder.0.attention", bend), Recorder()]) as host:
        loss = loss_of(model, inputs)
        if leaves == "host":
            host.detach()
        else:
            host.remove("editor")
        with pytest.raises(PluginError, match=r"decoder\.0\.attention"):
            loss.backward()


def test_a_pause_around_the_backward_pass_does_not_take_the_edit_away():
    model, inputs = trainable("llama")
    enable(model, reentrant=False)
    with geohooks.instrument(model, [Editor("decoder.0.attention", bend)]) as host:
        _, expected = train(model, inputs)
        loss = loss_of(model, inputs)
        with host.paused():
            loss.backward()
    agree(gradients(model), expected)


# Checkpoints that are not transformers' own


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "vit"])
@pytest.mark.parametrize("implementation", list(CheckpointImpl))
def test_checkpoint_wrappers_of_torch_distributed(family, implementation):
    model, inputs = trainable(family)
    # Not the last sublayer: a checkpoint that is not reentrant stops once all that the model saved is there again.
    site = "vision.*.attention" if family == "vit" else "decoder.*.attention"
    model.config.use_cache = False  # a cache would be filled a second time in the recompute
    with geohooks.instrument(model, [Editor(site, bend)]):
        _, plain = train(model, inputs)
    layers = {type(block.module) for block in geohooks.instrument(model).anatomy.main.blocks}
    if implementation is CheckpointImpl.REENTRANT:
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: type(module) in layers)
    recorder, editor = Recorder(), Editor(site, bend)
    before = state_of(model)
    with geohooks.instrument(model, [recorder, editor]) as host:
        _, found = train(model, inputs)
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
    assert state_of(model) == before
    assert editor.recomputed == 2
    strip = "_checkpoint_wrapped_module."
    agree({name.replace(strip, ""): gradient for name, gradient in found.items()}, plain)


class PlainlyCheckpointed:
    """Puts torch's own checkpoint around the forward pass of every block."""

    def __init__(self, model, *, reentrant):
        for layer in model.model.layers:
            layer.forward = self.checkpointed(layer.forward, reentrant=reentrant)

    def checkpointed(self, forward, *, reentrant):
        return lambda hidden, **options: checkpoint(partial(forward, **options), hidden, use_reentrant=reentrant)


@REENTRANT
def test_under_a_foreign_checkpoint_recorders_hear_each_site_once(reentrant):
    model, inputs = trainable("llama")
    model.config.use_cache = False
    _, plain = train(model, inputs)
    PlainlyCheckpointed(model, reentrant=reentrant)
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]) as host:
        _, found = train(model, inputs)
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
    agree(found, plain)


@REENTRANT
def test_under_a_foreign_checkpoint_an_edit_is_refused(reentrant):
    model, inputs = trainable("llama")
    model.config.use_cache = False
    PlainlyCheckpointed(model, reentrant=reentrant)
    with geohooks.instrument(model, [Editor("decoder.0.attention", bend)]):
        loss = loss_of(model, inputs)
        with pytest.raises(PluginError, match=r"'decoder\.0\.attention' was edited .* checkpoint"):
            loss.backward()


@REENTRANT
def test_under_a_foreign_checkpoint_an_edit_of_a_router_is_refused(reentrant):
    model, inputs = trainable("qwen3_moe")
    model.config.use_cache = False
    PlainlyCheckpointed(model, reentrant=reentrant)
    with geohooks.instrument(model, [Editor("decoder.0.router", bend)]):
        loss = loss_of(model, inputs)
        with pytest.raises(PluginError, match=r"'decoder\.0\.router' was edited"):
            loss.backward()


@REENTRANT
def test_under_a_foreign_checkpoint_an_edit_outside_of_it_is_right(reentrant):
    model, inputs = trainable("llama")
    model.config.use_cache = False
    editor = partial(Editor, ["decoder.0.output", "decoder.final_norm", "logits"], bend)
    with geohooks.instrument(model, [editor()]):
        _, plain = train(model, inputs)
    PlainlyCheckpointed(model, reentrant=reentrant)
    with geohooks.instrument(model, [editor()]):
        _, found = train(model, inputs)
    agree(found, plain)
