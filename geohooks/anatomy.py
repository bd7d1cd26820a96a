"""What an adapter says of a model: its stacks of blocks, and the modules behind each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import attrs
from torch import nn

from geohooks.errors import AdapterError
from geohooks.sites import BLOCK_KINDS, Site, select

if TYPE_CHECKING:
    from geohooks.adapter import Adapter

__all__ = ["Anatomy", "Block", "Experts", "Heads", "Stack", "Tap"]


@attrs.frozen(eq=False)
class Tap:
    """Where a tensor passes: at the `side` of `module`.

    On the input side the tensor is the keyword argument `name` where the call has it, else the positional
    argument 0. On the output side it is the output itself, or item 0 of a tuple or list.
    """

    module: nn.Module
    side: Literal["input", "output"] = "output"
    name: str = "hidden_states"


@attrs.frozen
class Heads:
    """Attention heads of one block: how many query and key/value heads, and their widths."""

    query: int
    key_value: int
    dimension: int
    value_dimension: int


@attrs.frozen(eq=False)
class Experts:
    """The mixture of one block: its router, its routed experts, and the expert every token passes, if any.

    `count` experts, of which `chosen` serve each token.
    """

    router: nn.Module
    module: nn.Module
    count: int
    chosen: int
    shared: nn.Module | None = None
    shared_gate: nn.Module | None = None


@attrs.frozen(eq=False)
class Block:
    """One layer of a stack.

    `taps` maps the kinds `input`, `output`, `attention`, `cross_attention`, `mlp`, `router` to where their tensors
    pass, as far as the block has them. `attention` and `cross_attention` are the modules whose attention calls are
    the sites `pattern` and `cross_pattern`: None where the model does not use transformers' attention interface.
    `additive` says whether input + attention (+ cross_attention) + mlp = output in this family.
    """

    stack: str
    layer: int
    module: nn.Module
    taps: Mapping[str, Tap]
    attention: nn.Module | None = None
    cross_attention: nn.Module | None = None
    mlp: nn.Module | None = None
    experts: Experts | None = None
    heads: Heads | None = None
    additive: bool = True

    def sites(self) -> tuple[Site, ...]:
        """The sites of this block, in a fixed order of kinds."""
        patterns = {"pattern": self.attention, "cross_pattern": self.cross_attention}
        present = {*self.taps, *(kind for kind, module in patterns.items() if module is not None)}
        return tuple(Site(self.stack, self.layer, kind) for kind in BLOCK_KINDS if kind in present)


@attrs.frozen(eq=False)
class Stack:
    """A stack of like blocks under one module, `width` numbers a position.

    `module` is the module whose forward pass runs the blocks; `embedding` is what enters the first block before any
    block has touched it, `final_norm` what leaves the norm after the last one.
    """

    name: str
    module: nn.Module
    blocks: tuple[Block, ...]
    width: int
    embedding: Tap | None = None
    final_norm: Tap | None = None
    norm_epsilon: float | None = None

    def sites(self) -> tuple[Site, ...]:
        """The sites of this stack in order of execution by block."""
        first = (Site(self.name, None, "embedding"),) if self.embedding is not None else ()
        last = (Site(self.name, None, "final_norm"),) if self.final_norm is not None else ()
        return (*first, *(site for block in self.blocks for site in block.sites()), *last)


@attrs.frozen(eq=False, slots=False)
class Anatomy:
    """What an adapter says of `model`: its stacks and what its output distribution is over.

    `logits` is "vocabulary" (`[batch, position, outputs]`), "classes" (`[batch, outputs]`), or None for a model
    without a head; `outputs` is the last size. With `streams` > 1 the residual stream is
    `[batch, position, streams, width]`.
    """

    model: nn.Module
    adapter: Adapter
    stacks: tuple[Stack, ...]
    logits: Literal["vocabulary", "classes"] | None
    outputs: int | None = None
    streams: int = 1

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the model."""
        logits = (Site(None, None, "logits"),) if self.logits is not None else ()
        return (*(site for stack in self.stacks for site in stack.sites()), *logits)

    @property
    def main(self) -> Stack:
        """The stack that makes the output: `decoder` where there is one, else the first."""
        return next((stack for stack in self.stacks if stack.name == "decoder"), self.stacks[0])

    @property
    def has_experts(self) -> bool:
        """Whether any block has a router."""
        return any(block.experts is not None for stack in self.stacks for block in stack.blocks)

    def select(self, selectors: str | Site | Iterable[str | Site]) -> tuple[Site, ...]:
        """The sites that the selectors match; a `SelectorError` names the nearest where one matches nothing."""
        return select(selectors, self.sites)

    def stack(self, name: str) -> Stack:
        """The stack called `name`."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        names = ", ".join(stack.name for stack in self.stacks)
        raise AdapterError(f"{type(self.model).__name__} has no stack '{name}'; it has {names}")

    def block(self, site: Site) -> Block:
        """The block that `site` lies in."""
        if site.stack is None or site.layer is None:
            raise AdapterError(f"'{site}' lies in no block; sites in blocks are like 'decoder.3.output'")
        return self.stack(site.stack).blocks[site.layer]

    def tap(self, site: Site) -> Tap:
        """Where the tensor of `site` passes; not for `logits` and patterns, which no module's side gives."""
        if site.layer is not None:
            found = self.block(site).taps.get(site.kind)
        elif site.stack is not None:
            stack = self.stack(site.stack)
            found = {"embedding": stack.embedding, "final_norm": stack.final_norm}.get(site.kind)
        else:
            found = None
        if found is None:
            raise AdapterError(f"'{site}' is no side of a module in {type(self.model).__name__}")
        return found
