"""The base model's answer to the same inputs: in memory, or the same model with its adapter off."""

from __future__ import annotations

import pytest
import torch
import transformers
from bases import Asks, adapted, pair, run
from recorders import Calls, Logits, Recorder, same, state_of
from torch import nn

import geohooks
from geohooks import Plugin, ReferenceMismatch, hookimpl, measures, zoo
from geohooks.reference import Answer, DisabledAdapter, InMemory

# What PEFT asks of a model when it wraps it is deprecated in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2", "t5", "vit", "bert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_memory_answers_as_it_does_alone(family):
    base, tuned, inputs = pair(family)
    alone = run(base, inputs)
    bare = run(tuned, inputs)
    before = state_of(base)
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        assert same(run(tuned, inputs), bare)
    assert same(asks.base[0], alone)
    assert not asks.base[0].requires_grad
    assert state_of(base) == before


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "t5", "vit"])
def test_a_disabled_adapter_answers_as_the_base_does_alone(family):
    base = zoo.untrained(family)
    model = adapted(family)
    inputs = zoo.example_inputs(base)
    bare = run(model, inputs)
    asks = Asks()
    with geohooks.instrument(model, [asks], reference="disable_adapter"):
        assert same(run(model, inputs), bare)
    assert same(asks.base[0], run(base, inputs))
    assert not same(asks.base[0], asks.tuned[0])


def test_a_base_in_training_answers_in_evaluation_and_is_put_back():
    base = zoo.untrained("llama", attention_dropout=0.3)
    inputs = zoo.example_inputs(base)
    alone = run(base, inputs)
    base.train()
    base.model.layers[1].eval()
    flags = [module.training for module in base.modules()]
    asks = Asks()
    with geohooks.instrument(zoo.untrained("llama", seed=1), [asks], reference=base) as host:
        run(host.model, inputs)
    assert same(asks.base[0], alone)
    assert [module.training for module in base.modules()] == flags


def test_a_disabled_adapter_in_training_answers_in_evaluation():
    model = adapted(lora_dropout=0.5)
    inputs = zoo.example_inputs("llama")
    alone = run(zoo.untrained("llama"), inputs)
    model.train()
    asks = Asks()
    with geohooks.instrument(model, [asks], reference="disable_adapter"):
        torch.manual_seed(0)
        output = model(**inputs).logits
        output.logsumexp(-1).sum().backward()
    assert same(asks.base[0], alone)
    assert all(module.training for module in model.modules())
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.grad is not None
    torch.manual_seed(0)
    assert same(model(**inputs).logits.detach(), output.detach())


@pytest.mark.parametrize("how", ["memory", "adapter"])
def test_the_base_speaks_to_no_plugin(how):
    if how == "memory":
        base, model, inputs = pair("qwen3_moe")
    else:
        base, model, inputs = "disable_adapter", adapted("qwen3_moe"), pair("qwen3_moe")[2]
    recorder, calls = Recorder(), Calls(lambda call: call.reference)
    others = Recorder()
    with geohooks.instrument(model, [others]), geohooks.instrument(model, [recorder, calls], reference=base) as host:
        run(model, inputs)
        wanted = sorted(map(str, host.anatomy.sites))
    assert sorted(recorder.heard()) == sorted(others.heard()) == wanted
    assert len(calls.ended) == len(calls.started) == 1


def test_the_base_may_be_asked_at_any_time_of_a_call_and_answers_once():
    base, tuned, inputs = pair("qwen3_moe")
    alone = run(base, inputs)
    passes = []
    handle = base.register_forward_hook(lambda *_: passes.append(1))

    class Asks(Plugin):
        def __init__(self):
            self.seen = []

        @hookimpl
        def sites(self):
            return ["decoder.0.output", "decoder.1.router", "logits"]

        @hookimpl
        def on_call_start(self, call):
            self.seen.append(call.reference)

        @hookimpl
        def on_hidden(self, event):
            self.seen.append(event.call.reference)

        @hookimpl
        def on_router(self, event):
            self.seen.append(event.call.reference)

        @hookimpl
        def on_logits(self, event):
            self.seen.append(event.call.reference)

        @hookimpl
        def on_call_end(self, call):
            self.seen.append(call.reference)

    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        run(tuned, inputs)
    handle.remove()
    assert len(asks.seen) == 5
    assert all(one is asks.seen[0] for one in asks.seen)
    assert same(asks.seen[0], alone)
    assert passes == [1]


def test_nobody_asks_and_the_base_does_not_run():
    base, tuned, inputs = pair("llama")
    passes = []
    handle = base.register_forward_hook(lambda *_: passes.append(1))
    with geohooks.instrument(tuned, [Recorder()], reference=base):
        run(tuned, inputs)
    handle.remove()
    assert passes == []


def test_the_reference_of_a_call_that_failed_may_be_asked_for_again():
    base, tuned, inputs = pair("llama")
    asks = Asks()
    handle = base.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with geohooks.instrument(tuned, [asks], reference=base):
        with pytest.raises(MemoryError):
            run(tuned, inputs)
        handle.remove()
        run(tuned, inputs)
    assert same(asks.base[-1], run(base, inputs))


def test_labels_do_not_reach_the_base_and_the_comparison_has_them():
    base, tuned, inputs = pair("llama")
    looks = Logits(lambda event: event.comparison)
    with geohooks.instrument(tuned, [looks], reference=base), torch.no_grad():
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        base_loss = base(**inputs, labels=inputs["input_ids"]).loss
    (comparison,) = looks.seen
    torch.testing.assert_close(comparison.tuned.nll.nanmean(), loss)
    torch.testing.assert_close(comparison.base.nll.nanmean(), base_loss)
    expected = measures.compare_logits(run(tuned, inputs), run(base, inputs))
    torch.testing.assert_close(comparison.forward_kl, expected.forward_kl)


def test_a_model_compared_with_itself_has_no_divergence():
    base, _, inputs = pair("llama")
    looks = Logits(lambda event: event.comparison)
    with geohooks.instrument(base, [looks], reference=zoo.untrained("llama")):
        run(base, inputs)
    assert (looks.seen[0].forward_kl == 0).all()
    assert (looks.seen[0].reverse_kl == 0).all()


@pytest.mark.parametrize(
    ("family", "how"), [("qwen3_moe", "memory"), ("qwen3_moe", "adapter"), ("deepseek_v3", "memory")]
)
def test_the_routers_of_the_base_are_those_of_the_base(family, how):
    base, tuned, inputs = pair(family)
    model = tuned if how == "memory" else adapted(family)
    alone = Recorder("decoder.*.router")
    with geohooks.instrument(base, [alone]):
        run(base, inputs)
    calls = Calls(lambda call: call.reference_routing)
    own = Recorder("decoder.*.router")
    with geohooks.instrument(model, [calls, own], reference=base if how == "memory" else "disable_adapter"):
        run(model, inputs)
    (routing,) = calls.seen
    assert {str(site) for site in routing} == set(alone.heard())
    for site, event in routing.items():
        assert same(event.value, alone.at(str(site))[0])
        assert event.indices.shape == event.weights.shape
        assert event.probabilities.sum(-1).allclose(torch.ones(2, 8))
    last = alone.heard()[-1]
    assert not torch.equal(own.at(last)[0], alone.at(last)[0])


# What can't be compared


def test_vocabularies_that_differ_by_padding_are_compared_on_the_shared_ids():
    base, tuned, inputs = pair("llama")[0], zoo.untrained("llama", vocab_size=128, seed=1), pair("llama")[2]
    looks = Logits(lambda event: event.comparison)
    with geohooks.instrument(tuned, [looks], reference=base):
        run(tuned, inputs)
    (comparison,) = looks.seen
    assert comparison.shared_ids == 99
    expected = measures.compare_logits(run(tuned, inputs)[..., :99], run(base, inputs))
    torch.testing.assert_close(comparison.forward_kl, expected.forward_kl)


def test_other_vocabularies_are_a_mismatch():
    tuned = zoo.untrained("llama")
    before = state_of(tuned)
    with pytest.raises(ReferenceMismatch, match="has 5000 outputs over vocabulary, and LlamaForCausalLM 99"):
        geohooks.instrument(tuned, [Asks()], reference=zoo.untrained("llama", vocab_size=5000))
    assert state_of(tuned) == before


def test_a_base_without_a_head_is_a_mismatch():
    base, tuned, _ = pair("llama")
    with pytest.raises(ReferenceMismatch, match="LlamaModel has no head"):
        geohooks.instrument(tuned, reference=base.model)


def test_a_base_of_another_kind_is_a_mismatch():
    tuned = zoo.untrained("llama")
    classifier = transformers.LlamaForSequenceClassification(tuned.config)
    with pytest.raises(ReferenceMismatch):
        geohooks.instrument(tuned, reference=classifier)
    with pytest.raises(ReferenceMismatch):
        geohooks.instrument(tuned, reference=zoo.untrained("vit"))


def test_a_model_without_an_adapter_has_none_to_disable():
    with pytest.raises(ReferenceMismatch, match="LlamaForCausalLM has no adapter to disable"):
        geohooks.instrument(zoo.untrained("llama"), reference="disable_adapter")


@pytest.mark.parametrize("wrong", ["disable", 3, nn.Linear])
def test_what_is_no_reference_is_a_mismatch(wrong):
    with pytest.raises(ReferenceMismatch, match="none of: a base model"):
        geohooks.instrument(zoo.untrained("llama"), reference=wrong)


def test_without_a_reference_there_is_none():
    model, inputs = zoo.untrained("llama"), pair("llama")[2]
    calls = Calls(lambda call: (call.reference, call.reference_routing))
    with geohooks.instrument(model, [calls]) as host:
        run(model, inputs)
        assert host.reference is None
    assert calls.seen == [(None, {})]


def test_a_reference_of_ones_own():
    model, inputs = zoo.untrained("llama"), pair("llama")[2]

    class Uniform:
        def answer(self, call):
            return Answer(torch.zeros(*call.token_ids.shape, 99), {})

    looks = Logits(lambda event: event.comparison.base.entropy)
    with geohooks.instrument(model, [looks], reference=Uniform()):
        run(model, inputs)
    torch.testing.assert_close(looks.seen[0], torch.full((2, 8), 99.0).log())


def test_references_may_be_made_beforehand():
    base, tuned, inputs = pair("llama")
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=InMemory(base)):
        run(tuned, inputs)
    assert same(asks.base[0], run(base, inputs))
    assert DisabledAdapter(adapted()).anatomy.outputs == 99


def test_a_failing_reference_drops_the_plugin_that_asked_where_the_user_asked_for_that():
    _, tuned, inputs = pair("llama")

    class Fails:
        def answer(self, call):
            raise ReferenceMismatch("nothing to say")

    bare = run(tuned, inputs)
    with geohooks.instrument(tuned, [Asks()], reference=Fails(), on_error="detach") as host:
        assert same(run(tuned, inputs), bare)
        assert host.plugins == {}
    with geohooks.instrument(tuned, [Asks()], reference=Fails()), pytest.raises(ReferenceMismatch, match="nothing"):
        run(tuned, inputs)
