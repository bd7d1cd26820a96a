"""Tiny models of every family, read by the adapter that answers for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import attrs
import pytest
import torch
import transformers
from torch import Tensor, nn

import geohooks_deepseek
import geohooks_llama
import geohooks_qwen
import geohooks_structural
import geohooks_t5
import geohooks_vit
from geohooks.adapter import Adapter
from geohooks.anatomy import Anatomy, Block, Tap
from geohooks.sites import Site
from geohooks.zoo.untrained import example_inputs, untrained

ADAPTERS = (
    geohooks_llama,
    geohooks_qwen,
    geohooks_deepseek,
    geohooks_t5,
    geohooks_vit,
    geohooks_structural,
)

_SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_DEEPSEEK_V2 = {
    **_SHAPE,
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_GLM4 = {
    **_SHAPE,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

FROM_ZOO: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_unnormalised": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0]}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3_biased": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    "t5": ("t5", {}),
    "t5_gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "vit": ("vit", {}),
    "gpt2": ("gpt2", {}),
    "bert": ("bert", {}),
    "gpt_oss": ("gpt_oss", {}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
}
FROM_TRANSFORMERS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_SHAPE, "num_key_value_heads": 2, "intermediate_size": 48},
    ),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", _DEEPSEEK_V2),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", _GLM4),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", _SHAPE),
    "bloom": ("BloomConfig", "BloomForCausalLM", _SHAPE),
}


@attrs.frozen(eq=False)
class Subject:
    """A model, what its adapter says of it, and inputs for it."""

    model: Any
    adapter: Adapter
    anatomy: Anatomy
    inputs: Mapping[str, Tensor]

    def run(self, **extra: Any) -> Tensor:
        """The model's logits, or its last hidden state."""
        with torch.no_grad():
            output = self.model(**self.inputs, **extra)
        return output["logits"] if "logits" in output else output["last_hidden_state"]

    def taps(self) -> dict[Site, Tap]:
        """Every site that is a side of a module."""
        sites = [site for site in self.anatomy.sites if site.stack and "pattern" not in site.kind]
        return {site: self.anatomy.tap(site) for site in sites}

    def block(self, layer: int = -1) -> Block:
        """A block of the main stack."""
        return self.anatomy.main.blocks[layer]


@contextmanager
def heard(taps: Mapping[Any, Tap], edit: Callable[[Any, Any], Any] | None = None) -> Iterator[dict[Any, Any]]:
    """What passes at `taps`, by key: tensors, except where a tap's output is a tuple for routers."""
    values: dict[Any, Any] = {}

    def see(key: Any, value: Any) -> Any:
        values[key] = value
        return value if edit is None else edit(key, value)

    with ExitStack() as stack:
        for key, tap in taps.items():
            if tap.side == "input":

                def before(_: nn.Module, args: Any, kwargs: Any, key: Any = key, tap: Tap = tap) -> Any:
                    if tap.name in kwargs:
                        return args, {**kwargs, tap.name: see(key, kwargs[tap.name])}
                    return (see(key, args[0]), *args[1:]), kwargs

                handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
            else:

                def after(_: nn.Module, args: Any, output: Any, key: Any = key) -> Any:
                    if isinstance(output, tuple) and getattr(key, "kind", "") != "router":
                        return (see(key, output[0]), *output[1:])
                    return see(key, output)

                handle = tap.module.register_forward_hook(after)
            stack.callback(handle.remove)
        yield values


def read(model: nn.Module) -> tuple[Adapter, Anatomy]:
    """The answer of the first adapter that knows `model`."""
    adapter = next(answer for module in ADAPTERS if (answer := module.adapt(model)) is not None)
    return adapter, adapter.anatomy(model)


def _make(name: str, **overrides: Any) -> Subject:
    if name in FROM_ZOO:
        family, fields = FROM_ZOO[name]
        return _of(_roughened(untrained(family, **{**fields, **overrides})))
    config_name, model_name, fields = FROM_TRANSFORMERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**{**fields, **overrides})
        return _of(_roughened(getattr(transformers, model_name)(config).eval()))


def _roughened(model: nn.Module) -> nn.Module:
    """The model with no bias or gain left at a neutral value, where a mistake would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def _of(model: Any) -> Subject:
    adapter, anatomy = read(model)
    return Subject(model, adapter, anatomy, example_inputs(model))


@pytest.fixture(scope="session")
def subject() -> Callable[..., Subject]:
    """A factory of subjects by name."""
    return _make


@pytest.fixture(scope="session")
def subject_of() -> Callable[[Any], Subject]:
    """A factory of subjects of a given model."""
    return _of


@pytest.fixture(scope="session")
def lasting() -> Callable[[str], Subject]:
    """Subjects by name that are made once, for tests that change nothing in them."""
    return cache(_make)


@pytest.fixture(name="heard", scope="session")
def heard_fixture() -> Callable[..., Any]:
    """`heard`, for tests."""
    return heard
