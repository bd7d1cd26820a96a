"""A run in figures: by domain, and token by token where the model was most confident and wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from geohooks.errors import ArtifactError
from geohooks.measures import distribution_health
from geohooks.run import Column, Run

__all__ = [
    "TAIL_SHARE",
    "DomainSummary",
    "Moments",
    "Summary",
    "WrongToken",
    "confident_and_wrong",
    "domain_codes",
    "format_number",
    "overview",
    "remarks",
    "rows_of",
    "signal_columns",
    "signal_values",
    "summarise",
    "tail_threshold",
]

TAIL_SHARE = 0.1
"""The high-KL tail: this share of a run's positions, those of highest forward KL."""

KEYS = ("document", "position", "token_id", "domain", "token")
WHOLE = "all"
CONTEXT = 24

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]


@attrs.frozen
class Moments:
    """Mean and spread (population standard deviation) over `count` positions; NaN where none is counted."""

    count: int
    mean: float
    spread: float

    def __str__(self) -> str:
        return f"{format_number(self.mean)} ± {format_number(self.spread, 2)}"


@attrs.frozen
class DomainSummary:
    """One domain of a run, or the whole of it; nats throughout.

    `tail_share` is the sum of the NLL increase over the positions in the high-KL tail, divided by its sum over all
    positions. It exceeds 1 where the others improved, and is None where the sum is not positive (there is no increase
    to share out) or where the run has no base.
    """

    domain: str
    documents: int
    tokens: int
    moments: Mapping[str, Moments]
    not_a_number: int
    tail_positions: int
    tail_share: float | None

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL; NaN where no position has one."""
        return _exponential(self.mean("nll"))

    @property
    def base_perplexity(self) -> float:
        """exp of the base's mean NLL; NaN where the run has no base."""
        return _exponential(self.mean("base_nll"))

    @property
    def health(self) -> str | None:
        """`measures.distribution_health` of the mean forward KL; None where there is none."""
        mean = self.mean("forward_kl")
        return None if math.isnan(mean) else distribution_health(mean)

    def mean(self, signal: str) -> float:
        """The mean of `signal`; NaN where the run has none."""
        return self.moments[signal].mean if signal in self.moments else math.nan


@attrs.frozen
class Summary:
    """The domains of a run by name, the whole, and the forward KL (nats) from which the tail begins."""

    domains: tuple[DomainSummary, ...]
    whole: DomainSummary
    tail_threshold: float | None


@attrs.frozen
class WrongToken:
    """A row whose most probable next token had more than half of the mass, and was not the one that came.

    `before` is the end of the text that the model had read, up to and with the token at `position`; `token` is the
    one that came after it. Both are token ids in brackets where the run keeps no text.
    """

    document: int
    name: str
    position: int
    before: str
    token: str
    signals: Mapping[str, float]


def signal_columns(run: Run) -> tuple[Column, ...]:
    """The columns of the positions table that are signals, in its order."""
    return tuple(column for column in run.manifest.columns if column.name not in KEYS)


def signal_values(run: Run, signal: str) -> Values:
    """One signal of every position, [rows]; NaN where it is undefined or was measured from NaN logits."""
    return _numbers(run.positions([signal]), signal)


def domain_codes(run: Run) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """The domains by name, and for each row the index of its domain, [rows]."""
    column = run.positions(["domain"])["domain"].combine_chunks()
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()
    used = sorted((int(code) for code in np.unique(codes)), key=lambda code: names[code])
    rank = np.zeros(len(names), np.intp)
    rank[used] = np.arange(len(used))
    return tuple(str(names[code]) for code in used), rank[codes]


def tail_threshold(forward_kl: Values) -> float | None:
    """The lowest forward KL (nats) of the `TAIL_SHARE` of values that are highest; None where all are NaN."""
    counted = forward_kl[~np.isnan(forward_kl)]
    return float(np.quantile(counted, 1 - TAIL_SHARE, method="higher")) if counted.size else None


def summarise(run: Run, signals: Sequence[str]) -> Summary:
    """The figures of `signals` by domain; a few columns are in memory at a time.

    Raises `ArtifactError` where the run has no positions, or lacks a column. Positions count towards
    the tail where both the forward KL and the NLL increase are defined.
    """
    domains, codes = domain_codes(run)
    if not domains:
        raise ArtifactError(f"the run at '{run.path}' has no tokens: all its documents are empty; measure other data")
    groups = [*(codes == index for index in range(len(domains))), np.ones(len(codes), bool)]
    moments: list[dict[str, Moments]] = [{} for _ in groups]
    for signal in signals:
        values = signal_values(run, signal)
        for made, group in zip(moments, groups, strict=True):
            made[signal] = _moments(values[group])
    invalid = np.isnan(signal_values(run, "entropy")) if "entropy" in signals else np.zeros(len(codes), bool)
    threshold, in_tail, increase = _tail(run, signals, len(codes))
    found = [
        DomainSummary(
            domain=name,
            documents=documents,
            tokens=int(group.sum()),
            moments=made,
            not_a_number=int((invalid & group).sum()),
            tail_positions=int((in_tail & group).sum()),
            tail_share=_share(increase[group], in_tail[group]),
        )
        for name, documents, made, group in zip(
            (*domains, WHOLE), _document_counts(run, domains), moments, groups, strict=True
        )
    ]
    return Summary(tuple(found[:-1]), found[-1], threshold)


def confident_and_wrong(run: Run, signals: Sequence[str], count: int) -> tuple[WrongToken, ...]:
    """The `count` worst rows with `top1_probability` > 0.5 and `nll` > log 2, worst first.

    With more than half of the mass on one token, a target below one half is another token. The worst have the
    highest NLL increase over the base, or the highest NLL where the run has no base. () where a column is missing.
    """
    if not {"top1_probability", "nll"} <= set(signals):
        return ()
    rank = "nll_increase" if "nll_increase" in signals else "nll"
    columns = dict.fromkeys(("top1_probability", "nll", rank))
    table = run.positions(["document", "position", *columns])
    values = {name: _numbers(table, name) for name in columns}
    wrong = (values["top1_probability"] > 0.5) & (values["nll"] > math.log(2)) & ~np.isnan(values[rank])
    rows = np.flatnonzero(wrong)
    worst = rows[np.argsort(-values[rank][rows], kind="stable")[:count]]
    document, position = (table[key].to_numpy() for key in ("document", "position"))
    read = rows_of(run, [int(one) for one in document[worst]], ["token" if run.manifest.text_kept else "token_id"])
    listing = run.documents(["document", "name"])
    names = dict(zip(listing["document"].to_pylist(), listing["name"].to_pylist(), strict=True))
    tokens = {key: _words(rows) for key, rows in read.items()}
    return tuple(
        WrongToken(
            document=int(document[row]),
            name=names[int(document[row])],
            position=int(position[row]),
            before=_before(tokens[int(document[row])], int(position[row])),
            token=tokens[int(document[row])][int(position[row]) + 1],
            signals={name: float(values[name][row]) for name in columns},
        )
        for row in worst
    )


def rows_of(run: Run, documents: Sequence[int], columns: Sequence[str]) -> dict[int, pa.Table]:
    """The rows of each of `documents`, sorted by position, with the columns asked for."""
    wanted = pa.array(sorted(set(documents)), pa.int64())
    parts = (part.positions for part in run.parts(["document", "position", *columns]))
    table = pa.concat_tables([part.filter(pc.is_in(part["document"], value_set=wanted)) for part in parts])
    table = table.sort_by([("document", "ascending"), ("position", "ascending")])
    found, starts = np.unique(table["document"].to_numpy(), return_index=True)
    ends = [*starts, table.num_rows][1:]
    return {int(key): table.slice(start, end - start) for key, start, end in zip(found, starts, ends, strict=True)}


def _words(rows: pa.Table) -> list[str]:
    if "token" in rows.column_names:
        return [str(token) for token in rows["token"].to_pylist()]
    return [f"[{token}]" for token in rows["token_id"].to_pylist()]


def _before(tokens: Sequence[str], position: int) -> str:
    return "".join(tokens[max(0, position - CONTEXT) : position + 1])


def format_number(value: float | None, digits: int = 4) -> str:
    """`value` with so many significant digits; an en dash where there is no number."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    written = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}g}"
    return written.replace("-", "\N{MINUS SIGN}")


def overview(summary: Summary) -> dict[str, list[Any]]:
    """The figures of each domain, then of the whole run, as strings: `head` and `rows`, without empty columns."""
    domains = summary.domains if len(summary.domains) == 1 else (*summary.domains, summary.whole)
    columns = {title: [figure(one) for one in domains] for title, figure in _OVERVIEW.items()}
    kept = {title: cells for title, cells in columns.items() if any(cell != format_number(None) for cell in cells)}
    return {"head": list(kept), "rows": [list(row) for row in zip(*kept.values(), strict=True)]}


def remarks(run: Run, summary: Summary) -> tuple[str, ...]:
    """What a reader of the figures must know of the run: one sentence each."""
    manifest, whole = run.manifest, summary.whole
    said = []
    if not manifest.finished:
        said.append("The run is not finished: these are the parts that are there; the command that began it goes on.")
    if manifest.totals is not None and manifest.totals.empty_documents:
        said.append(f"Empty documents, left out: {manifest.totals.empty_documents:,}.")
    if whole.not_a_number:
        said.append(f"Positions with NaN in the logits, left out of the means: {whole.not_a_number:,}.")
    if manifest.shared_ids is not None:
        said.append(f"The vocabularies differ: compared on the {manifest.shared_ids:,} ids that both have.")
    if summary.tail_threshold is not None:
        said.append(
            f"The tail is the {100 * TAIL_SHARE:.0f} % of the run's positions with the highest forward KL, from "
            f"{format_number(summary.tail_threshold)} nats; the share is of the sum of the NLL increase, more than "
            "100 % where the other positions improved, and not given where the sum is not positive."
        )
    return tuple(said)


def _mean_of(signal: str) -> Callable[[DomainSummary], str]:
    return lambda one: format_number(one.mean(signal))


def _share_of_increase(one: DomainSummary) -> str:
    return format_number(None) if one.tail_share is None else f"{one.tail_share:.1%}"


_OVERVIEW: dict[str, Callable[[DomainSummary], str]] = {
    "domain": lambda one: one.domain,
    "documents": lambda one: f"{one.documents:,}",
    "tokens": lambda one: f"{one.tokens:,}",
    "perplexity": lambda one: format_number(one.perplexity),
    "base perplexity": lambda one: format_number(one.base_perplexity),
    "entropy": _mean_of("entropy"),
    "forward KL": _mean_of("forward_kl"),
    "health": lambda one: one.health or format_number(None),
    "increase in the tail": _share_of_increase,
    "router drift": _mean_of("router_drift"),
}


def _numbers(table: pa.Table, column: str) -> Values:
    return np.asarray(table[column].cast(pa.float64()).to_numpy(), dtype=np.float64)


def _moments(values: Values) -> Moments:
    counted = values[~np.isnan(values)]
    if not counted.size:
        return Moments(0, math.nan, math.nan)
    finite = bool(np.isfinite(counted).all())
    return Moments(counted.size, float(counted.mean()), float(counted.std()) if finite else math.nan)


def _tail(run: Run, signals: Sequence[str], rows: int) -> tuple[float | None, Mask, Values]:
    if not {"forward_kl", "nll_increase"} <= set(signals):
        return None, np.zeros(rows, bool), np.full(rows, np.nan)
    forward_kl, increase = signal_values(run, "forward_kl"), signal_values(run, "nll_increase")
    defined = ~np.isnan(forward_kl) & ~np.isnan(increase)
    threshold = tail_threshold(np.where(defined, forward_kl, np.nan))
    in_tail = defined & (forward_kl >= threshold) if threshold is not None else defined
    return threshold, in_tail, np.where(defined, increase, np.nan)


def _share(increase: Values, in_tail: Mask) -> float | None:
    total = float(np.nansum(increase))
    return float(np.nansum(increase[in_tail])) / total if 0 < total < math.inf else None


def _document_counts(run: Run, domains: Sequence[str]) -> list[int]:
    """How many documents each of `domains` has, then all."""
    there = run.documents(["domain"])["domain"].to_pylist()
    counted = Counter(there)
    return [*(counted[name] for name in domains), len(there)]


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if value >= 700 else math.nan
