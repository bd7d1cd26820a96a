"""The base model's answer to the same inputs: in memory, or the same model with its adapter off."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Calls, Logits, Recorder, logits_of, same, state_of, switching_often
from torch import nn
from transformers import DynamicCache

import geohooks
from geohooks import Plugin, ReferenceMismatch, hookimpl, measures, zoo
from geohooks.reference import Answer, DisabledAdapter, InMemory

# What PEFT asks of a model when it wraps it is deprecated in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2", "t5", "vit", "bert"]
DECODERS = ["llama", "qwen3_moe", "deepseek_v3", "gpt2"]


@cache
def pair(family):
    """A base and another model of the family that stands for the tuned one."""
    base, tuned = zoo.untrained(family), zoo.untrained(family, seed=1)
    for model in (base, tuned):
        if hasattr(model, "generation_config"):
            model.generation_config.eos_token_id = None
    return base, tuned, zoo.example_inputs(base)


def adapted(family="llama", **options):
    """A PEFT model whose adapter says something."""
    base = zoo.untrained(family)
    if family != "vit":
        base.generation_config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = {"t5": ["q", "v"], "vit": ["q_proj"]}.get(family, ["q_proj", "v_proj"])
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
        return peft.get_peft_model(base, config).eval()


class Asks(Plugin):
    """Asks for the base's logits in every call."""

    name = "asks"

    def __init__(self):
        self.tuned = []
        self.base = []
        self.positions = []

    @hookimpl
    def on_logits(self, event):
        self.tuned.append(event.value.detach().clone())
        self.base.append(event.call.reference)
        self.positions.append(event.positions)


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


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


# Generation


def forced(base, ids):
    """The base's logits at every position of a whole text."""
    return run(base, {"input_ids": ids})


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}, {"do_sample": True}])
def test_in_generation_the_base_reads_what_the_model_writes(family, options):
    base, tuned, inputs = pair(family)
    asks = Asks()
    torch.manual_seed(0)
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(**inputs, max_new_tokens=4, **{"do_sample": False, **options})
    whole = forced(base, tokens)
    assert len(asks.base) >= 4
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        for row in range(2):
            torch.testing.assert_close(logits[row], whole[row, positions[row]], rtol=1e-4, atol=2e-5)


def test_in_generation_a_disabled_adapter_reads_what_the_model_writes():
    model = adapted()
    base, _, inputs = pair("llama")
    bare = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    asks = Asks()
    with geohooks.instrument(model, [asks], reference="disable_adapter"):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, bare)
    whole = forced(base, tokens)
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        torch.testing.assert_close(logits, whole[:, positions[0]], rtol=1e-4, atol=2e-5)


def test_in_generation_of_a_pair_the_base_reads_what_the_model_writes():
    base, tuned, inputs = pair("t5")
    ids = inputs["input_ids"]
    asks = Asks()
    bare = tuned.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, bare)
    whole = run(base, {"input_ids": ids, "decoder_input_ids": tokens[:, :-1]})
    for step, logits in enumerate(asks.base):
        torch.testing.assert_close(logits[:, 0], whole[:, step], rtol=1e-4, atol=2e-5)


def test_a_pair_given_its_encoding_is_compared_with_the_base_s_own_encoding():
    base, tuned, inputs = pair("t5")
    with torch.no_grad():
        encoded = tuned.encoder(input_ids=inputs["input_ids"])
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base), pytest.raises(ReferenceMismatch, match="encoder"):
        run(tuned, {"encoder_outputs": encoded, "decoder_input_ids": inputs["decoder_input_ids"]})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "t5"])
def test_beams_are_reordered_in_the_base_too(family):
    base, tuned, inputs = pair(family)
    ids = inputs["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 5, "num_beams": 3}
    bare = tuned.generate(**options)
    seen = []

    class Compares(Plugin):
        @hookimpl
        def on_scores(self, event):
            seen.append((event.call.reference[:, -1], event.input_ids))

    with geohooks.instrument(tuned, [Compares()], reference=base):
        assert torch.equal(tuned.generate(**options), bare)
    assert len(seen) == 5
    for logits, tokens in seen:
        full = {"input_ids": tokens}
        if family == "t5":
            full = {"input_ids": ids.repeat_interleave(3, 0), "decoder_input_ids": tokens}
        torch.testing.assert_close(logits, run(base, full)[:, -1], rtol=1e-4, atol=2e-5)


@settings(max_examples=8, deadline=None)
@given(family=st.sampled_from(DECODERS), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3))
def test_left_padding_is_padding_for_the_base_too(family, lengths):
    base, tuned, _ = pair(family)
    ids = zoo.example_inputs(base, batch=len(lengths))["input_ids"]
    rows, mask = torch.zeros(len(lengths), 7, dtype=torch.int64), torch.zeros(len(lengths), 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        rows[row, 7 - length :] = ids[row, :length]
        mask[row, 7 - length :] = 1
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(input_ids=rows, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for row, length in enumerate(lengths):
        whole = forced(base, tokens[row : row + 1, 7 - length :])[0]
        for step, logits in enumerate(asks.base):
            torch.testing.assert_close(logits[row, -1], whole[length - 1 + step], rtol=1e-4, atol=2e-5)


def test_a_static_cache_has_a_cache_of_the_base_beside_it():
    base, tuned, inputs = pair("llama")
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    whole = forced(base, tokens)
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        torch.testing.assert_close(logits, whole[:, positions[0]], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("static", [False, True])
def test_one_generation_after_another_begins_with_an_empty_base(static):
    base, tuned, inputs = pair("llama")
    options = {"cache_implementation": "static"} if static else {}
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base):
        for _ in range(2):
            tuned.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
    for one, other in zip(asks.base[:3], asks.base[3:], strict=True):
        assert same(one, other)


def test_a_cache_that_the_model_makes_itself_is_followed():
    base, tuned, inputs = pair("llama")
    ids = inputs["input_ids"]
    asks = Asks()
    with geohooks.instrument(tuned, [asks], reference=base), torch.no_grad():
        first = tuned(input_ids=ids[:, :5], use_cache=True)
        tuned(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    whole = forced(base, ids)
    torch.testing.assert_close(torch.cat(asks.base, 1), whole, rtol=1e-4, atol=2e-5)


def test_a_cache_that_is_cropped_is_cropped_in_the_base_too():
    base, tuned, inputs = pair("llama")
    ids = inputs["input_ids"]
    asks = Asks()
    past = DynamicCache(config=tuned.config)
    with geohooks.instrument(tuned, [asks], reference=base), torch.no_grad():
        tuned(input_ids=ids, past_key_values=past)
        past.crop(-5)
        tuned(input_ids=ids[:, 3:6], past_key_values=past)
    torch.testing.assert_close(asks.base[1], forced(base, ids)[:, 3:6], rtol=1e-4, atol=2e-5)


def test_prompt_lookup_drafts_are_answered_by_the_base():
    base, tuned, _ = pair("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    asks = Asks()
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False, "prompt_lookup_num_tokens": 3}
    bare = tuned.generate(**options)
    with geohooks.instrument(tuned, [asks], reference=base):
        tokens = tuned.generate(**options)
    assert torch.equal(tokens, bare)
    whole = forced(base, tokens)
    # The first token of each pass was accepted; those after it may be drafts that were not.
    assert len(asks.base) > 1
    for logits, positions in zip(asks.base, asks.positions, strict=True):
        torch.testing.assert_close(logits[:, 0], whole[:, positions[0, 0]], rtol=1e-4, atol=2e-5)


def test_a_base_that_missed_a_call_is_a_mismatch():
    base, tuned, inputs = pair("llama")
    ids = inputs["input_ids"]
    past = DynamicCache(config=tuned.config)
    with torch.no_grad():
        tuned(input_ids=ids[:, :4], past_key_values=past)
        with (
            geohooks.instrument(tuned, [Asks()], reference=base),
            pytest.raises(ReferenceMismatch, match=r"holds 4 tokens and the reference's 0"),
        ):
            tuned(input_ids=ids[:, 4:], past_key_values=past)


def test_a_cache_that_was_followed_is_not_kept_alive():
    import gc
    import weakref

    base, tuned, inputs = pair("llama")
    past = DynamicCache(config=tuned.config)
    alive = weakref.ref(past)
    with geohooks.instrument(tuned, [Calls(lambda call: call.reference.shape)], reference=base) as host:
        run(tuned, {**inputs, "past_key_values": past})
        del past
        host["calls"].started.clear()
        host["calls"].ended.clear()
        gc.collect()
        assert alive() is None


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


# Threads and wrapped models


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
