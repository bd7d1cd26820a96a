"""Hearing attention calls: a pass-through in transformers' attention interface, one attention module at a time.

Each module that somebody listens to gets a shallow copy of its config that names the pass-through; the model's own
config, and so its mask code and its other modules, are not touched.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from geohooks.backends.attachment import Attachment
from geohooks.errors import AdapterError

__all__ = ["AttentionCall", "listen"]

_NAME = "geohooks_pass_through"
_HEARD = "_geohooks_heard"

AttentionCall = Callable[[nn.Module, tuple[Tensor, Tensor, Tensor], "Tensor | None", dict[str, Any]], None]


class _Heard:
    """Who listens to one attention module, and the config that it had."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.listeners: list[AttentionCall] = []
        self.attachment = Attachment()


def _pass_through(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    heard: _Heard = module.__dict__[_HEARD]
    for listener in tuple(heard.listeners):
        listener(module, (query, key, value), attention_mask, options)
    return _original(module, heard.config)(module, query, key, value, attention_mask, **options)


def _original(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The attention function that `module` would have called."""
    implementation = config._attn_implementation
    for kind in type(module).__mro__:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    raise AdapterError(
        f"{type(module).__name__} does not use transformers' attention interface; its calls can't be heard"
    )


def listen(attachment: Attachment, module: nn.Module, listener: AttentionCall) -> None:
    """Have `listener(module, (query, key, value), mask, options)` called before every attention call of `module`."""
    heard = module.__dict__.get(_HEARD)
    if heard is None:
        config: Any = module.config
        _original(module, config)
        heard = _Heard(config)
        heard.attachment.substitute(module, _HEARD, heard)
        named = copy.copy(config)
        named._attn_implementation_internal = _NAME
        heard.attachment.substitute(module, "config", named)
    heard.listeners.append(listener)

    def leave() -> None:
        heard.listeners.remove(listener)
        if not heard.listeners:
            heard.attachment.remove()

    attachment.on_remove(leave)


AttentionInterface.register(_NAME, _pass_through)


def is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether this call hides later keys by itself, as every implementation but eager does where no mask is given."""
    if module.__dict__[_HEARD].config._attn_implementation in (None, "eager"):
        return False
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)
