"""`weight(block, role)` is the matrix that the model multiplies with, however it is stored."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import accelerate
import peft
import pytest
import torch
from torch import nn

from geohooks.anatomy import Tap
from geohooks.errors import AdapterError
from geohooks.weights import LinearMap, linear_map

GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
ATTENTION = {role: f"self_attn.{role}_proj" for role in "qkvo"}
SHARED = {f"shared_{role}": path.replace("mlp.", "mlp.shared_experts.") for role, path in GATED.items()}
T5_ATTENTION = {role: f"layer.0.SelfAttention.{role}" for role in "qkvo"}
T5_CROSS = {f"cross_{role}": f"layer.1.EncDecAttention.{role}" for role in "qkvo"}
T5_MLP = "layer.2.DenseReluDense"
PROJECTIONS = {
    "llama": {**ATTENTION, **GATED},
    "mistral": {**ATTENTION, **GATED},
    "qwen2": {**ATTENTION, **GATED},
    "qwen3": {**ATTENTION, **GATED},
    "qwen3_moe": {**ATTENTION, "router": "mlp.gate"},
    "gpt_oss": {**ATTENTION, "router": "mlp.router"},
    "glm4_moe": {**ATTENTION, **SHARED, "router": "mlp.gate"},
    "deepseek_v3": {"o": ATTENTION["o"], "router": "mlp.gate", **SHARED},
    "deepseek_v3_biased": {"q": ATTENTION["q"], "o": ATTENTION["o"], "router": "mlp.gate", **SHARED},
    "t5": {**T5_ATTENTION, **T5_CROSS, "up": f"{T5_MLP}.wi", "down": f"{T5_MLP}.wo"},
    "t5_gated": {
        **T5_ATTENTION,
        **T5_CROSS,
        "gate": f"{T5_MLP}.wi_0",
        "up": f"{T5_MLP}.wi_1",
        "down": f"{T5_MLP}.wo",
    },
    "vit": {**{role: f"attention.{role}_proj" for role in "qkvo"}, "up": "mlp.fc1", "down": "mlp.fc2"},
    "gpt2": {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "bert": {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    "opt": {**ATTENTION, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
}
# PEFT asks transformers by a name that transformers has replaced.
PEFT_IS_BEHIND = "ignore:.*is_gradient_checkpointing.*:FutureWarning"
LATENT = {"deepseek_v2": ("q", "k", "v"), "deepseek_v3": ("q", "k", "v"), "deepseek_v3_biased": ("k", "v")}


def passing(subject, modules):
    """What enters and what leaves each of `modules` in one run, by name."""
    seen = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def note(_, args, kwargs, output, name=name):
                output = output[0] if isinstance(output, tuple) else output
                seen[name] = (args[0] if args else kwargs["hidden_states"], output)

            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        subject.run()
    return seen


def applied(subject, role, rows):
    weight, bias = (read(subject.block(), role) for read in (subject.adapter.weight, subject.adapter.bias))
    return nn.functional.linear(rows.to(weight.dtype), weight, bias)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_weight_applied_to_the_input_is_the_projection(subject, name):
    found = subject(name)
    expected = PROJECTIONS[name]
    layer = found.block().module
    seen = passing(found, {role: layer.get_submodule(path) for role, path in expected.items()})
    latent = {"q", "k", "k_position", "v"} if "deepseek" in name else set()
    assert set(found.adapter.roles(found.block())) == set(expected) | latent
    for role, (entered, left) in seen.items():
        torch.testing.assert_close(applied(found, role, entered).reshape(left.shape), left, msg=role)


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_is_composed_up_to_a_positive_scalar_a_token(subject, name):
    found = subject(name)
    attention = found.block().attention
    modules = {"block": attention, "kv": attention.kv_b_proj, "latent": attention.kv_a_proj_with_mqa}
    if attention.q_lora_rank is not None:
        modules["q"] = attention.q_b_proj
    seen = passing(found, modules)
    entered = seen["block"][0].reshape(16, 32)
    expanded = seen["kv"][1].reshape(16, 4, 8 + 6)
    expected = {"k": expanded[..., :8].reshape(16, 32), "v": expanded[..., 8:].reshape(16, 24)}
    if "q" in seen:
        expected["q"] = seen["q"][1].reshape(16, 48)
    assert set(expected) == set(LATENT[name])
    for role, projection in expected.items():
        composed = applied(found, role, entered)
        scale = (projection * composed).sum(-1) / (composed * composed).sum(-1)
        assert (scale > 0).all()
        assert scale.std() > 1e-3, "the scalar differs by token, or this test would show nothing"
        torch.testing.assert_close(scale[:, None] * composed, projection)
    exact = applied(found, "k_position", entered)
    torch.testing.assert_close(exact, seen["latent"][1].reshape(16, -1)[:, 12:])


def test_a_plain_weight_is_the_parameter_itself(subject):
    found = subject("llama")
    block = found.block()
    assert found.adapter.weight(block, "q") is block.attention.q_proj.weight
    conv = subject("gpt2")
    module = conv.block().mlp.c_fc
    assert conv.adapter.weight(conv.block(), "up").data_ptr() == module.weight.data_ptr()


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", {"q": "q_proj", "down": "down_proj"}), ("t5", {"cross_q": "q", "up": "wi"}), ("gpt2", {"up": "c_fc"})],
)
def test_adapted_weights_are_the_merged_ones(subject, subject_of, name, targets, use_dora):
    base = subject(name).model
    fan_in_fan_out = name == "gpt2"
    config = peft.LoraConfig(
        r=3,
        target_modules=list(targets.values()),
        lora_dropout=0.5,
        use_dora=use_dora,
        init_lora_weights=False,
        fan_in_fan_out=fan_in_fan_out,
    )
    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    tuned.train()
    found = subject_of(tuned.get_base_model())
    merged = subject_of(copy.deepcopy(tuned).merge_and_unload())
    for role in targets:
        before = merged.adapter.weight(merged.block(), role)
        torch.testing.assert_close(found.adapter.weight(found.block(), role), before)
        with tuned.disable_adapter():
            plain = found.adapter.weight(found.block(), role)
        assert not torch.allclose(plain, before)
    assert all(module.training for module in tuned.modules()), "materialising leaves training mode on"


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_adapted_experts_are_the_merged_ones(subject, subject_of):
    config = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        init_lora_weights=False,
    )
    base = subject("qwen3_moe")
    tuned = peft.get_peft_model(copy.deepcopy(base.model), config)
    found = subject_of(tuned.get_base_model())
    merged = subject_of(copy.deepcopy(tuned).merge_and_unload())
    for role in ("gate", "up", "down"):
        theirs = merged.adapter.expert_weight(merged.block(), 5, role)
        torch.testing.assert_close(found.adapter.expert_weight(found.block(), 5, role), theirs)
        assert not torch.allclose(theirs, base.adapter.expert_weight(base.block(), 5, role))
    theirs = merged.adapter.weight(merged.block(), "router")
    torch.testing.assert_close(found.adapter.weight(found.block(), "router"), theirs)
    hidden, experts = torch.randn(3, 32), torch.tensor([[0, 5], [1, 7], [2, 2]])
    torch.testing.assert_close(
        found.adapter.expert_outputs(found.block(), hidden, experts),
        merged.adapter.expert_outputs(merged.block(), hidden, experts),
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "deepseek_v3", "t5", "gpt2"])
def test_offloaded_weights_are_brought(subject, subject_of, name):
    plain = subject(name)
    model = copy.deepcopy(plain.model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    adapter, block = plain.adapter, type(plain.adapter)(model.config).anatomy(model).main.blocks[-1]
    assert all(weight.is_meta for weight in block.module.parameters())
    for role in adapter.roles(plain.block()):
        assert torch.equal(adapter.weight(block, role), adapter.weight(plain.block(), role)), role
        biases = adapter.bias(block, role), adapter.bias(plain.block(), role)
        assert biases == (None, None) or torch.equal(*biases), role
    if block.experts is not None:
        ours, theirs = (adapter.expert_weight(one, 2, "gate") for one in (block, plain.block()))
        assert torch.equal(ours, theirs)
        logits = torch.randn(4, 8)
        assert torch.equal(adapter.scores(block, logits), adapter.scores(plain.block(), logits))
    assert all(weight.is_meta for weight in block.module.parameters()), "they are offloaded again"


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_adapted_and_offloaded_weights_are_the_merged_ones(subject, subject_of):
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(subject("qwen2").model, config)
    merged = subject_of(copy.deepcopy(tuned).merge_and_unload())
    model = tuned.get_base_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    block = merged.adapter.anatomy(model).main.blocks[-1]
    for read in (merged.adapter.weight, merged.adapter.bias):
        torch.testing.assert_close(read(block, "q"), read(merged.block(), "q"))


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_a_router_that_is_trained_whole_is_the_one_that_runs(subject, subject_of, heard):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    tuned = peft.get_peft_model(copy.deepcopy(subject("qwen3_moe").model), config)
    with torch.no_grad():
        tuned.get_base_model().model.layers[-1].mlp.gate.modules_to_save["default"].weight.neg_()
    found = subject_of(tuned.get_base_model())
    block = found.block()
    site = next(site for site in block.sites() if site.kind == "router")
    with heard({site: block.taps["router"], "hidden": Tap(block.experts.router, "input")}) as values:
        found.run()
        again = found.adapter.route(block, values["hidden"], values[site][0])
        assert all(torch.equal(one, other) for one, other in zip(values[site], again, strict=True))
        trained = found.adapter.weight(block, "router")
        with tuned.disable_adapter():
            found.run()
            torch.testing.assert_close(found.adapter.weight(block, "router"), -trained)
    torch.testing.assert_close(values[site][0], values["hidden"] @ -trained.T)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights_are_those_that_the_model_multiplies_with(subject):
    found = subject("llama")
    exact = found.adapter.weight(found.block(), "q").detach().clone()
    quantised = torch.ao.quantization.quantize_dynamic(found.model, {nn.Linear}, dtype=torch.qint8)
    block = found.adapter.anatomy(quantised).main.blocks[-1]
    weight = found.adapter.weight(block, "q")
    step = exact.abs().max() / 127
    assert (weight - exact).abs().max() <= step
    assert not torch.equal(weight, exact)
    packed = block.attention.q_proj.weight()
    assert torch.equal(weight, packed.dequantize())


class Squared(nn.Linear):
    """Linear no more."""

    def forward(self, rows):
        return super().forward(rows) ** 2


class Untold(nn.Module):
    """Says nothing of its sizes."""

    def forward(self, rows):
        return rows


@pytest.mark.parametrize(
    ("module", "words"),
    [(Squared(32, 32), "Squared is not a linear map"), (Untold(), "Untold does not say how many numbers")],
)
def test_what_has_no_matrix_is_refused_by_name(subject, module, words):
    found = subject("llama")
    found.block().attention.q_proj = module
    with pytest.raises(AdapterError, match=words):
        found.adapter.weight(found.block(), "q")


def test_a_role_that_the_block_lacks_is_refused_with_those_it_has(subject):
    found = subject("vit")
    with pytest.raises(AdapterError, match=r"ViTLayer has no weight 'gate'.*it has q, k, v, o, up, down"):
        found.adapter.weight(found.block(), "gate")


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(AdapterError, match="Linear has its weights on the meta device"):
        linear_map(nn.Linear(3, 2, device="meta"))


def test_affine_maps_compose():
    torch.manual_seed(0)
    inner = LinearMap(torch.randn(4, 3), torch.randn(4))
    outer = LinearMap(torch.randn(5, 4), torch.randn(5))
    gain, rows = torch.randn(4), torch.randn(6, 3)
    through = (rows @ inner.weight.T + inner.bias) * gain @ outer.weight.T + outer.bias
    whole = outer.after(inner, gain)
    torch.testing.assert_close(rows @ whole.weight.T + whole.bias, through)
    part = whole.rows(slice(1, 3))
    torch.testing.assert_close(rows @ part.weight.T + part.bias, through[:, 1:3])
