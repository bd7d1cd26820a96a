"""The Adapter contract: how a family of models says where its tensors pass and how it routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from geohooks.anatomy import Anatomy, Block

__all__ = ["Adapter", "RouterOutput"]


@attrs.frozen(eq=False)
class RouterOutput:
    """What a router decided: `logits` `[tokens, experts]`, `indices` and `weights` `[tokens, chosen]`."""

    logits: Tensor
    indices: Tensor
    weights: Tensor


class Adapter:
    """CONTRACT ONLY FOR NOW."""

    name: str

    def anatomy(self, model: nn.Module) -> Anatomy:
        """What `model` is made of; an `AdapterError` says what was looked for and not found."""
        raise NotImplementedError

    def roles(self, block: Block) -> tuple[str, ...]:
        """The roles that `weight` answers for in this block."""
        raise NotImplementedError

    def weight(self, block: Block, role: str) -> Tensor:
        """`[out, in]`"""
        raise NotImplementedError

    def bias(self, block: Block, role: str) -> Tensor | None:
        """`[out]`, or None"""
        raise NotImplementedError

    def expert_weight(self, block: Block, expert: int, role: str) -> Tensor:
        """`[out, in]` for `gate`, `up`, `down` of one routed expert."""
        raise NotImplementedError

    def routing(self, block: Block, output: Any) -> RouterOutput:
        """What the router's own `output` says."""
        raise NotImplementedError

    def scores(self, block: Block, logits: Tensor) -> Tensor:
        """What the choice was made on, `[..., experts]`; -inf where the family's groups make an expert ineligible."""
        raise NotImplementedError

    def probabilities(self, block: Block, logits: Tensor) -> Tensor:
        """The router's distribution over all experts `[..., experts]`, summing to one."""
        raise NotImplementedError

    def route(self, block: Block, hidden: Tensor, logits: Tensor) -> Any:
        """The router's output (as its own forward returns it) for other `logits` `[tokens, experts]`."""
        raise NotImplementedError

    def expert_outputs(self, block: Block, hidden: Tensor, experts: Tensor) -> Tensor:
        """What the named experts answer for `hidden` `[tokens, width]`, chosen or not, unweighted.

        `experts` `[tokens, n]` -> `[tokens, n, width]`.
        """
        raise NotImplementedError

    def tokens(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The token ids `[batch, position]` of the main stack, or None (a ViT has patches)."""
        raise NotImplementedError

    def loss(self, model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """The family's own loss of `logits` for `inputs["labels"]`, without auxiliary terms; None: not known."""
        raise NotImplementedError
