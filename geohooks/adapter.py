"""The Adapter contract: how a family of models says where its tensors pass and how it routes.

`Adapter` is also its default: what families share is read from the model's own modules, and a family
overrides what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from geohooks.anatomy import Anatomy, Block, Experts, Heads, Stack, Tap
from geohooks.discovery import (
    attention_modules,
    calls_attention_interface,
    declared,
    declared_layers,
    first_of,
    mixture_of_experts,
    runner_of,
    stack_name,
)
from geohooks.errors import AdapterError
from geohooks.routing import RouterOutput, RouterRun, read_output, router_width, run_router
from geohooks.weights import LinearMap, applied_to_identity, expert_parameter, linear_map, unwrapped

__all__ = ["Adapter", "RouterOutput"]

Names = Mapping[str, tuple[str, ...]]

_ATTENTION_ROLES = ("q", "k", "k_position", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o")
_MLP_ROLES = ("gate", "up", "down", "router", "shared_gate", "shared_up", "shared_down")
_CLASSIFIERS = ("score", "classifier", "classification_head.out_proj")


class Adapter:
    """How one family of models is read; every method has a default that families of the usual shape keep.

    A family states the names of its modules: `embedding` and `final_norm` in a stack, `mlp` in a block, and
    those of the linear maps of each role, relative to the attention and to the feed-forward layer (the first
    that is there counts); `additive` is as in `Block`. `config` is the model's configuration, if it has one.
    """

    name = "adapter"
    embedding = "embed_tokens"
    final_norm = "norm"
    mlp = "mlp"
    attention_projections: ClassVar[Names] = {
        "q": ("q_proj",),
        "k": ("k_proj",),
        "v": ("v_proj",),
        "o": ("o_proj",),
    }
    mlp_projections: ClassVar[Names] = {"gate": ("gate_proj",), "up": ("up_proj",), "down": ("down_proj",)}
    additive = True

    def __init__(self, config: Any = None) -> None:
        """An adapter for models of this `config`."""
        self.config = config

    def anatomy(self, model: nn.Module) -> Anatomy:
        """What `model` is made of; an `AdapterError` says what was looked for and not found."""
        routers = declared(model, "router_logits")
        stacks = tuple(self._stack(model, path, layers, routers) for path, layers in self.find_layers(model).items())
        logits, outputs = self.head(model)
        return Anatomy(model, self, stacks, logits, outputs)

    def find_layers(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """The lists of layers in `model`, by the path of what holds each list."""
        lists = declared_layers(model)
        if not lists:
            classes = ", ".join(one.__name__ for one in declared(model, "hidden_states"))
            raise AdapterError(
                f"{type(model).__name__} has no blocks that the adapter '{self.name}' can find: it looked "
                "for modules of the classes whose hidden states transformers declares to record "
                f"({classes or 'none declared'}); pass adapter= with an Adapter of your own, or instrument "
                "the transformer inside this model"
            )
        return lists

    def _stack(
        self, model: nn.Module, path: str, layers: list[nn.Module], routers: tuple[type[nn.Module], ...]
    ) -> Stack:
        name = self.stack_name(model, path, layers[0])
        final_norm = self.find_final_norm(model, path)
        return Stack(
            name=name,
            module=runner_of(model, path),
            blocks=tuple(self._block(name, index, layer, routers) for index, layer in enumerate(layers)),
            width=self.width(model, path),
            embedding=self.find_embedding(model, path),
            final_norm=None if final_norm is None else Tap(final_norm),
            norm_epsilon=first_of(final_norm, ("variance_epsilon", "eps")),
        )

    def _block(self, stack: str, index: int, layer: nn.Module, routers: tuple[type[nn.Module], ...]) -> Block:
        attention, cross_attention = self.find_attention(layer)
        experts = mixture_of_experts(layer, routers)
        taps = {"input": Tap(layer, "input"), "output": Tap(layer)}
        taps |= {kind: Tap(module) for kind, module in self.added(layer).items()}
        if experts is not None:
            taps["router"] = Tap(experts.router)
        return Block(
            stack=stack,
            layer=index,
            module=layer,
            taps=taps,
            attention=_if_interface(attention),
            cross_attention=_if_interface(cross_attention),
            mlp=self.find_mlp(layer),
            experts=experts,
            heads=None if attention is None else self.heads(attention),
            additive=self.additive,
        )

    def stack_name(self, model: nn.Module, path: str, layer: nn.Module) -> str:
        """What the stack whose layers lie at `path` is called."""
        return stack_name(model, path, layer)

    def width(self, model: nn.Module, path: str) -> int:
        """How many numbers a position has in the stack whose layers lie at `path`."""
        runner: Any = runner_of(model, path)
        return int(runner.config.hidden_size)

    def find_embedding(self, model: nn.Module, path: str) -> Tap | None:
        """Where the tensor passes that enters the first layer at `path`."""
        module = getattr(runner_of(model, path), self.embedding, None)
        return None if module is None else Tap(module)

    def find_final_norm(self, model: nn.Module, path: str) -> nn.Module | None:
        """The norm after the last layer at `path`."""
        return getattr(runner_of(model, path), self.final_norm, None)

    def find_attention(self, layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """The self-attention and the cross-attention of `layer`."""
        return attention_modules(layer)

    def find_mlp(self, layer: nn.Module) -> nn.Module | None:
        """The feed-forward layer of `layer`, dense or a mixture."""
        return getattr(layer, self.mlp, None)

    def added(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The modules whose outputs `layer` adds to the stream, by kind."""
        attention, cross_attention = self.find_attention(layer)
        modules = {"attention": attention, "cross_attention": cross_attention, "mlp": self.find_mlp(layer)}
        return {kind: module for kind, module in modules.items() if module is not None}

    def heads(self, attention: nn.Module) -> Heads | None:
        """The heads of `attention`, from its configuration and attributes."""
        config: Any = getattr(attention, "config", None)
        query = first_of(config, ("num_attention_heads",)) or first_of(attention, ("num_heads",))
        if query is None:
            return None
        dimension = first_of(attention, ("qk_head_dim", "head_dim", "key_value_proj_dim", "attention_head_size"))
        dimension = dimension or config.hidden_size // query
        return Heads(
            query=query,
            key_value=first_of(attention, ("num_kv_heads", "config.num_key_value_heads")) or query,
            dimension=dimension,
            value_dimension=first_of(attention, ("v_head_dim",)) or dimension,
        )

    def head(self, model: nn.Module) -> tuple[Literal["vocabulary", "classes"] | None, int | None]:
        """What the model's logits are over and how many there are; "classes" are one row a sequence."""
        transformer: Any = model
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if output is not None:
            return "vocabulary", int(first_of(output, ("out_features",)) or transformer.config.vocab_size)
        if getattr(model, "loss_type", None) in ("ForSequenceClassification", "ForImageClassification"):
            classifier = first_of(model, _CLASSIFIERS)
            return "classes", int(first_of(classifier, ("out_features",)) or transformer.config.num_labels)
        return None, None

    def roles(self, block: Block) -> tuple[str, ...]:
        """The roles that `weight` answers for in this block."""
        roles = (*_ATTENTION_ROLES, *_MLP_ROLES)
        return tuple(role for role in roles if self.projection(block, role) is not None)

    def weight(self, block: Block, role: str) -> Tensor:
        """`[out, in]`: with `bias`, the projection of the sublayer's input before head norm and rotation.

        Roles are `q k v o`, their `cross_` forms, `gate up down`, their `shared_` forms, and `router`;
        latent attention has `k` without position, and `k_position`. A plain linear layer gives its own
        parameter; what is wrapped, offloaded or quantised is materialised. An `AdapterError` names a role
        that the block lacks, and a map that is no matrix.
        """
        return self.linear(block, role).weight

    def bias(self, block: Block, role: str) -> Tensor | None:
        """`[out]`, or None where the map has none."""
        return self.linear(block, role).bias

    def linear(self, block: Block, role: str) -> LinearMap:
        """The map of `role`; families that fuse or factor their weights take it apart here."""
        module = self.projection(block, role)
        if module is None:
            raise AdapterError(
                f"{type(block.module).__name__} has no weight '{role}' that the adapter '{self.name}' can "
                f"find; it has {', '.join(self.roles(block)) or 'none'}"
            )
        return self._router_map(block) if role == "router" else linear_map(module)

    def projection(self, block: Block, role: str) -> nn.Module | None:
        """The module that computes `role` in `block`, or None."""
        kind, _, rest = role.rpartition("_")
        if role == "router":
            return first_of(block.experts, ("router",))
        if kind == "shared":
            return first_of(block.experts, tuple(f"shared.{name}" for name in self.mlp_projections.get(rest, ())))
        if role in self.mlp_projections:
            owner = block.module if block.mlp is None else block.mlp
            return first_of(owner, self.mlp_projections[role])
        attention = self.find_attention(block.module)[kind == "cross"]
        return first_of(attention, self.attention_projections.get(role.removeprefix("cross_"), ()))

    def _router_map(self, block: Block) -> LinearMap:
        experts = _mixture(block)
        width = router_width(unwrapped(experts.router), experts.count)
        return applied_to_identity(
            experts.router, width, lambda rows: self.routing(block, experts.router.forward(rows)).logits
        )

    def expert_weight(self, block: Block, expert: int, role: str) -> Tensor:
        """`[out, in]` for `gate`, `up`, `down` of one routed expert."""
        experts = _mixture(block)
        if not 0 <= expert < experts.count:
            raise AdapterError(f"{block.stack}.{block.layer} has experts 0 to {experts.count - 1}, not {expert}")
        return expert_parameter(experts.module, expert, role)

    def routing(self, block: Block, output: Any) -> RouterOutput:
        """What the router's own `output` says."""
        experts = _mixture(block)
        return read_output(unwrapped(experts.router), output, experts.count)

    def route(self, block: Block, hidden: Tensor, logits: Tensor, *arguments: Any) -> Any:
        """The router's output (as its own forward returns it) for other `logits` `[tokens, experts]`.

        `hidden` and `arguments` are what the router was called with. Gradients flow from the output to
        `logits`; no hook on the router is called.
        """
        experts = _mixture(block)
        return run_router(unwrapped(experts.router), hidden, RouterRun(logits, experts.count), *arguments)

    def scores(self, block: Block, logits: Tensor) -> Tensor:
        """What the choice was made on, `[..., experts]`; -inf where groups make an expert ineligible."""
        run = self._watched(block, logits)
        if run.scores is None:
            raise AdapterError(
                f"{type(unwrapped(_mixture(block).router)).__name__} takes no top-k over its experts; "
                "override `scores` in the adapter"
            )
        return _computing(run.scores).reshape(logits.shape)

    def probabilities(self, block: Block, logits: Tensor) -> Tensor:
        """The router's distribution over all experts `[..., experts]`, summing to one.

        What the router makes of all its logits before it chooses (softmax, sigmoid, ...), normalised; their
        softmax where it chooses first.
        """
        run = self._watched(block, logits)
        if run.affinities is None:
            return _computing(logits).softmax(-1)
        affinities = _computing(run.affinities).reshape(logits.shape)
        return affinities / affinities.sum(-1, keepdim=True)

    def _watched(self, block: Block, logits: Tensor) -> RouterRun:
        experts = _mixture(block)
        router = unwrapped(experts.router)
        rows = logits.reshape(-1, experts.count)
        hidden = rows.new_zeros(1, 1).expand(len(rows), router_width(router, experts.count))
        run = RouterRun(rows, experts.count, ineligible=-torch.inf)
        run_router(router, hidden, run)
        return run

    def expert_outputs(self, block: Block, hidden: Tensor, experts: Tensor) -> Tensor:
        """What the named experts answer for `hidden` `[tokens, width]`, chosen or not, unweighted.

        `experts` `[tokens, n]` -> `[tokens, n, width]`. The experts' own forward pass runs, whatever its
        implementation, and no hook on it is called. An expert that does not exist is an `AdapterError`.
        """
        mixture = _mixture(block)
        if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < mixture.count:
            raise AdapterError(
                f"experts {int(experts.min())} to {int(experts.max())} were asked for; "
                f"{block.stack}.{block.layer} has 0 to {mixture.count - 1}"
            )
        tokens, count = experts.shape
        rows = hidden.repeat_interleave(count, dim=0)
        output = mixture.module.forward(rows, experts.reshape(-1, 1), rows.new_ones(len(rows), 1))
        return output.reshape(tokens, count, output.shape[-1])

    def tokens(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The token ids `[batch, position]` of the main stack, or None (a ViT has patches)."""
        seq2seq = getattr(self.config, "is_encoder_decoder", False)
        return inputs.get("decoder_input_ids" if seq2seq else "input_ids")

    def loss(self, model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """The family's own loss of `logits` for `inputs["labels"]`, no auxiliary terms; None: not known."""
        transformer: Any = model
        kind = getattr(model, "loss_type", None)
        labels = inputs.get("labels")
        if labels is None:
            return None
        if kind in ("ForCausalLM", "ForMaskedLM"):
            given = {name: inputs[name] for name in ("num_items_in_batch", "shift_labels") if name in inputs}
            return transformer.loss_function(
                logits=logits, labels=labels, vocab_size=transformer.config.vocab_size, **given
            )
        if kind in ("ForSequenceClassification", "ForImageClassification"):
            return transformer.loss_function(labels, logits, transformer.config)
        return None


def _if_interface(attention: nn.Module | None) -> nn.Module | None:
    return attention if attention is not None and calls_attention_interface(attention) else None


def _mixture(block: Block) -> Experts:
    if block.experts is None:
        raise AdapterError(
            f"{block.stack}.{block.layer} ({type(block.module).__name__}) has no experts that a router chooses"
        )
    return block.experts


def _computing(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
