"""Where base-model distributions come from: a base model in memory, or the same model with its adapter off."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from geohooks.anatomy import Anatomy
from geohooks.backends.threads import silent
from geohooks.call import Call, Generation
from geohooks.errors import ReferenceMismatch
from geohooks.events import RouterEvent
from geohooks.registry import adapter_for
from geohooks.sites import Site

__all__ = ["Answer", "DisabledAdapter", "InMemory", "Reference", "as_reference", "unwrap"]

_log = logging.getLogger("geohooks")

# Vocabularies of one tokenizer differ by padding to a round size and a few added tokens: more than this is another.
_PADDING = 1024
_PADDED_SHARE = 0.25
_DROPPED = frozenset({"labels", "past_key_values", "use_cache", "num_items_in_batch", "output_router_logits"})


@attrs.frozen(eq=False)
class Answer:
    """What the base says of one call: its logits, and its routers' decisions by site."""

    logits: Tensor
    routing: Mapping[Site, RouterEvent]


@runtime_checkable
class Reference(Protocol):
    """Where the base's answer to a call comes from."""

    def answer(self, call: Call) -> Answer:
        """The base's logits and routing for the inputs of `call`, without gradient."""


class InMemory:
    """A base model in memory: `model` answers for the same inputs, in evaluation mode, with a cache of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        inner = unwrap(model)
        self.anatomy = adapter_for(inner).anatomy(inner)
        self._caches: weakref.WeakKeyDictionary[Any, _BaseCache] = weakref.WeakKeyDictionary()
        self._encoder_outputs: weakref.WeakKeyDictionary[Generation, Any] = weakref.WeakKeyDictionary()
        self.lock = threading.RLock()
        if self.anatomy.logits is None:
            raise ReferenceMismatch(f"{type(inner).__name__} has no head, so it gives no distribution to compare with")

    def answer(self, call: Call) -> Answer:
        """The base's logits and routing for the inputs of `call`."""
        with self.lock, silent(), torch.no_grad(), _evaluating(self.model), self._base():
            inputs = self._inputs(call)
            cache = self._cache_for(call)
            if cache is not None:
                inputs |= {"past_key_values": cache.own, "use_cache": True}
                _shorten_mask(inputs, call)
            elif "use_cache" in call.inputs:
                inputs["use_cache"] = False
            with _heard_routers(self.anatomy, inputs) as routing:
                output = self.model(**inputs)
        logits = output if isinstance(output, Tensor) else output["logits"] if hasattr(output, "keys") else output[0]
        return Answer(logits, routing)

    @contextmanager
    def _base(self) -> Iterator[None]:
        yield

    def _inputs(self, call: Call) -> dict[str, Any]:
        """What the base is called with: nothing that the model itself has computed."""
        inputs = {name: value for name, value in call.inputs.items() if name not in _DROPPED}
        if len(self.anatomy.stacks) == 1:
            return inputs
        inputs["decoder_input_ids"] = call.token_ids
        if inputs.get("encoder_outputs") is not None:
            inputs["encoder_outputs"] = self._encoded(call)
        return inputs

    def _encoded(self, call: Call) -> Any:
        """The base's own encoder outputs for what the model's encoder was given in this generation."""
        given = None if call.generation is None else call.generation.encoder_inputs
        if call.generation is None or given is None:
            raise ReferenceMismatch(
                "the call was given encoder_outputs, which the model computed; give input_ids, for the reference to "
                "compute its own"
            )
        found = self._encoder_outputs.get(call.generation)
        if found is None:
            found = self._encoder_outputs[call.generation] = self.anatomy.stack("encoder").module(**given)
        hidden = found[0]
        beams = call.batch_size // hidden.shape[0]
        return (hidden.repeat_interleave(beams, dim=0),)

    def _cache_for(self, call: Call) -> _BaseCache | None:
        """The base's own cache that goes with the cache of `call`; None where the call fills none."""
        theirs = call.inputs.get("past_key_values")
        if theirs is None:
            theirs = getattr(call.output, "past_key_values", None)
        if theirs is None:
            return None
        found = self._caches.get(theirs)
        if found is None:
            found = self._caches[theirs] = _BaseCache(theirs)
        found.follow(int(call.past))
        return found


class DisabledAdapter(InMemory):
    """The base of a PEFT model: the same model with its adapter off; exact logits, and no second model."""

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ReferenceMismatch(
                f"{type(model).__name__} has no adapter to disable; give a PeftModel, or a base model as reference="
            )
        super().__init__(model)

    @contextmanager
    def _base(self) -> Iterator[None]:
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    def one_at_a_time(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, while no thread has the adapter off and none but this one runs it."""
        with self.lock:
            return forward(*args, **kwargs)


class _BaseCache:
    """The base's cache beside the model's: whatever reorders or crops the one does so to the other."""

    def __init__(self, theirs: Any) -> None:
        self._pair = hasattr(theirs, "cross_attention_cache")
        self.own = self._empty()
        for name in ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"):
            if hasattr(theirs, name):
                setattr(theirs, name, self._both(getattr(type(theirs), name), weakref.ref(theirs), name))

    def _empty(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if self._pair else DynamicCache()

    def _both(self, method: Any, theirs: Any, name: str) -> Any:
        def both(*args: Any, **kwargs: Any) -> Any:
            getattr(self.own, name)(*args, **kwargs)
            return method(theirs(), *args, **kwargs)

        return both

    def follow(self, length: int) -> None:
        """See that the base has as many tokens before this call as the model; a model's cache may begin anew."""
        if length == 0:
            self.own = self._empty()
        have = self.own.get_seq_length()
        if have != length:
            raise ReferenceMismatch(
                f"the model's cache holds {length} tokens and the reference's {have}: the reference was not asked for "
                "every call since the cache was empty; read call.reference in each call, or begin with an empty cache"
            )


def _shorten_mask(inputs: dict[str, Any], call: Call) -> None:
    """A static cache comes with a ready mask of its full length; the base's cache is as long as the tokens so far."""
    mask = inputs.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, Mapping) else mask
    length = int(call.past) + call.mask().shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] != length:
        seen = mask[:, 0, -1, :length]
        inputs["attention_mask"] = seen if seen.dtype == torch.bool else seen == 0


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _heard_routers(anatomy: Anatomy, inputs: Mapping[str, Any]) -> Iterator[dict[Site, RouterEvent]]:
    """Inside, the decisions of every router of the base are kept."""
    heard: dict[Site, RouterEvent] = {}
    call = Call(anatomy, inputs)
    with ExitStack() as stack:
        for site in anatomy.sites:
            if site.kind == "router":
                stack.callback(_keep(anatomy, site, call, heard))
        yield heard


def _keep(anatomy: Anatomy, site: Site, call: Call, heard: dict[Site, RouterEvent]) -> Any:
    block = anatomy.block(site)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        heard[site] = RouterEvent(site, call, anatomy.adapter, block, args, output, recomputing=False)

    return anatomy.tap(site).module.register_forward_hook(hook).remove


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DDP's and PEFT's wrappers."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is None:
            inner = getattr(model, "get_base_model", lambda: None)()
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def as_reference(reference: Any, model: nn.Module, anatomy: Anatomy) -> Reference | None:
    """What the host was given as `reference`, made one: a base model, "disable_adapter", or a Reference itself."""
    if reference is None:
        return None
    if reference == "disable_adapter":
        made: Reference = DisabledAdapter(model)
    elif isinstance(reference, nn.Module):
        made = InMemory(reference)
    elif isinstance(reference, Reference):
        made = reference
    else:
        raise ReferenceMismatch(
            f"reference={reference!r} is none of: a base model, 'disable_adapter', an object with answer(call)"
        )
    _check_comparable(anatomy, getattr(made, "anatomy", None))
    return made


def _check_comparable(tuned: Anatomy, base: Anatomy | None) -> None:
    """Refuse a base whose distribution is over something else; one of a reference of the user's own is not known."""
    if base is None or base.outputs is None or tuned.outputs is None:
        return
    difference, larger = abs(base.outputs - tuned.outputs), max(base.outputs, tuned.outputs)
    if difference and base.logits == tuned.logits and difference <= min(_PADDING, larger * _PADDED_SHARE):
        _log.warning("vocabularies of %d and %d ids: compared on the ids that both have", tuned.outputs, base.outputs)
    elif difference or base.logits != tuned.logits:
        raise ReferenceMismatch(
            f"the reference, {type(base.model).__name__}, has {base.outputs} outputs over {base.logits}, and "
            f"{type(tuned.model).__name__} {tuned.outputs} over {tuned.logits}; only distributions over one vocabulary "
            "can be compared, which may differ by padding or added tokens"
        )
