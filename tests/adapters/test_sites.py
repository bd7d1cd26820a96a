"""Every site that an adapter names is where the model's computation passes."""

from __future__ import annotations

import pytest
import torch
import transformers

import geohooks_qwen
from geohooks.anatomy import Heads
from geohooks.errors import AdapterError

DECODER = ("input", "attention", "mlp", "output", "pattern")
KNOWN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_unnormalised",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v3_biased",
    "t5",
    "t5_gated",
    "vit",
)
STRUCTURAL = ("gpt2", "bert", "opt", "falcon", "bloom", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe")


def kinds(anatomy, stack, layer):
    return {site.kind for site in anatomy.stack(stack).blocks[layer].sites()}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_dense_decoder_has_the_usual_sites(subject, name):
    anatomy = subject(name).anatomy
    assert [stack.name for stack in anatomy.stacks] == ["decoder"]
    assert [kinds(anatomy, "decoder", layer) for layer in range(2)] == [set(DECODER)] * 2
    assert str(anatomy.sites[0]) == "decoder.embedding"
    assert [str(site) for site in anatomy.sites[-2:]] == ["decoder.final_norm", "logits"]
    assert (anatomy.logits, anatomy.outputs, anatomy.main.width) == ("vocabulary", 99, 32)
    assert not anatomy.has_experts


def test_only_layers_with_experts_have_a_router(subject):
    anatomy = subject("qwen3_moe_unnormalised").anatomy
    assert kinds(anatomy, "decoder", 0) == set(DECODER)
    assert kinds(anatomy, "decoder", 1) == {*DECODER, "router"}
    assert anatomy.has_experts


@pytest.mark.parametrize(
    ("name", "chosen", "shared"), [("qwen3_moe", 2, False), ("deepseek_v3", 3, True), ("qwen2_moe", 2, True)]
)
def test_the_mixture_is_counted(subject, name, chosen, shared):
    experts = subject(name).block().experts
    assert (experts.count, experts.chosen) == (8, chosen)
    assert (experts.shared is not None) == shared
    assert (experts.shared_gate is not None) == (name == "qwen2_moe")


def test_an_encoder_and_a_decoder_are_two_stacks(subject):
    anatomy = subject("t5", num_decoder_layers=3).anatomy
    assert [(stack.name, len(stack.blocks)) for stack in anatomy.stacks] == [("encoder", 2), ("decoder", 3)]
    assert kinds(anatomy, "encoder", 0) == set(DECODER)
    assert kinds(anatomy, "decoder", 0) == {*DECODER, "cross_attention", "cross_pattern"}
    assert anatomy.main.name == "decoder"


def test_an_encoder_alone_has_no_logits(subject, subject_of):
    config = subject("t5").model.config
    anatomy = subject_of(transformers.T5EncoderModel(config).eval()).anatomy
    assert [stack.name for stack in anatomy.stacks] == ["encoder"]
    assert anatomy.logits is None


@pytest.mark.parametrize(
    ("name", "base", "logits"),
    [("llama", "LlamaModel", None), ("t5", "T5Model", None), ("vit", "ViTModel", None)],
)
def test_a_model_without_a_head_has_no_logits(subject, subject_of, name, base, logits):
    whole = subject(name)
    part = subject_of(getattr(transformers, base)(whole.model.config).eval())
    assert part.anatomy.logits is logits
    assert [stack.name for stack in part.anatomy.stacks] == [stack.name for stack in whole.anatomy.stacks]


def test_a_classifier_has_classes(subject, subject_of):
    config = subject("qwen2").model.config
    config.num_labels = 3
    found = subject_of(transformers.Qwen2ForSequenceClassification(config).eval())
    assert (found.anatomy.logits, found.anatomy.outputs) == ("classes", 3)
    assert found.run().shape == (2, 3)
    assert (subject("vit").anatomy.logits, subject("vit").anatomy.outputs) == ("classes", 10)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", Heads(4, 2, 8, 8)),
        ("deepseek_v3", Heads(4, 4, 12, 6)),
        ("t5", Heads(4, 4, 8, 8)),
        ("vit", Heads(4, 4, 8, 8)),
        ("falcon", Heads(4, 1, 8, 8)),
    ],
)
def test_heads_are_those_of_the_attention_call(subject, name, heads):
    assert subject(name).block().heads == heads


@pytest.mark.parametrize("name", KNOWN + STRUCTURAL)
def test_what_passes_at_a_tap_is_what_the_model_uses(subject, heard, name):
    found = subject(name)
    plain = found.run()
    taps = {site: tap for site, tap in found.taps().items() if site.kind != "router"}
    with heard(taps) as values:
        assert torch.equal(found.run(), plain)
    assert set(values) == set(taps)
    for site, value in values.items():
        positions = value.numel() // found.anatomy.stack(site.stack).width
        # OPT flattens batch and position around its feed-forward layer
        flat = name == "opt" and site.kind == "mlp"
        assert value.shape == ((positions,) if flat else (2, positions // 2)) + (32,)
    generator = torch.Generator().manual_seed(2)
    for site, tap in taps.items():
        noise = torch.randn(values[site].shape, generator=generator)
        with heard({site: tap}, lambda _, value, noise=noise: value + noise):
            moved = (found.run() - plain).abs().max()
        assert moved > 1e-3, f"{site} does not reach the logits"


@pytest.mark.parametrize("name", KNOWN)
def test_the_sublayers_sum_to_the_block(subject, heard, name):
    found = subject(name)
    with heard(found.taps()) as values:
        found.run()
    blocks = [block for stack in found.anatomy.stacks for block in stack.blocks]
    for block in blocks:
        parts = {site.kind: values[site] for site in block.sites() if site in values and site.kind != "router"}
        output = parts.pop("output")
        assert block.additive
        torch.testing.assert_close(sum(parts.values()), output)


@pytest.mark.parametrize("name", STRUCTURAL)
def test_what_is_read_by_structure_claims_no_sum(subject, name):
    anatomy = subject(name).anatomy
    assert anatomy.adapter.name == "structural"
    assert not any(block.additive for stack in anatomy.stacks for block in stack.blocks)


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_follow_each_other(subject, heard, name):
    found = subject(name)
    with heard(found.taps()) as values:
        found.run()
    by_name = {str(site): value for site, value in values.items()}
    for stack in found.anatomy.stacks:
        assert torch.equal(by_name[f"{stack.name}.embedding"], by_name[f"{stack.name}.0.input"])
        assert torch.equal(by_name[f"{stack.name}.0.output"], by_name[f"{stack.name}.1.input"])


def test_a_causal_decoder_is_not_moved_by_later_positions(subject, heard):
    found = subject("qwen3_moe")
    tap = found.taps()[found.anatomy.select("decoder.0.output")[0]]

    def last(_, value):
        return torch.cat([value[:, :-1], value[:, -1:] + 1], dim=1)

    plain = found.run()
    with heard({"output": tap}, last):
        edited = found.run()
    torch.testing.assert_close(edited[:, :-1], plain[:, :-1])
    assert not torch.allclose(edited[:, -1], plain[:, -1])


def test_adapting_the_largest_models_touches_no_weight():
    config = transformers.Qwen3MoeConfig(num_hidden_layers=60, num_experts=128)
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    weights = list(model.parameters())
    found = geohooks_qwen.adapt(model).anatomy(model)
    assert len(found.main.blocks) == 60
    assert found.main.blocks[-1].experts.count == 128
    assert all(weight is same and same.is_meta for weight, same in zip(weights, model.parameters(), strict=True))
    with pytest.raises(AdapterError, match="meta"):
        found.adapter.weight(found.main.blocks[0], "q")
