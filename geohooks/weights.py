"""Linear maps of a model as matrices: plain, transposed, wrapped, offloaded or quantised ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from geohooks.errors import AdapterError

__all__ = ["LinearMap", "applied_to_identity", "expert_parameter", "linear_map", "present", "unwrapped"]


@attrs.frozen(eq=False)
class LinearMap:
    """`x -> weight x + bias`, with `weight` `[out, in]` and `bias` `[out]` or None."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, index: Any) -> LinearMap:
        """The map to some of the outputs: a slice, or a tensor of indices."""
        return LinearMap(self.weight[index], None if self.bias is None else self.bias[index])

    def after(self, inner: LinearMap, gain: Tensor) -> LinearMap:
        """This map of `gain * inner(x)`, composed in the computing dtype (float32, or double for doubles)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scaled = self.weight.to(dtype) * gain.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if inner.bias is not None:
            carried = scaled @ inner.bias.to(dtype)
            bias = carried if bias is None else bias + carried
        return LinearMap(scaled @ inner.weight.to(dtype), bias)


def linear_map(module: nn.Module) -> LinearMap:
    """What `module` does to a vector, as a matrix.

    A plain linear layer gives its own parameters, transposed where its class stores them so, without a copy
    and with their gradients. Anything else (PEFT's layers, offloaded ones) is applied to the identity
    matrix, in evaluation mode and without gradients. An `AdapterError` names what is not linear, or has no
    weights.
    """
    layer: Any = module
    if _is_plain(layer):
        transposed = type(layer).forward is not nn.Linear.forward
        with present(layer) as keep:
            weight = keep(layer.weight)
            return LinearMap(weight.T if transposed else weight, keep(layer.bias))
    if hasattr(layer, "_packed_params"):
        return LinearMap(layer.weight().dequantize(), layer.bias())
    size = getattr(module, "in_features", None)
    if size is None:
        raise AdapterError(
            f"{type(module).__name__} does not say how many numbers it reads (in_features), so its matrix "
            "can't be found by applying it to the identity; override `linear` in the adapter"
        )
    return applied_to_identity(module, size, module.forward)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that runs inside PEFT's wrappers around it."""
    wrapper: Any = module
    if hasattr(wrapper, "get_base_layer"):
        return wrapper.get_base_layer()
    if hasattr(wrapper, "modules_to_save") and hasattr(wrapper, "original_module"):
        active = [] if wrapper.disable_adapters else wrapper.active_adapters
        return wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    return module


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """While it lasts, the parameters that `module` itself holds are there, even those offloaded.

    Gives a function that makes a parameter outlast it: a copy of what is offloaded again, else the thing
    itself.
    """
    if not any(weight.is_meta for weight in module.parameters(recurse=False)):
        yield lambda weight: weight
    elif not hasattr(module, "_hf_hook"):
        raise _without_weights(module)
    else:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield lambda weight: None if weight is None else weight.clone()


def expert_parameter(module: nn.Module, expert: int, role: str) -> Tensor:
    """`[out, in]` for `gate`, `up` or `down` of one expert, out of fused three-dimensional parameters.

    transformers says on the experts' module how they lie: whether there is a gate, whether matrices are
    stored `[in, out]`, and whether gate and up are halves or alternate.
    """
    held = unwrapped(module)
    gated = getattr(held, "has_gate", True)
    if role not in ("gate", "up", "down") or (role == "gate" and not gated):
        has = "gate, up and down" if gated else "up and down"
        raise AdapterError(f"experts of {type(held).__name__} have no weight '{role}'; they have {has}")
    fused = gated and role != "down"
    weight = _expert_slice(module, "gate_up_proj" if fused else f"{role}_proj", expert)
    weight = weight.T if getattr(held, "is_transposed", False) else weight
    if not fused:
        return weight
    halves = weight.chunk(2) if getattr(held, "is_concatenated", True) else (weight[::2], weight[1::2])
    return halves[role == "up"]


def _expert_slice(module: Any, name: str, expert: int) -> Tensor:
    """One expert's part of the parameter `name`, with what PEFT's wrappers around it add."""
    added: list[Tensor] = []
    while hasattr(module, "parameter_name"):
        if module.parameter_name == name and not module.disable_adapters and not module.merged:
            active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
            added += [module.get_delta_weight(adapter)[expert] for adapter in active]
        module = module.base_layer
    held: Any = unwrapped(module)
    with present(held) as keep:
        return sum(added, keep(getattr(held, name)[expert]))


def _is_plain(layer: Any) -> bool:
    """Whether `layer` multiplies with the very parameter it holds: torch's linear layer or transformers' Conv1D."""
    is_its_own = "forward" not in vars(layer) or hasattr(layer, "_hf_hook")
    of_class = type(layer).forward is nn.Linear.forward or type(layer).__name__ == "Conv1D"
    return is_its_own and of_class and type(layer.weight) in (Tensor, nn.Parameter)


def _without_weights(module: nn.Module) -> AdapterError:
    return AdapterError(
        f"{type(module).__name__} has its weights on the meta device and no accelerate hook that would bring "
        "them; load the model's weights, then ask for them"
    )


def applied_to_identity(module: nn.Module, size: int, forward: Callable[[Tensor], Tensor]) -> LinearMap:
    """The matrix of `forward`, a function of `module` that reads `size` numbers.

    In one call the zero vector gives the bias, the unit vectors the columns, and one more vector shows
    whether what the module does to it is the sum of these: if not, an `AdapterError`.
    """
    device, dtype = _place(module)
    probe = torch.cos(torch.arange(size, device=device, dtype=torch.float32)).to(dtype)
    rows = torch.eye(size + 1, size, device=device, dtype=dtype).roll(1, 0)
    with _evaluating(module), torch.no_grad():
        output = forward(torch.cat([rows, probe[None]]))
    bias, columns, seen = output[0], output[1:-1], output[-1]
    weight = (columns - bias).T.contiguous()
    expected = weight @ probe.to(weight.dtype) + bias
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    if not bool((seen - expected).norm() <= tolerance * (expected.norm() + bias.norm())):
        raise AdapterError(
            f"{type(module).__name__} is not a linear map: what it does to a vector differs from the sum of "
            f"what it does to its parts by more than {tolerance:g} (quantised activations do that); load it "
            "in a plain dtype"
        )
    return LinearMap(weight, bias if bool(bias.any()) else None)


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in what numbers `module` computes."""
    hooks: list[Any] = [inner._hf_hook for inner in module.modules() if hasattr(inner, "_hf_hook")]
    weights = list(module.parameters())
    devices = [weight.device for weight in weights if not weight.is_meta]
    devices += [torch.device(hook.execution_device) for hook in hooks if hasattr(hook, "execution_device")]
    if weights and (not devices or (any(weight.is_meta for weight in weights) and not hooks)):
        raise _without_weights(module)
    # Narrower numbers than half precision are storage: no layer reads them.
    dtypes = [weight.dtype for weight in weights if weight.is_floating_point() and weight.itemsize > 1]
    return [*devices, torch.device("cpu")][0], [*dtypes, torch.get_default_dtype()][0]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [inner for inner in module.modules() if inner.training]
    for inner in training:
        inner.training = False
    try:
        yield
    finally:
        for inner in training:
            inner.training = True
