"""`generate` under a host: calls know their step, and plugins hear the next-token scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from geohooks.call import Generation
from geohooks.dispatch import tell
from geohooks.errors import GeohooksError
from geohooks.events import ScoresEvent
from geohooks.sites import Site

if TYPE_CHECKING:
    from geohooks.host import Host

__all__ = ["heard_generate"]

_SCORES = Site(None, None, "scores")


class _Scores:
    """A logits processor that gives each step's scores to the plugins, after every one that the user asked for."""

    def __init__(self, host: Host, generation: Generation) -> None:
        self._host = host
        self._generation = generation

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        call = self._generation.last_call
        if call is None or self._host.current.paused:
            return scores
        event = ScoresEvent(_SCORES, call, scores, input_ids)
        tell(self._host, self._host.listeners("on_scores"), event)
        return event.value


def _beams(model: Any, arguments: dict[str, Any]) -> int:
    config = arguments.get("generation_config") or model.generation_config
    return arguments.get("num_beams") or config.num_beams or 1


def heard_generate(host: Host) -> Callable[..., Any]:
    """A wrapper of `model.generate` under which `host` hears the scores and knows the step of each call."""

    def generate(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers import LogitsProcessorList  # heavy, and already there with a model that generates

        if host.current.paused:
            return inner(*args, **kwargs)
        bound = inspect.signature(host.anatomy.model.__class__.generate).bind_partial(host.anatomy.model, *args)  # type: ignore[attr-defined]
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"} | kwargs
        if (arguments.get("guidance_scale") or 1) != 1:
            raise GeohooksError(
                f"guidance_scale={arguments['guidance_scale']} makes the model run twice in each step, on two prompts, "
                "which plugins could not tell apart; generate without it, or within host.paused()"
            )
        generation = Generation(beams=_beams(host.anatomy.model, arguments))
        processors = LogitsProcessorList(arguments.pop("logits_processor", None) or [])
        arguments["logits_processor"] = LogitsProcessorList([*processors, _Scores(host, generation)])
        # A compiled decoding step would not see hooks that came after its first run.
        arguments.setdefault("disable_compile", True)
        before, host.current.generation = host.current.generation, generation
        try:
            return inner(**arguments)
        finally:
            host.current.generation = before

    return generate
