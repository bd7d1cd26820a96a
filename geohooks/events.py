"""The event objects that travel through the hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from geohooks.errors import PluginError, ReferenceMismatch
from geohooks.measures import LogitComparison, LogitStats, compare_logits, logit_stats
from geohooks.sites import Site

if TYPE_CHECKING:
    from geohooks.adapter import Adapter, RouterOutput
    from geohooks.anatomy import Block
    from geohooks.call import Call

__all__ = [
    "AttentionEvent",
    "Event",
    "check_edit",
    "HiddenEvent",
    "LogitsEvent",
    "RouterEvent",
    "ScoresEvent",
]


@attrs.define(eq=False)
class HiddenEvent:
    """A residual-stream or sublayer tensor; assigning `value` edits the model's own computation.

    `value`: `[batch, position, width]` (`[batch, position, streams, width]` where `anatomy.streams` > 1).
    `recomputing` is True in the recompute of gradient checkpointing, where an edit must be repeated exactly.
    """

    site: Site
    call: Call
    value: Tensor
    recomputing: bool = False

    @property
    def positions(self) -> Tensor | None:
        """Absolute positions of the tokens, `[batch, position]` int64; None where the stack has no tokens."""
        return self.call.positions(str(self.site.stack))


class RouterEvent:
    """One router's decision for every token, padding included; assigning `value` re-routes by the family's own rule.

    `value` are the logits `[batch, position, experts]`; `scores` what the choice was made on (bias and groups
    included, -inf for experts outside the chosen groups), `probabilities` the distribution over all experts,
    `indices` and `weights` `[batch, position, chosen]`. All follow `value` when it is assigned.
    """

    __slots__ = (
        "_adapter",
        "_arguments",
        "_block",
        "_decision",
        "_value",
        "call",
        "output",
        "recomputing",
        "site",
    )

    def __init__(
        self,
        site: Site,
        call: Call,
        adapter: Adapter,
        block: Block,
        arguments: tuple[Any, ...],
        output: Any,
        *,
        recomputing: bool,
    ) -> None:
        self.site = site
        self.call = call
        self.recomputing = recomputing
        self.output = output
        self._adapter = adapter
        self._block = block
        self._arguments = arguments
        self._decision: RouterOutput = adapter.routing(block, output)
        self._value = self._batched(self._decision.logits)

    def _batched(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.call.batch_size, -1, rows.shape[-1])

    @property
    def value(self) -> Tensor:
        """The router's logits, `[batch, position, experts]`."""
        return self._value

    @value.setter
    def value(self, logits: Tensor) -> None:
        check_edit(self.site, self._value, logits)
        hidden, *others = self._arguments
        rows = logits.reshape(-1, logits.shape[-1])
        self.output = self._adapter.route(self._block, hidden, rows, *others)
        self._decision = self._adapter.routing(self._block, self.output)
        self._value = logits

    @property
    def scores(self) -> Tensor:
        """What the choice was made on, `[batch, position, experts]`."""
        return self._batched(self._adapter.scores(self._block, self._decision.logits))

    @property
    def probabilities(self) -> Tensor:
        """The router's distribution over all experts, `[batch, position, experts]`, summing to one."""
        return self._batched(self._adapter.probabilities(self._block, self._decision.logits))

    @property
    def indices(self) -> Tensor:
        """The chosen experts, `[batch, position, chosen]` int64."""
        return self._batched(self._decision.indices)

    @property
    def weights(self) -> Tensor:
        """The weights of the chosen experts, `[batch, position, chosen]`."""
        return self._batched(self._decision.weights)

    @property
    def positions(self) -> Tensor | None:
        """Absolute positions of the tokens, `[batch, position]` int64."""
        return self.call.positions(str(self.site.stack))


class LogitsEvent:
    """The model's own output distribution; assigning `value` edits it, and the loss where there are labels.

    `value`: `[batch, position, vocabulary]` or `[batch, classes]`.
    """

    __slots__ = ("_comparison", "_stats", "_value", "call", "compiled", "recomputing", "site")

    def __init__(self, site: Site, call: Call, value: Tensor, *, compiled: bool = False) -> None:
        self.site = site
        self.call = call
        self.compiled = compiled
        self.recomputing = False
        self._value = value
        self._stats: LogitStats | None = None
        self._comparison: LogitComparison | None = None

    @property
    def value(self) -> Tensor:
        """The logits."""
        return self._value

    @value.setter
    def value(self, logits: Tensor) -> None:
        check_edit(self.site, self._value, logits)
        self._value = logits
        self._stats = self._comparison = None

    @property
    def targets(self) -> Tensor | None:
        """What each position of `value` should predict, `[batch, position]` int64, -100 where that is not known."""
        return self.call.targets(self._value)

    @property
    def stats(self) -> LogitStats:
        """Entropy, varentropy, NLL and the rest: computed once, whoever asks."""
        if self._stats is None:
            compared = self._comparison
            self._stats = (
                compared.tuned
                if compared is not None
                else logit_stats(self._value, self.targets, compiled=self.compiled)
            )
        return self._stats

    @property
    def comparison(self) -> LogitComparison | None:
        """The comparison with `call.reference`, computed once; None where the host has no reference."""
        if self._comparison is None:
            base = self.call.reference
            if base is None:
                return None
            if base.shape[:-1] != self._value.shape[:-1]:
                raise ReferenceMismatch(
                    f"the reference gave logits of shape {tuple(base.shape)} for {tuple(self._value.shape)}; "
                    "base and tuned model must answer for the same positions"
                )
            self._comparison = compare_logits(self._value, base, self.targets, compiled=self.compiled)
        return self._comparison

    @property
    def positions(self) -> Tensor | None:
        """Absolute positions of the tokens, `[batch, position]` int64; None for classes."""
        return self.call.logit_positions(self._value)


@attrs.define(eq=False)
class ScoresEvent:
    """Next-token scores while generating, after the model and before sampling; `value` `[batch, vocabulary]`.

    `input_ids` `[batch, length]` are the tokens so far; `call` is the forward pass that gave the scores. Under beam
    search a row is a beam and the scores are log-probabilities.
    """

    site: Site
    call: Call
    value: Tensor
    input_ids: Tensor
    recomputing: bool = False


class AttentionEvent:
    """The arguments of one attention call, as the model's attention function received them; it can't be edited.

    `query` `[batch, heads, queries, width]`, `key` and `value_states` `[batch, key/value heads, keys, width]`,
    `mask` as the model's attention implementation takes it (or None), `scaling`, `bias` (T5's relative positions,
    `[1 or batch, heads, queries, keys]`, or None), `sinks` (`[heads]`, or None), `softcap` (Gemma 2 bends its scores by
    softcap * tanh(score / softcap); or None).
    """

    __slots__ = (
        "bias",
        "call",
        "causal",
        "key",
        "mask",
        "query",
        "recomputing",
        "scaling",
        "sinks",
        "site",
        "softcap",
        "value_states",
    )

    def __init__(
        self,
        site: Site,
        call: Call,
        states: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scaling: float,
        *,
        bias: Tensor | None,
        sinks: Tensor | None,
        causal: bool,
        recomputing: bool,
        softcap: float | None = None,
    ) -> None:
        self.site = site
        self.call = call
        self.query, self.key, self.value_states = states
        self.mask = mask
        self.scaling = scaling
        self.bias = bias
        self.sinks = sinks
        self.softcap = softcap
        self.causal = causal
        self.recomputing = recomputing

    @property
    def value(self) -> Tensor:
        """The query states; assigning is refused: edit `input` or `attention` instead."""
        return self.query

    @value.setter
    def value(self, states: Tensor) -> None:
        raise PluginError(
            f"'{self.site}' can't be edited: an attention call is only heard; "
            f"edit '{self.site.stack}.{self.site.layer}.attention' (what it adds to the stream) in on_hidden"
        )

    def weights(self) -> Tensor:
        """Attention weights in float32 (float64 for double), `[batch, heads, queries, keys]`, computed when asked.

        Rows sum to one with `sink_weight()`. Dropout is not applied. A query that may see no key has zeros.
        """
        return self._weights_and_sink()[0]

    def sink_weight(self) -> Tensor:
        """The weight that the sink takes, `[batch, heads, queries]`; zero where the model has no sinks."""
        return self._weights_and_sink()[1]

    def _weights_and_sink(self) -> tuple[Tensor, Tensor]:
        rows = [self._query_block(start) for start in range(0, self.query.shape[2], _QUERY_BLOCK)]
        weights, sinks = zip(*rows, strict=True)
        return torch.cat(weights, dim=2), torch.cat(sinks, dim=2)

    def _query_block(self, start: int) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query = self.query[:, :, start : start + _QUERY_BLOCK].to(dtype)
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1).to(dtype)
        logits = query @ key.transpose(2, 3) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        rows = slice(start, start + query.shape[2])
        if self.bias is not None:
            logits = logits + self.bias[:, :, rows].to(dtype)
        visible = self._visible(rows, key.shape[2])
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else logits + visible
        if self.sinks is not None:
            sink = self.sinks.to(dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = torch.softmax(logits, dim=-1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
        if self.sinks is not None:
            return weights[..., :-1], weights[..., -1]
        return weights, weights.new_zeros(weights.shape[:3])

    def _visible(self, rows: slice, keys: int) -> Tensor | None:
        if self.mask is not None:
            mask = self.mask[..., :keys]
            mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            return mask if mask.dtype == torch.bool else mask.to(torch.promote_types(mask.dtype, torch.float32))
        queries = self.query.shape[2]
        if not self.causal or queries == 1:
            return None
        row = torch.arange(queries, device=self.query.device)[rows, None]
        return torch.arange(keys, device=self.query.device)[None, :] <= row


_QUERY_BLOCK = 512

Event = HiddenEvent | RouterEvent | LogitsEvent | ScoresEvent | AttentionEvent


def check_edit(site: Site, before: Tensor, after: Tensor) -> None:
    """Refuse an edit that the model could not take: not a tensor, or of another shape, type or device."""
    if not isinstance(after, Tensor):
        raise PluginError(f"'{site}' was assigned {type(after).__name__}; assign a tensor")
    for what in ("shape", "dtype", "device"):
        have, want = getattr(after, what), getattr(before, what)
        if have != want:
            raise PluginError(f"'{site}' was assigned a tensor of {what} {have}; the model's own has {want}")
