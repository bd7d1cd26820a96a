"""The Adapter contract: how a family of models says where its tensors pass and how it routes.

`Adapter` is also its default: what families share is read from the model's modules here, and a family overrides
what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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
    stack_name,
)
from geohooks.errors import AdapterError
from geohooks.routing import RouterOutput, RouterRun, read_output, run_router
from geohooks.weights import LinearMap, applied_to_identity, expert_parameter, linear_map, unwrapped

__all__ = ["Adapter", "RouterOutput"]

ROLES = (
    "q",
    "k",
    "k_position",
    "v",
    "o",
    "cross_q",
    "cross_k",
    "cross_v",
    "cross_o",
    "gate",
    "up",
    "down",
    "router",
)
SHARED_ROLES = ("shared_gate", "shared_up", "shared_down")

_STACK_NAMES = {
    "encoder": "encoder",
    "decoder": "decoder",
    "vision": "vision",
    "visual": "vision",
    "text": "text",
}
_CLASSIFIERS = ("score", "classifier", "classification_head")


class Adapter:
    """How one family of models is read; every method has a default that families of the usual shape need not change.

    A family states the names of its modules: `embedding` and `final_norm` in a stack, `mlp` in a block, and those of the
    linear maps of each role in `attention_projections` and `mlp_projections` (the first name that is there counts);
    `additive` is as in `Block`. `config` is the model's configuration, where it has one.
    """

    name = "adapter"
    embedding = "embed_tokens"
    final_norm = "norm"
    mlp = "mlp"
    attention_projections: Mapping[str, tuple[str, ...]] = {
        "q": ("q_proj",),
        "k": ("k_proj",),
        "v": ("v_proj",),
        "o": ("o_proj",),
    }
    mlp_projections: Mapping[str, tuple[str, ...]] = {
        "gate": ("gate_proj",),
        "up": ("up_proj",),
        "down": ("down_proj",),
    }
    additive = True

    def __init__(self, config: Any = None) -> None:
        self.config = config

    # -- what the model is made of ------------------------------------------------------------------

    def anatomy(self, model: nn.Module) -> Anatomy:
        """What `model` is made of; an `AdapterError` says what was looked for and not found."""
        lists = self.find_layers(model)
        routers = declared(model, "router_logits")
        stacks = tuple(self._stack(model, path, layers, routers) for path, layers in lists.items())
        names = [stack.name for stack in stacks]
        if len(set(names)) < len(names):
            raise AdapterError(
                f"{type(model).__name__} has several stacks of blocks that are told apart by no name: "
                f"{', '.join(lists)}; pass adapter= with an Adapter whose find_layers chooses"
            )
        logits, outputs = self.head(model)
        return Anatomy(model, self, stacks, logits, outputs)

    def find_layers(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """The lists of layers in `model`, by the path of what holds each list."""
        lists = declared_layers(model)
        if not lists:
            classes = ", ".join(one.__name__ for one in declared(model, "hidden_states"))
            raise AdapterError(
                f"{type(model).__name__} has no blocks that the adapter '{self.name}' can find: it looked for modules of "
                f"the classes whose hidden states transformers declares to record ({classes or 'none declared'}); pass "
                "adapter= with an Adapter of your own, or instrument the transformer inside this model"
            )
        return lists

    def _stack(
        self, model: nn.Module, path: str, layers: list[nn.Module], routers: tuple[type[nn.Module], ...]
    ) -> Stack:
        holder = model.get_submodule(path)
        runner = model.get_submodule(path.rpartition(".")[0]) if isinstance(holder, nn.ModuleList) else holder
        name = stack_name(model, path, layers[0])
        final_norm = self.find_final_norm(runner)
        return Stack(
            name=name,
            module=runner,
            blocks=tuple(self._block(name, index, layer, routers) for index, layer in enumerate(layers)),
            width=self.width(runner, layers[0]),
            embedding=self.find_embedding(runner, layers[0]),
            final_norm=None if final_norm is None else Tap(final_norm),
            norm_epsilon=first_of(final_norm, ("variance_epsilon", "eps")),
        )

    def _block(self, stack: str, index: int, layer: nn.Module, routers: tuple[type[nn.Module], ...]) -> Block:
        attention, cross_attention = self.find_attention(layer)
        mlp = self.find_mlp(layer)
        experts = mixture_of_experts(layer, routers)
        added = {"attention": attention, "cross_attention": cross_attention, "mlp": mlp}
        taps = {"input": Tap(layer, "input"), "output": Tap(layer)}
        taps |= {kind: Tap(module) for kind, module in added.items() if module is not None}
        if experts is not None:
            taps["router"] = Tap(experts.router)
        return Block(
            stack=stack,
            layer=index,
            module=layer,
            taps=taps,
            attention=attention if attention and calls_attention_interface(type(attention)) else None,
            cross_attention=cross_attention,
            mlp=mlp,
            experts=experts,
            heads=None if attention is None else self.heads(attention),
            additive=self.additive,
        )

    def width(self, stack: nn.Module, layer: nn.Module) -> int:
        """How many numbers a position of the residual stream has."""
        return int(stack.config.hidden_size)

    def find_embedding(self, stack: nn.Module, layer: nn.Module) -> Tap | None:
        """Where what enters the first block passes."""
        module = getattr(stack, self.embedding, None)
        return None if module is None else Tap(module)

    def find_final_norm(self, stack: nn.Module) -> nn.Module | None:
        """The norm after the last block."""
        return getattr(stack, self.final_norm, None)

    def find_attention(self, layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """The self-attention and the cross-attention of `layer`: what calls transformers' attention interface."""
        return attention_modules(layer)

    def find_mlp(self, layer: nn.Module) -> nn.Module | None:
        """The module whose output the feed-forward sublayer of `layer` adds to the stream."""
        return getattr(layer, self.mlp, None)

    def heads(self, attention: nn.Module) -> Heads | None:
        """The heads of `attention`, from its configuration."""
        config = getattr(attention, "config", None)
        query = getattr(config, "num_attention_heads", None)
        if config is None or query is None:
            return None
        dimension = (
            first_of(attention, ("qk_head_dim", "head_dim", "key_value_proj_dim", "attention_head_size"))
            or config.hidden_size // query
        )
        return Heads(
            query=query,
            key_value=getattr(config, "num_key_value_heads", None) or query,
            dimension=dimension,
            value_dimension=first_of(attention, ("v_head_dim",)) or dimension,
        )

    def head(self, model: nn.Module) -> tuple[Literal["vocabulary", "classes"] | None, int | None]:
        """What the model's logits are over, and how many there are; heads that give one row a sequence are "classes"."""
        output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
        if output_embeddings is not None:
            return "vocabulary", int(
                first_of(output_embeddings, ("out_features",)) or model.config.vocab_size
            )
        if type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
            classifier = first_of(model, _CLASSIFIERS)
            return "classes", int(first_of(classifier, ("out_features",)) or model.config.num_labels)
        return None, None

    # -- weights ------------------------------------------------------------------------------------

    def roles(self, block: Block) -> tuple[str, ...]:
        """The roles that `weight` answers for in this block."""
        return tuple(role for role in (*ROLES, *SHARED_ROLES) if self.projection(block, role) is not None)

    def weight(self, block: Block, role: str) -> Tensor:
        """`[out, in]`: with `bias`, the projection of the sublayer's input before per-head norm and rotary position.

        Roles are `q`, `k`, `v`, `o`, their `cross_` forms, `gate`, `up`, `down`, their `shared_` forms and `router`;
        latent attention has `k` without position and `k_position`. Plain linear layers give their own parameter. An
        `AdapterError` names a role that the block lacks and a map that has no matrix.
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
                f"{type(block.module).__name__} has no weight '{role}' that the adapter '{self.name}' can find; "
                f"it has {', '.join(self.roles(block)) or 'none'}"
            )
        return self._router_map(block) if role == "router" else linear_map(module)

    def _router_map(self, block: Block) -> LinearMap:
        experts = _mixture(block)
        width = router_width(unwrapped(experts.router), experts.count)
        return applied_to_identity(
            experts.router, width, lambda rows: self.routing(block, experts.router.forward(rows)).logits
        )

    def projection(self, block: Block, role: str) -> nn.Module | None:
        """The module that computes `role` in `block`, or None."""
        if role == "router":
            return block.experts.router if block.experts else None
        prefix, _, rest = role.rpartition("_")
        if prefix == "shared":
            return first_of(block.experts and block.experts.shared, self.mlp_projections[rest])
        if role in self.mlp_projections:
            return first_of(block.mlp, self.mlp_projections[role])
        attention = self.find_attention(block.module)[prefix == "cross"]
        return first_of(attention, self.attention_projections.get(role.removeprefix("cross_"), ()))

    def expert_weight(self, block: Block, expert: int, role: str) -> Tensor:
        """`[out, in]` for `gate`, `up`, `down` of one routed expert."""
        experts = _mixture(block)
        if not 0 <= expert < experts.count:
            raise AdapterError(
                f"expert {expert} does not exist; {block.stack}.{block.layer} has {experts.count}"
            )
        held = unwrapped(experts.module)
        gated = getattr(held, "has_gate", True)
        if role not in ("gate", "up", "down") or (role == "gate" and not gated):
            raise AdapterError(
                f"experts of {type(held).__name__} have no '{role}'; roles are gate, up and down"
            )
        fused = gated and role != "down"
        weight = expert_parameter(experts.module, "gate_up_proj" if fused else f"{role}_proj", expert)
        weight = weight.T if getattr(held, "is_transposed", False) else weight
        if not fused:
            return weight
        parts = weight.chunk(2) if getattr(held, "is_concatenated", True) else (weight[::2], weight[1::2])
        return parts[role == "up"]

    # -- routing ------------------------------------------------------------------------------------

    def routing(self, block: Block, output: Any) -> RouterOutput:
        """What the router's own `output` says."""
        experts = _mixture(block)
        return read_output(unwrapped(experts.router), output, experts.count)

    def route(self, block: Block, hidden: Tensor, logits: Tensor, *arguments: Any) -> Any:
        """The router's output (as its own forward returns it) for other `logits` `[tokens, experts]`.

        `hidden` and `arguments` are what the router was called with. Gradients flow from the output to `logits`; no
        hook on the router is called.
        """
        experts = _mixture(block)
        return run_router(unwrapped(experts.router), hidden, RouterRun(logits, experts.count), *arguments)

    def scores(self, block: Block, logits: Tensor) -> Tensor:
        """What the choice was made on, `[..., experts]`; -inf where the family's groups make an expert ineligible."""
        run = self._watched(block, logits)
        if run.scores is None:
            raise AdapterError(
                f"{type(unwrapped(_mixture(block).router)).__name__} takes no top-k over its experts; "
                "override `scores` in the adapter"
            )
        return _computing(run.scores).reshape(logits.shape)

    def probabilities(self, block: Block, logits: Tensor) -> Tensor:
        """The router's distribution over all experts `[..., experts]`, summing to one.

        What the router makes of all its logits before it chooses (softmax, sigmoid, ...), normalised; their softmax
        where it chooses first.
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
        run = RouterRun(rows, experts.count, ineligible=-torch.inf)
        run_router(router, rows.new_zeros(1, 1).expand(len(rows), router_width(router, experts.count)), run)
        return run

    def expert_outputs(self, block: Block, hidden: Tensor, experts: Tensor) -> Tensor:
        """What the named experts answer for `hidden` `[tokens, width]`, chosen or not, unweighted.

        `experts` `[tokens, n]` -> `[tokens, n, width]`. The experts' own forward pass runs, whatever its implementation,
        and no hook on it is called. An expert that does not exist is an `AdapterError`.
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
        return output.reshape(tokens, count, -1)

    # -- inputs and loss ----------------------------------------------------------------------------

    def tokens(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The token ids `[batch, position]` of the main stack, or None (a ViT has patches)."""
        seq2seq = getattr(self.config, "is_encoder_decoder", False)
        return inputs.get("decoder_input_ids" if seq2seq else "input_ids")

    def loss(self, model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """The family's own loss of `logits` for `inputs["labels"]`, without auxiliary terms; None: not known."""
        kind = getattr(model, "loss_type", None)
        labels = inputs.get("labels")
        if labels is None:
            return None
        if kind in ("ForCausalLM", "ForMaskedLM"):
            given = {name: inputs[name] for name in ("num_items_in_batch", "shift_labels") if name in inputs}
            return model.loss_function(
                logits=logits, labels=labels, vocab_size=model.config.vocab_size, **given
            )
        if kind in ("ForSequenceClassification", "ForImageClassification"):
            return model.loss_function(labels, logits, model.config)
        return None


def router_width(router: nn.Module, experts: int) -> int:
    """How many numbers `router` reads."""
    sizes = [
        weight.shape[1] for weight in router.parameters() if weight.dim() == 2 and weight.shape[0] == experts
    ]
    if not sizes:
        raise AdapterError(
            f"{type(router).__name__} has no weight of [{experts} experts, width]; override `route` and `scores`"
        )
    return sizes[0]


def _mixture(block: Block) -> Experts:
    if block.experts is None:
        raise AdapterError(
            f"{block.stack}.{block.layer} ({type(block.module).__name__}) has no experts that a router chooses"
        )
    return block.experts


def _computing(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
