"""Tiny random models of many families: real architectures with nothing learned, for tests and examples."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from geohooks.errors import DataError

__all__ = ["example_inputs", "families", "untrained"]

_SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # about hidden_size ** -0.5: at the usual 0.02 every output of so narrow a model is close to uniform
    "initializer_range": 0.2,
    **_SPECIAL,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
_MIXTURE = {**_DECODER, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

_FAMILIES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_MIXTURE, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_MIXTURE, "head_dim": 8, "norm_topk_prob": True},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_DECODER, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_DECODER,
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_DECODER,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.2,
            **_SPECIAL,
        },
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 128},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **_SPECIAL,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 10,
            "initializer_range": 0.2,
        },
    ),
}


def families() -> tuple[str, ...]:
    """The families that `untrained` can build."""
    return tuple(_FAMILIES)


def untrained(family: str, *, seed: int = 0, **config_overrides: Any) -> nn.Module:
    """A tiny randomly initialised model of `family`, in evaluation mode; same arguments, same weights.

    Width 32, two or three layers, 99 tokens (0 is padding, 1 ends a text); `config_overrides` are fields of
    the family's transformers config. The caller's random state is left as it was. Raises `DataError` for an
    unknown family or field, naming the nearest ones.
    """
    config_name, model_name, fields = _family(family)
    config_class = getattr(transformers, config_name)
    known = set(vars(config_class())) | set(config_class.attribute_map) | {"num_labels", "attn_implementation"}
    for name in config_overrides:
        if name not in known:
            nearest = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or "none"
            raise DataError(f"{config_name} has no field '{name}'; nearest are {nearest}")
    config = config_class(**{**fields, **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, model_name)(config)
        _fill_correction_biases(model)
    return model.eval()


def example_inputs(
    model_or_family: nn.Module | str, batch: int = 2, length: int = 8, seed: int = 0
) -> dict[str, Tensor]:
    """Random valid inputs: `input_ids` `[batch, length]`, with `decoder_input_ids` of the same shape for an
    encoder-decoder, or `pixel_values` `[batch, channels, height, width]` for a vision model.

    No token is padding or another special one, except the decoder's start token. On the model's device.
    """
    model = untrained(model_or_family) if isinstance(model_or_family, str) else model_or_family
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    if hasattr(config, "patch_size"):
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(device)}

    def tokens() -> Tensor:
        return torch.randint(len(_SPECIAL), config.vocab_size, (batch, length), generator=generator)

    inputs = {"input_ids": tokens()}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens()
        inputs["decoder_input_ids"][:, 0] = config.decoder_start_token_id
    return {name: value.to(device) for name, value in inputs.items()}


def _family(name: str) -> tuple[str, str, Mapping[str, Any]]:
    if name not in _FAMILIES:
        nearest = ", ".join(difflib.get_close_matches(name, _FAMILIES, n=3, cutoff=0.3)) or "none"
        raise DataError(f"no untrained family '{name}'; nearest are {nearest}; families: {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def _fill_correction_biases(model: nn.Module) -> None:
    """DeepSeek starts its routers' correction biases at zero, where a mistake about them would not show."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
