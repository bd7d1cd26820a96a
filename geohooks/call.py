"""Call: what is known of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from geohooks.errors import GeohooksError

if TYPE_CHECKING:
    from geohooks.anatomy import Anatomy
    from geohooks.events import RouterEvent
    from geohooks.reference import Answer, Reference
    from geohooks.sites import Site

__all__ = ["Call", "Fault", "Generation", "Progress"]

IGNORED = -100


@attrs.frozen(eq=False)
class Fault:
    """A plugin that failed under `on_error="detach"`: its name, where, and the error."""

    plugin: str
    site: Site | None
    error: Exception


@attrs.define(eq=False)
class Generation:
    """One run of `generate`: how many forward passes of the main stack it has made, and the last of them.

    With `beams` > 1 each row of the batch is a beam. `encoder_inputs` are the arguments that the encoder was called
    with, where it was run alone.
    """

    beams: int = 1
    step: int = 0
    last_call: Call | None = None
    encoder_inputs: Mapping[str, Any] | None = None


@attrs.define(eq=False)
class Progress:
    """What the backend keeps of a call under way.

    The module whose pass it is and the keyword arguments that it began with, the plan that it began under, a byte for
    each of that plan's sites that has passed, the stacks that have begun and those not yet done, who edited where,
    whether tensors are saved for a backward pass, and whether plugins are being told of something.
    """

    owner: nn.Module | None = None
    arguments: object = None
    plan: object = None
    fired: bytearray = attrs.Factory(bytearray)
    entered: set[str] = attrs.Factory(set)
    running: set[str | None] = attrs.Factory(set)
    edits: set[tuple[Site, str]] = attrs.Factory(set)
    saving: bool = False
    telling: bool = False


class Call:
    """What is known of one forward pass of the model, or of one of its stacks run alone.

    `inputs` are the arguments by name; `generation` and `step` say where in a `generate` the pass stands (None
    outside); `share` is where one plugin leaves a named value for others; `faults` lists plugins that failed and were
    dropped during this call; `output` is what the model returned, while `on_logits` and `on_call_end` run.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Mapping[str, Any],
        *,
        stack: str | None = None,
        reference: Reference | None = None,
        generation: Generation | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.inputs = inputs
        self.stack = stack
        self.generation = generation
        self.step = None if generation is None else generation.step
        self.share: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self.output: Any = None
        self.progress = Progress()
        self.past = self._past_length()
        self._reference = reference
        self._answer: Answer | None = None

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.anatomy.model.training

    @property
    def attention_mask(self) -> Tensor | None:
        """The attention mask as the model was given it."""
        return self.inputs.get("attention_mask")

    @property
    def labels(self) -> Tensor | None:
        """The labels as the model was given them."""
        return self.inputs.get("labels")

    @property
    def token_ids(self) -> Tensor | None:
        """Token ids of the main stack in this pass, `[batch, position]`; None where the model has none."""
        return self.anatomy.adapter.tokens(self.inputs)

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self._leading(self.stack or self.anatomy.main.name)[0]

    def _past_length(self) -> int | Tensor:
        cache = self.inputs.get("past_key_values")
        length = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
        # A static cache counts in place, on the device.
        return length.clone() if isinstance(length, Tensor) else length

    def _leading(self, stack: str) -> tuple[int, int]:
        """Batch size and length of `stack` in this pass, read off the inputs."""
        names = _INPUTS.get(stack, ())
        if self.stack is None and stack == "decoder" and self._is_pair:
            names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        for name in names:
            value = self.inputs.get(name)
            if isinstance(value, Tensor):
                return value.shape[0], value.shape[1] if value.dim() > 1 else 1
        for value in self.inputs.values():
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0], value.shape[1] if value.dim() > 1 else 1
        raise GeohooksError(f"no tensor among the inputs {sorted(self.inputs)} says how large the batch is")

    @property
    def _is_pair(self) -> bool:
        return len(self.anatomy.stacks) > 1 and self.anatomy.stacks[0].name == "encoder"

    def positions(self, stack: str) -> Tensor | None:
        """Absolute positions of the tokens that `stack` computes in this pass, `[batch, position]` int64.

        As the model counts them: `position_ids` where they were given (packed batches, left padding in `generate`),
        else counted on from the cache. None for a stack of patches.
        """
        if stack == "vision":
            return None
        main = stack == (self.stack or self.anatomy.main.name)
        batch, length = self._leading(stack)
        given = self.inputs.get("position_ids") if main else None
        if isinstance(given, Tensor) and given.dim() == 2:
            return given.expand(batch, -1)
        device = next(value.device for value in self.inputs.values() if isinstance(value, Tensor))
        counted = torch.arange(length, device=device) + (self.past if main else 0)
        return counted.expand(batch, -1)

    def mask(self, stack: str | None = None) -> Tensor:
        """Which positions of `stack` (the main one by default) are tokens and not padding, `[batch, position]` bool."""
        stack = stack or self.stack or self.anatomy.main.name
        batch, length = self._leading(stack)
        pair_decoder = self.stack is None and self._is_pair and stack == "decoder"
        given = self.inputs.get("decoder_attention_mask" if pair_decoder else "attention_mask")
        if isinstance(given, Tensor) and given.dim() == 2:
            return given[:, -length:].bool()
        device = next(value.device for value in self.inputs.values() if isinstance(value, Tensor))
        return torch.ones(batch, length, dtype=torch.bool, device=device)

    def logit_positions(self, logits: Tensor) -> Tensor | None:
        """Absolute positions of the rows of `logits`, which may be only the last ones; None for classes."""
        if self.anatomy.logits != "vocabulary" or logits.dim() != 3:
            return None
        positions = self.positions(self.anatomy.main.name)
        return None if positions is None else positions[:, -logits.shape[1] :]

    def targets(self, logits: Tensor) -> Tensor | None:
        """What each row of `logits` should predict, of its leading shape, int64, -100 where that is not known.

        With labels, the labels (shifted for a causal model); without, the next token of this pass, where neither it
        nor the one before is padding or begins another packed document.
        """
        labels = self.labels
        if self.anatomy.logits == "classes":
            fits = isinstance(labels, Tensor) and labels.shape == logits.shape[:-1] and not labels.is_floating_point()
            return labels if fits else None
        if self._is_pair or self.anatomy.main.name != "decoder":
            if isinstance(labels, Tensor):
                return labels[:, -logits.shape[1] :]
            return self._next_tokens(logits) if self._is_pair else None
        return _shifted(labels)[:, -logits.shape[1] :] if isinstance(labels, Tensor) else self._next_tokens(logits)

    def _next_tokens(self, logits: Tensor) -> Tensor | None:
        tokens = self.token_ids
        if tokens is None:
            return None
        targets = _shifted(tokens)
        counted = self.mask()
        known = counted.clone()
        known[:, :-1] &= counted[:, 1:]
        given = self.inputs.get("position_ids")
        if isinstance(given, Tensor) and given.dim() == 2:
            known[:, :-1] &= given[:, 1:] > given[:, :-1]
        return targets.masked_fill(~known, IGNORED)[:, -logits.shape[1] :]

    @property
    def reference(self) -> Tensor | None:
        """The base model's logits for the same inputs, without gradient; None where the host has no reference."""
        answer = self._ask()
        return None if answer is None else answer.logits

    @property
    def reference_routing(self) -> Mapping[Site, RouterEvent]:
        """The base model's router decisions for the same inputs, by site; empty without a reference or routers."""
        answer = self._ask()
        return {} if answer is None else answer.routing

    def _ask(self) -> Answer | None:
        if self._answer is None and self._reference is not None:
            self._answer = self._reference.answer(self)
        return self._answer


_INPUTS = {
    "decoder": ("input_ids", "inputs_embeds"),
    "encoder": ("input_ids", "inputs_embeds", "encoder_outputs"),
    "text": ("input_ids", "inputs_embeds"),
    "vision": ("pixel_values",),
}


def _shifted(tokens: Tensor) -> Tensor:
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:]
    return targets
