"""What a user asks of a host: joining and leaving, checking, pausing, reporting, terms of the loss."""

from __future__ import annotations

import pytest
import torch
import transformers
from recorders import Calls, Editor, Recorder, Scores, hook_count, logits_of, same
from torch import nn

import geohooks
from geohooks import AdapterError, GeohooksError, Plugin, PluginError, SelectorError, hookimpl, zoo


@pytest.fixture
def llama():
    return zoo.untrained("llama")


@pytest.fixture
def inputs(llama):
    return zoo.example_inputs(llama)


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


# Check


def test_check_says_what_passed_where(llama, inputs):
    recorder = Recorder()
    with geohooks.instrument(llama, [recorder]) as host:
        table = host.check(**inputs)
        assert list(host.plugins) == ["recorder"]
        assert set(table.shapes) == set(host.anatomy.sites)
    assert table.silent == ()
    assert table.shapes[geohooks.Site.parse("decoder.0.output")] == (2, 8, 32)
    assert table.shapes[geohooks.Site.parse("logits")] == (2, 8, 99)
    lines = str(table).splitlines()
    assert len(lines) == len(table.shapes)
    assert any(line.split() == ["decoder.0.output", "2x8x32"] for line in lines)


def test_check_of_a_host_that_hears_nothing_is_empty(llama, inputs):
    with geohooks.instrument(llama) as host:
        assert host.check(**inputs).shapes == {}
        assert hook_count(llama) == 0


def test_check_asks_only_for_what_is_heard(llama, inputs):
    with geohooks.instrument(llama, [Recorder("decoder.1.output"), Scores()]) as host:
        assert [str(site) for site in host.check(**inputs).shapes] == ["decoder.1.output"]


class Skips(nn.Module):
    """In the place of a block, lets everything pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_check_raises_the_table_for_a_site_that_never_fires(llama, inputs):
    with geohooks.instrument(llama, [Recorder("decoder.*.output")]) as host:
        llama.model.layers[1] = Skips(llama.model.layers[1])
        with pytest.raises(AdapterError) as caught:
            host.check(**inputs)
        lines = [line.split() for line in str(caught.value).splitlines()]
        assert ["decoder.0.output", "2x8x32"] in lines
        assert ["decoder.1.output", "never", "fired"] in lines
        assert list(host.plugins) == ["recorder"]
    assert hook_count(llama) == 0


def test_check_raises_for_a_stack_that_the_call_leaves_out():
    model = zoo.untrained("t5")
    inputs = zoo.example_inputs(model)
    with torch.no_grad():
        encoded = model.encoder(input_ids=inputs["input_ids"])
    with geohooks.instrument(model, [Recorder(["encoder.0.output", "decoder.0.output"])]) as host:
        assert len(host.check(**inputs).shapes) == 2
        with pytest.raises(AdapterError, match=r"encoder\.0\.output +never fired"):
            host.check(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"])


def test_a_site_that_was_asked_for_and_did_not_pass_is_an_error(llama, inputs):
    calls = Calls()
    with geohooks.instrument(llama, [Recorder("decoder.*.output"), calls]):
        llama.model.layers[1] = Skips(llama.model.layers[1])
        for _ in range(2):
            with pytest.raises(AdapterError, match=r"decoder\.1\.output did not pass in this call"):
                run(llama, inputs)
    assert calls.ended == []


def test_a_stack_that_is_not_run_is_no_gap():
    model = zoo.untrained("t5")
    inputs = zoo.example_inputs(model)
    with torch.no_grad():
        encoded = model.encoder(input_ids=inputs["input_ids"])
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]) as host, torch.no_grad():
        model(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"])
        wanted = [str(site) for site in host.anatomy.sites if site.stack != "encoder"]
    assert sorted(recorder.heard()) == sorted(wanted)


# Parts of a model, and models without a head


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "vit"])
def test_a_stack_called_directly_is_a_call(family):
    model = zoo.untrained(family)
    inputs = zoo.example_inputs(model)
    recorder, calls = Recorder(), Calls()
    stack = geohooks.instrument(model).anatomy.main
    with torch.no_grad():
        bare = stack.module(**inputs)[0]
        with geohooks.instrument(model, [recorder, calls]) as host:
            assert same(stack.module(**inputs)[0], bare)
    assert [call.stack for call in calls.ended] == [stack.name]
    assert sorted(recorder.heard()) == sorted(str(site) for site in host.anatomy.sites if site.stack == stack.name)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_part_of_a_pair_called_directly_is_a_call(name):
    model = zoo.untrained("t5")
    ids = zoo.example_inputs(model)["input_ids"]
    recorder, calls = Recorder(), Calls()
    with geohooks.instrument(model, [recorder, calls]) as host, torch.no_grad():
        states = model.encoder(input_ids=ids)[0]
        if name == "decoder":
            recorder.records.clear()
            model.decoder(input_ids=ids, encoder_hidden_states=states)
    assert calls.ended[-1].stack == name
    assert sorted(recorder.heard()) == sorted(str(site) for site in host.anatomy.sites if site.stack == name)


def test_a_block_called_outside_a_call_is_silent(llama, inputs):
    recorder, calls = Recorder(), Calls()
    with torch.no_grad():
        hidden = llama.model.embed_tokens(inputs["input_ids"])
        positions = llama.model.rotary_emb(hidden, torch.arange(8)[None])
        bare = llama.model.layers[0](hidden, position_embeddings=positions)
        with geohooks.instrument(llama, [recorder, calls]):
            assert same(llama.model.layers[0](hidden, position_embeddings=positions), bare)
            llama.model.embed_tokens(inputs["input_ids"])
            llama.lm_head(bare)
    assert recorder.records == calls.started == []


@pytest.mark.parametrize("family", ["llama", "t5", "vit", "bert"])
def test_a_model_without_a_head_has_no_logits(family):
    whole = zoo.untrained(family)
    model = transformers.T5Model(whole.config).eval() if family == "t5" else whole.base_model
    inputs = zoo.example_inputs(whole)
    recorder, calls = Recorder(), Calls()
    bare = run(model, inputs)
    with geohooks.instrument(model, [recorder, calls]) as host:
        assert same(run(model, inputs), bare)
        assert "logits" not in map(str, host.anatomy.sites)
        assert sorted(recorder.heard()) == sorted(map(str, host.anatomy.sites))
        with pytest.raises(SelectorError, match="'logits' matches no site"):
            host.add(Recorder("logits", "head"))
        if not hasattr(model, "generate"):
            with pytest.raises(GeohooksError, match="has no generate"):
                host.generate(**inputs)
    assert [call.stack for call in calls.ended] == [None]


def test_embeddings_may_be_given_in_the_place_of_tokens(llama, inputs):
    embedded = llama.model.embed_tokens(inputs["input_ids"]).detach()
    bare = run(llama, inputs)
    recorder, calls = Recorder(), Calls(lambda call: (call.token_ids, call.mask().shape))
    with geohooks.instrument(llama, [recorder, calls]) as host:
        assert same(run(llama, {"inputs_embeds": embedded}), bare)
    assert sorted(recorder.heard()) == sorted(str(site) for site in host.anatomy.sites if site.kind != "embedding")
    assert calls.seen == [(None, (2, 8))]
    assert recorder.records[0].positions.tolist() == [list(range(8))] * 2


def test_what_is_no_model_is_refused():
    with pytest.raises(AdapterError, match="dict is no torch"):
        geohooks.instrument({})
    with pytest.raises(AdapterError, match="Linear has no blocks"):
        geohooks.instrument(nn.Linear(2, 2))


# Pauses


def test_inside_a_pause_nothing_is_heard_and_nothing_edited(llama, inputs):
    recorder, calls, scores = Recorder(), Calls(), Scores(lambda s: -s)
    bare = run(llama, inputs)
    tokens = llama.generate(**inputs, max_new_tokens=2, do_sample=False)
    with geohooks.instrument(llama, [recorder, calls, scores, Editor("decoder.0.output", lambda h: -h)]) as host:
        with host.paused():
            assert same(run(llama, inputs), bare)
            with host.paused():
                pass
            assert torch.equal(llama.generate(**inputs, max_new_tokens=2, do_sample=False), tokens)
        assert recorder.records == calls.started == calls.ended == scores.heard == []
        assert not same(run(llama, inputs), bare)
        with pytest.raises(KeyError), host.paused():
            raise KeyError
        run(llama, inputs)
    assert len(calls.ended) == 2


def test_a_plugin_may_run_the_model_itself_in_a_pause(llama, inputs):
    class Asks(Plugin):
        answer = None

        @hookimpl
        def on_attach(self, host):
            self.host = host

        @hookimpl
        def sites(self):
            return ["decoder.0.output", "logits"]

        @hookimpl
        def on_hidden(self, event):
            event.value = event.value * 2

        @hookimpl
        def on_logits(self, event):
            with self.host.paused(), torch.no_grad():
                self.answer = event.call.anatomy.model(**event.call.inputs).logits

    bare = run(llama, inputs)
    asks, after = Asks(), Recorder("logits", "after")
    with geohooks.instrument(llama, [asks, after]):
        edited = run(llama, inputs)
    assert same(asks.answer, bare)
    assert same(after.at("logits")[0], edited)
    assert not same(edited, bare)


def test_one_host_pauses_alone(llama, inputs):
    one, other = Recorder("logits"), Recorder("logits")
    with geohooks.instrument(llama, [one]) as host, geohooks.instrument(llama, [other]), host.paused():
        run(llama, inputs)
    assert (len(one.records), len(other.records)) == (0, 1)


# Loss terms and reports


class Term(Plugin):
    def __init__(self, key, name):
        self.key = key
        self.name = name

    @hookimpl
    def sites(self):
        return ["decoder.0.output"]

    @hookimpl
    def on_hidden(self, event):
        event.call.share.setdefault(self.name, event.value.square().mean())

    @hookimpl
    def loss_terms(self, call):
        return {self.key: call.share[self.name]}

    @hookimpl
    def report(self, host):
        return f"{self.name} of {len(host.plugins)}"


def test_terms_of_the_loss_have_a_gradient_and_a_name(llama, inputs):
    with geohooks.instrument(llama, [Term("size", "one"), Term("spread", "two"), Calls()]) as host:
        assert host.loss() == {}
        llama(**inputs)
        terms = host.loss()
        assert list(terms) == ["size", "spread"]
        terms["size"].backward()
        assert llama.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        assert host.report() == {"one": "one of 3", "two": "two of 3"}


def test_terms_of_an_earlier_call_may_be_asked_for(llama, inputs):
    calls = Calls()
    with geohooks.instrument(llama, [Term("size", "one"), calls]) as host:
        llama(**inputs)
        llama(**zoo.example_inputs(llama, seed=3))
        first, second = (host.loss(call)["size"] for call in calls.ended)
        assert not torch.equal(first, second)
        assert torch.equal(host.loss()["size"], second)


def test_two_terms_of_one_name_are_an_error(llama, inputs):
    with geohooks.instrument(llama, [Term("size", "one"), Term("size", "two")]) as host:
        llama(**inputs)
        with pytest.raises(PluginError, match="'two' gives a second loss term 'size'"):
            host.loss()


def test_a_call_is_not_kept_alive_for_plugins_without_terms(llama, inputs):
    import gc
    import weakref

    with geohooks.instrument(llama, [Calls(lambda call: weakref.ref(call))]) as host:
        llama(**inputs)
        calls = host["calls"]
        calls.started.clear()
        calls.ended.clear()
        gc.collect()
        assert calls.seen[0]() is None
