"""Finding the parts of a model by what transformers declares and by what modules are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from geohooks.anatomy import Experts
from geohooks.weights import unwrapped

__all__ = [
    "attention_modules",
    "calls_attention_interface",
    "declared",
    "declared_layers",
    "first_of",
    "mixture_of_experts",
    "model_type",
    "runner_of",
    "stack_name",
    "stack_named",
]

_STACK_NAMES = {
    "encoder": "encoder",
    "decoder": "decoder",
    "vision": "vision",
    "visual": "vision",
    "text": "text",
    "language": "decoder",
}
# Under these names torch's checkpoint, FSDP and torch.compile wrappers hold what they wrap.
_WRAPPED = ("._checkpoint_wrapped_module", "._fsdp_wrapped_module", "._orig_mod")


def model_type(model: nn.Module) -> str | None:
    """The family's name in the model's configuration, or None for a model without one."""
    return getattr(getattr(model, "config", None), "model_type", None)


def declared(model: nn.Module, kind: str) -> tuple[type[nn.Module], ...]:
    """The classes whose outputs transformers records as `kind`: "hidden_states", "router_logits", ...

    Read from the `_can_record_outputs` of the model and of every model inside it; empty where nothing is
    declared.
    """
    classes: dict[type[nn.Module], None] = {}
    for module in model.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get(kind, ())
        for entry in entries if isinstance(entries, (list, tuple)) else (entries,):
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type):
                classes[target] = None
    return tuple(classes)


def declared_layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers whose hidden states transformers records, by the path of what holds each list of them."""
    classes = declared(model, "hidden_states")
    lists: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, classes):
            # A layer may sit in a wrapper of its own: it is held where the wrapper is.
            held = path.removesuffix(next((end for end in _WRAPPED if path.endswith(end)), ""))
            lists.setdefault(held.rpartition(".")[0], []).append(module)
    return lists


def runner_of(model: nn.Module, path: str) -> nn.Module:
    """The module whose forward pass runs the layers that are held at `path`."""
    holder = model.get_submodule(path)
    is_container = isinstance(holder, (nn.ModuleList, nn.ModuleDict))
    return model.get_submodule(path.rpartition(".")[0]) if is_container else holder


def stack_name(model: nn.Module, path: str, layer: nn.Module) -> str:
    """What the stack whose layers lie at `path` is called: by its path, else by how it attends.

    A model of images alone has one stack, `vision`, whatever its path says.
    """
    if getattr(model, "main_input_name", None) == "pixel_values":
        return "vision"
    if named := stack_named(path):
        return named
    causal = any(getattr(module, "is_causal", False) for module in layer.modules())
    return "decoder" if causal or type(model).__name__.endswith("ForCausalLM") else "encoder"


def stack_named(path: str) -> str | None:
    """The stack that `path` names, or None."""
    for part in path.split("."):
        for beginning, name in _STACK_NAMES.items():
            if part.startswith(beginning):
                return name
    return None


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether the forward pass of `module` looks its attention function up in transformers' interface."""
    return _looks_up_attention(type(module).forward)


@cache
def _looks_up_attention(forward: Callable[..., Any]) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attention_modules(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The self-attention and the cross-attention of `layer`: what calls transformers' attention interface."""
    found = [module for module in layer.modules() if calls_attention_interface(module)]
    attention, cross_attention, *_ = [*found, None, None]
    return attention, cross_attention


def mixture_of_experts(layer: nn.Module, routers: tuple[type[nn.Module], ...]) -> Experts | None:
    """The mixture in `layer`: what holds three-dimensional weights, and the router beside it.

    The router is of one of the classes `routers`, or, where none is declared, what says its `top_k`.
    """
    for mixture in layer.modules():
        children = list(mixture.children())
        module = next((child for child in children if _holds_experts(unwrapped(child))), None)
        router = next((child for child in children if _routes(unwrapped(child), routers)), None)
        if router is not None and module is not None:
            held: Any = unwrapped(module)
            return Experts(
                router=router,
                module=module,
                count=int(held.num_experts),
                chosen=int(first_of(unwrapped(router), ("top_k",))),
                shared=first_of(mixture, ("shared_expert", "shared_experts")),
                shared_gate=first_of(mixture, ("shared_expert_gate",)),
            )
    return None


def first_of(owner: Any, names: tuple[str, ...]) -> Any:
    """The first attribute of `owner` that is there and not None; names may have dots."""
    return next((value for name in names if (value := _attribute(owner, name)) is not None), None)


def _attribute(owner: Any, name: str) -> Any:
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


def _holds_experts(module: nn.Module) -> bool:
    holds = any(weight.dim() == 3 for weight in module.parameters(recurse=False))
    return holds and hasattr(module, "num_experts")


def _routes(module: nn.Module, routers: tuple[type[nn.Module], ...]) -> bool:
    return isinstance(module, routers) if routers else hasattr(module, "top_k")
