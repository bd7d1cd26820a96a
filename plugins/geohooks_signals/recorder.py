"""The plugin that records the signals of every position."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pyarrow as pa
import torch
from torch import Tensor

import geohooks
from geohooks.measures import LogitComparison, LogitStats, router_divergence, router_stats
from geohooks_signals.passes import Labels, Pass
from geohooks_signals.tables import as_rich, summary_of, table_of

if TYPE_CHECKING:
    import rich.table

    from geohooks.anatomy import Anatomy

__all__ = ["Signals"]

_IGNORED = -100
_ROUTING = "signals.routing"
_OF_ONE = ("entropy", "renyi2", "varentropy", "residual", "top1_probability", "margin")
_OF_TARGET = ("nll", "calibration_gap", "calibration_z")
_OF_PAIR = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "entropy_change",
    "renyi2_change",
    "varentropy_change",
    "residual_change",
    "top1_agreement",
)
_OF_BASE = ("entropy", "nll", "varentropy", "renyi2")


@attrs.frozen(eq=False)
class _Routing:
    """What one router decided in a pass: all `[batch, position, ...]`."""

    probabilities: Tensor
    indices: Tensor
    signals: Mapping[str, Tensor]


@attrs.frozen(eq=False)
class _Last:
    """The last column of a pass, whose next token may come with the next pass: logits `[batch, vocabulary]`."""

    of: Pass
    logits: Mapping[str, Tensor]


class Signals(geohooks.Plugin):
    """Records, for every token that the model reads, the signals of the distribution that it then gives.

    Each row of a batch, and each packed document in it (where `position_ids` fall), is a document with a number of its
    own; a pass that continues a cache, or a step of `generate`, continues its rows' documents. Padding is left out. The
    NLL is that of the token read next, null where none is known, as at the end of a document. Under beam search a
    document is a row of the batch, whatever beam is in it.

    `compiled=True` has the statistics of the logits compiled. What is recorded stays on its device until `table()`.
    """

    name = "signals"
    description = "entropy, varentropy, NLL, divergence from a base and router statistics at every position"

    def __init__(self, *, compiled: bool = False) -> None:
        self.compiled = compiled
        self._passes: list[Pass] = []
        self._last: weakref.WeakKeyDictionary[Any, _Last] = weakref.WeakKeyDictionary()
        self._labels: Labels | None = None

    def table(self) -> pa.Table:
        """One row a token, by document and position: document, position, token_id, domain, then a column a signal.

        Units and descriptions are the fields' metadata. Null means not defined there, NaN that the logits were NaN.
        """
        return table_of(self._passes)

    def summary(self) -> pa.Table:
        """One row a domain and signal: its unit, positions that have it, mean, and spread (standard deviation).

        Rows whose logits were NaN do not count.
        """
        return summary_of(self.table())

    def clear(self) -> None:
        """Forget what was recorded; documents that a cache continues begin anew."""
        self._passes.clear()
        self._last.clear()

    @contextmanager
    def labelled(
        self, *, document: Tensor, position: Tensor, counted: Tensor, domain: Sequence[str | None]
    ) -> Iterator[None]:
        """Say where the rows of the forward passes inside belong, for pipelines that cut documents into windows.

        `document`, `position` and `counted` (whether the row is recorded) are `[batch, position]`; `domain` is one a
        row of the batch.
        """
        self._labels = Labels(document, position, counted, domain)
        try:
            yield
        finally:
            self._labels = None

    @geohooks.hookimpl
    def sites(self, anatomy: Anatomy) -> list[geohooks.Site]:
        """The logits and the routers of the main stack."""
        return [
            site
            for site in anatomy.sites
            if site.kind == "logits" or (site.kind == "router" and site.stack == anatomy.main.name)
        ]

    @geohooks.hookimpl
    def on_attach(self, host: geohooks.Host) -> None:
        """Refuse a model that predicts no next tokens."""
        anatomy = host.anatomy
        if anatomy.logits != "vocabulary" or anatomy.main.name != "decoder":
            has = "classes" if anatomy.logits == "classes" else "masked tokens" if anatomy.logits else "nothing"
            raise geohooks.PluginError(
                f"'signals' needs next-token logits, but {type(anatomy.model).__name__} predicts {has}; "
                "use a causal language model or an encoder-decoder with a language-model head"
            )
        if self.compiled:
            host.compiled = True

    @geohooks.hookimpl
    def on_router(self, event: geohooks.RouterEvent) -> None:
        """Keep what the base's router will be compared with, and the statistics."""
        with torch.no_grad():
            probabilities, indices = event.probabilities.detach(), event.indices
            stats = router_stats(event.scores.detach(), indices, probabilities=probabilities)
        signals = {name: getattr(stats, name) for name in ("entropy", "top_mass", "margin")}
        event.call.share.setdefault(_ROUTING, {})[event.site] = _Routing(probabilities, indices, signals)

    @geohooks.hookimpl
    def on_logits(self, event: geohooks.LogitsEvent) -> None:
        """Record one pass."""
        call, kept = event.call, event.value.shape[1]
        _check(call)
        targets = event.targets
        signals = _logit_signals(event.stats if event.comparison is None else event.comparison)
        signals |= {name: value[:, -kept:] for name, value in _router_signals(call).items()}
        unknown = torch.zeros(event.value.shape[:2], dtype=torch.bool, device=event.value.device)
        this = Pass(
            tokens=_tokens(call),
            mask=call.mask().clone(),
            position_ids=_position_ids(call),
            past=call.past,
            sequences=object(),
            restarts=True,
            signals=signals,
            known=unknown if targets is None else targets != _IGNORED,
            labels=self._labels,
        )
        if self._labels is None:
            self._continue(this, event)
        self._passes.append(this)

    @geohooks.hookimpl
    def report(self, host: geohooks.Host) -> rich.table.Table:
        """The summary, for a person to read."""
        return as_rich(self.summary())

    def _continue(self, this: Pass, event: geohooks.LogitsEvent) -> None:
        """Find what `this` pass continues, and give the pass before it the token that came next."""
        cache = _cache(event.call)
        key = cache if cache is not None else event.call.generation
        if key is None:
            return
        this.restarts = cache is not None
        before = self._last.get(key)
        fresh = isinstance(this.past, int) and this.past == 0 and this.restarts
        if before is not None and not fresh:
            this.sequences = before.of.sequences
            _follow(before, this)
        logits = {"nll": event.value[:, -1]}
        if event.comparison is not None and event.call.reference is not None:
            shared = event.comparison.shared_ids
            logits = {"nll": event.value[:, -1, :shared], "base_nll": event.call.reference[:, -1, :shared]}
        self._last[key] = _Last(this, {name: value.detach().clone() for name, value in logits.items()})


def _check(call: geohooks.Call) -> None:
    chosen = call.inputs.get("logits_to_keep")
    if isinstance(chosen, Tensor) and chosen.dim() > 0:
        raise geohooks.PluginError(
            "'signals' records the last positions of a pass, and logits_to_keep names others; give it a number"
        )


def _logit_signals(found: LogitStats | LogitComparison) -> dict[str, Tensor]:
    """Every signal of the logits by the name of its column, `[batch, kept]`, detached."""
    pair = found if isinstance(found, LogitComparison) else None
    stats = found.tuned if isinstance(found, LogitComparison) else found
    signals = {name: getattr(stats, name) for name in (*_OF_ONE, *_OF_TARGET)}
    if pair is not None:
        signals |= {name: getattr(pair, name) for name in _OF_PAIR}
        signals |= {f"base_{name}": getattr(pair.base, name) for name in _OF_BASE}
        if stats.nll is not None and pair.base.nll is not None:
            signals["nll_increase"] = stats.nll - pair.base.nll
    missing = torch.full_like(stats.entropy, torch.nan)
    return {name: missing if value is None else value.detach() for name, value in signals.items()}


def _router_signals(call: geohooks.Call) -> dict[str, Tensor]:
    """Every signal of the routers, and of what lies between them and the base's, `[batch, position]`."""
    signals: dict[str, Tensor] = {}
    distances = []
    for site, routing in call.share.get(_ROUTING, {}).items():
        signals |= {f"router.{site.layer}.{name}": value for name, value in routing.signals.items()}
        base = call.reference_routing.get(site)
        if base is not None and base.value.shape == routing.probabilities.shape:
            distances.append(router_divergence(routing, base).jaccard)
            signals[f"router.{site.layer}.jaccard"] = distances[-1]
    if distances:
        signals["router_drift"] = torch.stack(distances).mean(0)
    return signals


def _tokens(call: geohooks.Call) -> Tensor | None:
    """Token ids of the pass; of an encoder-decoder given only labels, what it makes its decoder read."""
    tokens, shift = call.token_ids, getattr(call.anatomy.model, "prepare_decoder_input_ids_from_labels", None)
    if tokens is None and shift is not None and call.labels is not None:
        tokens = shift(call.labels)
    return None if tokens is None else tokens.detach().clone()


def _position_ids(call: geohooks.Call) -> Tensor | None:
    given = call.inputs.get("position_ids")
    if not isinstance(given, Tensor) or given.dim() != 2:
        return None
    return given.expand(call.batch_size, -1).clone()


def _cache(call: geohooks.Call) -> Any:
    given = call.inputs.get("past_key_values")
    return given if given is not None else getattr(call.output, "past_key_values", None)


def _follow(before: _Last, this: Pass) -> None:
    """Give the last column of the pass before the NLL of the token after it, which is in this one."""
    previous, column = before.of, 0
    if isinstance(previous.past, int) and isinstance(this.past, int):
        column = previous.past + previous.mask.shape[1] - this.past
    if this.tokens is None or len(this.tokens) != len(previous.mask) or not 0 <= column < this.tokens.shape[1]:
        return
    token = this.tokens[:, column]
    known = this.mask[:, column] & previous.mask[:, -1]
    if this.position_ids is not None and previous.position_ids is not None:
        known = known & (this.position_ids[:, column] > previous.position_ids[:, -1])
    undefined = {"nll": previous.signals["entropy"]}
    if "base_nll" in before.logits:
        undefined["base_nll"] = previous.signals["base_entropy"]
    for name, logits in before.logits.items():
        values = logits if logits.dtype == torch.float64 else logits.float()
        shared = token.clamp(max=values.shape[1] - 1)[:, None].to(values.device)
        nll = values.logsumexp(-1) - values.gather(1, shared)[:, 0]
        nll = nll.masked_fill(token.to(values.device) >= values.shape[1], torch.inf)
        previous.next_nll[name] = nll.masked_fill(undefined[name][:, -1].isnan(), torch.nan)
    previous.next_known = known
