"""DeepSeek V2 and V3: latent attention, and routers that choose within groups of experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geohooks.adapter import Adapter, Names
from geohooks.anatomy import Block
from geohooks.discovery import model_type
from geohooks.markers import hookimpl
from geohooks.weights import LinearMap, linear_map, present

__all__ = ["DeepSeek", "adapt"]

FAMILIES = ("deepseek_v2", "deepseek_v3")


class DeepSeek(Adapter):
    """Queries, keys and values are read from normed latents, except the keys' part with position.

    A latent's norm divides each token by its own root mean square: the composed maps of `q`, `k` and `v`
    leave that positive scalar out. Where queries have no latent `q` is exact; `k_position`, which all heads
    share, is.
    """

    name = "deepseek"
    attention_projections: ClassVar[Names] = {
        "q": ("q_b_proj", "q_proj"),
        "k": ("kv_b_proj",),
        "k_position": ("kv_a_proj_with_mqa",),
        "v": ("kv_b_proj",),
        "o": ("o_proj",),
    }

    def linear(self, block: Block, role: str) -> LinearMap:
        """The map of `role`, composed where it passes a latent."""
        attention: Any = self.find_attention(block.module)[0]
        if role == "q" and attention.q_lora_rank is not None:
            latent = linear_map(attention.q_a_proj)
            return linear_map(attention.q_b_proj).after(latent, _gain(attention.q_a_layernorm))
        if role in ("k", "v", "k_position"):
            latent = linear_map(attention.kv_a_proj_with_mqa)
            if role == "k_position":
                return latent.rows(slice(attention.kv_lora_rank, None))
            expanded = linear_map(attention.kv_b_proj).rows(_rows(attention, role))
            return expanded.after(latent.rows(slice(attention.kv_lora_rank)), _gain(attention.kv_a_layernorm))
        return super().linear(block, role)


def _rows(attention: Any, role: str) -> Tensor:
    """The outputs of `kv_b_proj` that are keys, or values: each head has its keys first, then its values."""
    keys, values = attention.qk_nope_head_dim, attention.v_head_dim
    rows = torch.arange(attention.num_heads * (keys + values)).reshape(attention.num_heads, keys + values)
    return (rows[:, :keys] if role == "k" else rows[:, keys:]).flatten()


def _gain(norm: Any) -> Tensor:
    with present(norm) as keep:
        return keep(norm.weight)


@hookimpl
def adapt(model: nn.Module) -> Adapter | None:
    """The adapter of `model` if it is of this family."""
    return DeepSeek(model.config) if model_type(model) in FAMILIES else None
