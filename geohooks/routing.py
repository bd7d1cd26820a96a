"""Running a router's own forward pass on other logits, and watching how it chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from geohooks.errors import AdapterError

__all__ = ["RouterOutput", "RouterRun", "read_output", "router_width", "run_router"]

# Of each function: which argument is the input, which the weight, which dimension of the weight the output.
_PRODUCTS = {
    "linear": (0, 1, 0),
    "matmul": (0, 1, -1),
    "__matmul__": (0, 1, -1),
    "mm": (0, 1, -1),
    "addmm": (1, 2, -1),
}
_ACTIVATIONS = ("softmax", "sigmoid", "sqrt", "softplus")


@attrs.frozen(eq=False)
class RouterOutput:
    """What a router decided: `logits` `[tokens, experts]`, `indices` and `weights` `[tokens, chosen]`."""

    logits: Tensor
    indices: Tensor
    weights: Tensor


def read_output(router: nn.Module, output: Any, experts: int) -> RouterOutput:
    """The parts of a router's `output`, told apart by dtype and size; others are an `AdapterError`."""
    tensors = [item for item in output if isinstance(item, Tensor)] if isinstance(output, (tuple, list)) else []
    indices = [item for item in tensors if not item.is_floating_point()]
    floating = [item for item in tensors if item.is_floating_point()]
    if len(indices) == 1 and len(floating) == 2:
        logits, weights = floating
        if logits.shape[-1] == experts and weights.shape == indices[0].shape:
            return RouterOutput(logits, indices[0], weights)
    raise AdapterError(
        f"{type(router).__name__} returned {_described(output)}; looked for a tuple of logits over "
        f"{experts} experts, the weights of the chosen ones and their indices; override `routing` in the "
        "adapter"
    )


def run_router(router: nn.Module, hidden: Tensor, run: RouterRun, *arguments: Any) -> Any:
    """The output of `router` for `hidden` had its logits been those of `run`, which watches.

    The router's own forward pass runs, without its hooks; only its first linear product onto the experts is
    replaced.
    """
    with run:
        output = router.forward(hidden, *arguments)
    if not run.replaced:
        raise AdapterError(
            f"{type(router).__name__} makes no linear product onto {run.experts} experts that other logits "
            "could take the place of; override `route` and `scores` in the adapter"
        )
    return output


def router_width(router: nn.Module, experts: int) -> int:
    """How many numbers `router` reads; the shape of its weight says so, wherever the weight is."""
    weights = [weight for weight in router.parameters() if weight.dim() == 2 and weight.shape[0] == experts]
    if not weights:
        raise AdapterError(
            f"{type(router).__name__} has no weight of [{experts} experts, width]; "
            "override `linear`, `scores` and `probabilities` in the adapter"
        )
    return weights[0].shape[1]


class RouterRun(TorchFunctionMode):
    """While entered, replaces the first linear product onto the experts and watches how the choice is made.

    `scores` is what the last choice over all experts was made on, `affinities` what the router made of its
    logits before it chose; None as long as they were not seen. With `ineligible`, experts that the router
    masks out get that score whatever it masks with (some use 0, which other experts may have too).
    """

    def __init__(self, logits: Tensor, experts: int, *, ineligible: float | None = None) -> None:
        """A run on `logits` `[tokens, experts]`."""
        super().__init__()
        self.logits = logits
        self.experts = experts
        self.ineligible = ineligible
        self.replaced = False
        self.scores: Tensor | None = None
        self.affinities: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Called by torch for every function of tensors."""
        name = getattr(func, "__name__", "")
        kwargs = dict(kwargs or {})
        if not self.replaced and name in _PRODUCTS and self._reaches_experts(name, args):
            self.replaced = True
            return self._product(args[_PRODUCTS[name][0]])
        if name == "masked_fill" and self._spans_experts(args[0]) and self.ineligible is not None:
            args, kwargs = (args[0], args[1] if len(args) > 1 else kwargs["mask"], self.ineligible), {}
        output = func(*args, **kwargs)
        if name == "topk" and self._spans_experts(chosen_from := args[0] if args else kwargs["input"]):
            self.scores = chosen_from
        elif name in _ACTIVATIONS and self.scores is None and self._spans_experts(output):
            self.affinities = output
        return output

    def _reaches_experts(self, name: str, args: Any) -> bool:
        _, weight, dimension = _PRODUCTS[name]
        return len(args) > weight and args[weight].dim() == 2 and args[weight].shape[dimension] == self.experts

    def _spans_experts(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == self.experts

    def _product(self, source: Tensor) -> Tensor:
        kind = source.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else source.dtype
        # A clone: some routers change their logits in place, and these belong to the caller.
        return self.logits.reshape(*source.shape[:-1], self.experts).to(dtype).clone()


def _described(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"({', '.join(_described(item) for item in output)})"
    return f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
