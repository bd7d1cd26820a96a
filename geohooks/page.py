"""A run as one self-contained HTML page: no network, no file beside it, bounded in size."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geohooks.errors import ArtifactError
from geohooks.run import Column, Run
from geohooks.summary import (
    Summary,
    WrongToken,
    domain_codes,
    format_number,
    overview,
    remarks,
    rows_of,
    signal_columns,
    signal_values,
)

__all__ = ["Excerpt", "choose_excerpts", "colour_cuts", "facts", "render"]

MOST_TOKENS = 24_000
MOST_VALUES = 1_500_000
EXCERPTS = 12
BINS = 48

_RISING = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_SIGNED = (0.5, 0.75, 0.9, 0.97)

Values = NDArray[np.float64]


@attrs.frozen
class Excerpt:
    """The tokens [start, stop) of a document that the page shows."""

    document: int
    name: str
    domain: str
    total: int
    start: int
    stop: int


def choose_excerpts(
    documents: pa.Table,
    worst: Mapping[int, int],
    most: int,
    wanted: Sequence[int] = (),
) -> tuple[Excerpt, ...]:
    """What of `documents` a page of at most `most` tokens shows, in the order of the table.

    All of it where it fits. Else excerpts of equal length, of `EXCERPTS` documents or more: first those in `worst`
    (document -> a position that must be seen), then the domains in turn, in the order of the table. `wanted`, numbers
    of documents, leaves out all others. Raises `ArtifactError` for a number that is not in the table.
    """
    rows = [one for one in documents.to_pylist() if not wanted or one["document"] in set(wanted)]
    missing = sorted(set(wanted) - {one["document"] for one in rows})
    if missing:
        known = sorted(documents["document"].to_pylist())
        raise ArtifactError(
            f"document {missing[0]} is not in the run, which has {len(known)} documents"
            + (f", numbered {known[0]} to {known[-1]}" if known else "")
        )
    fits = sum(one["tokens"] for one in rows) <= most
    longest = most if fits else max(1, most // min(EXCERPTS, len(rows)))
    chosen, left = {}, most
    for one in _in_turn(rows, worst):
        length = min(one["tokens"], longest, left)
        start = min(max(0, worst.get(one["document"], 0) - length // 2), one["tokens"] - length)
        if length:
            chosen[one["document"]] = Excerpt(
                one["document"], one["name"], one["domain"], one["tokens"], start, start + length
            )
        left -= length
    return tuple(chosen[one["document"]] for one in rows if one["document"] in chosen)


def _in_turn(rows: Sequence[dict[str, Any]], worst: Mapping[int, int]) -> list[dict[str, Any]]:
    order = {document: rank for rank, document in enumerate(worst)}
    taken: dict[str, int] = {}
    turns = {}
    for one in rows:
        turns[one["document"]] = taken[one["domain"]] = taken.get(one["domain"], -1) + 1
    return sorted(rows, key=lambda one: (order.get(one["document"], len(order)), turns[one["document"]]))


def colour_cuts(values: Values) -> tuple[bool, list[float]]:
    """Whether a signal takes both signs, and where its colour changes, rising.

    Quantiles of the finite values, so that a colour says how rare a value is in the run: of the values themselves, or
    of their magnitudes where more than one in fifty lies on either side of 0. Equal cuts count once.
    """
    counted = values[np.isfinite(values)]
    if not counted.size:
        return False, []
    low, high = np.quantile(counted, [0.02, 0.98])
    signed = bool(low < 0 < high)
    size = np.abs(counted) if signed else counted
    cuts = np.unique(np.quantile(size, _SIGNED if signed else _RISING, method="lower"))
    return signed, [float(cut) for cut in cuts if cut < size.max() and (cut > 0 or not signed)]


def render(
    run: Run,
    summary: Summary,
    worst: Sequence[WrongToken],
    *,
    signal: str | None = None,
    documents: Sequence[int] = (),
) -> str:
    """The page of `run`: `signal` colours the text at first, and only `documents` are shown where any are given.

    Raises `ArtifactError` for a document that the run does not have.
    """
    signals = signal_columns(run)
    names = [column.name for column in signals]
    listing = run.documents(["document", "name", "domain", "tokens"])
    most = min(MOST_TOKENS, MOST_VALUES // max(1, len(names)))
    seen: dict[int, int] = {}
    for one in worst:
        seen.setdefault(one.document, one.position)
    excerpts = choose_excerpts(listing, seen, most, documents)
    data: dict[str, Any] = {
        "facts": list(facts(run).items()),
        "notes": [*_sample(listing, excerpts, summary.whole.tokens), *remarks(run, summary)],
        "overview": overview(summary),
        "domains": [one.domain for one in summary.domains],
        "signals": _signals(run, signals, summary),
        "chosen": signal or _first_choice(names),
        "text": run.manifest.text_kept,
        "worst": _worst(worst, excerpts),
        **_excerpts(run, excerpts, names),
    }
    return _filled(data)


def facts(run: Run) -> dict[str, str]:
    """What was measured, and how."""
    manifest = run.manifest
    base = manifest.provenance.base
    return {
        "model": manifest.provenance.model.name,
        **({"base": base.name} if base is not None else {}),
        "data": ", ".join(f"{one.domain}: {one.path}" for one in manifest.provenance.data),
        "dtype": manifest.dtype,
        "context": f"{manifest.context:,} tokens, stride {manifest.stride:,}",
        "geohooks": manifest.provenance.versions.get("geohooks", "unknown"),
    }


def _filled(data: Mapping[str, Any]) -> str:
    folder = resources.files("geohooks") / "cli"
    template, style, plots, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "plots.js", "page.js")
    )
    before, after = template.split("/*data*/")
    filled = before.replace("/*style*/", style), _inert(data), after.replace("/*script*/", plots + script)
    return "".join(filled)


def _inert(data: Mapping[str, Any]) -> str:
    """JSON in ASCII that can't end the script element that it stands in."""
    written = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _first_choice(names: Sequence[str]) -> str | None:
    preferred = ("nll_increase", "forward_kl", "nll", "entropy")
    return next((name for name in (*preferred, *names) if name in names), None)


def _signals(run: Run, signals: Sequence[Column], summary: Summary) -> list[dict[str, Any]]:
    domains, codes = domain_codes(run)
    made = []
    for signal in signals:
        values = signal_values(run, signal.name)
        signed, cuts = colour_cuts(values)
        low, high, counts = _histogram(values, codes, len(domains))
        made.append(
            {
                **attrs.asdict(signal),
                "signed": signed,
                "cuts": cuts,
                "low": low,
                "high": high,
                "counts": counts,
                "means": [str(one.moments[signal.name]) for one in (*summary.domains, summary.whole)],
            }
        )
    return made


def _histogram(values: Values, codes: NDArray[np.intp], domains: int) -> tuple[float, float, list[list[int]]]:
    """Counts by domain over equal bins between the 0.1 % and 99.9 % quantiles; what lies outside is in the end bins."""
    counted = values[np.isfinite(values)]
    low, high = (float(edge) for edge in np.quantile(counted, [0.001, 0.999])) if counted.size else (0.0, 0.0)
    width = (high - low) or 1.0
    defined = ~np.isnan(values)
    bins = np.clip((np.clip(values[defined], low, high) - low) / width * BINS, 0, BINS - 1).astype(np.intp)
    counts = np.bincount(codes[defined] * BINS + bins, minlength=domains * BINS)
    return low, high, counts.reshape(domains, BINS).tolist()


def _excerpts(
    run: Run, excerpts: Sequence[Excerpt], names: Sequence[str]
) -> dict[str, list[dict[str, Any]] | dict[str, str]]:
    word = "token" if run.manifest.text_kept else "token_id"
    rows = rows_of(run, [one.document for one in excerpts], [word, *names]) if excerpts else {}
    tables = [rows[one.document].slice(one.start, one.stop - one.start) for one in excerpts]
    shown = [
        {**attrs.asdict(one), "tokens": table[word].to_pylist()} for one, table in zip(excerpts, tables, strict=True)
    ]
    whole = pa.concat_tables(tables) if tables else None
    columns = {name: _packed(whole[name]) for name in names} if whole is not None else {}
    return {"excerpts": shown, "columns": columns}


def _packed(column: pa.ChunkedArray) -> str:
    """The values as base64 of little-endian float32, NaN where there is none."""
    return base64.b64encode(column.to_numpy().astype("<f4").tobytes()).decode("ascii")


def _worst(worst: Sequence[WrongToken], excerpts: Sequence[Excerpt]) -> list[dict[str, Any]]:
    place = {one.document: index for index, one in enumerate(excerpts)}
    made = []
    for one in worst:
        index = place.get(one.document)
        seen = index is not None and excerpts[index].start <= one.position + 1 < excerpts[index].stop
        figures = {name: format_number(value) for name, value in one.signals.items()}
        made.append({**attrs.asdict(one), "signals": figures, "excerpt": index if seen else None})
    return made


def _sample(documents: pa.Table, excerpts: Sequence[Excerpt], run_tokens: int) -> list[str]:
    shown = sum(one.stop - one.start for one in excerpts)
    longest = max((one.stop - one.start for one in excerpts), default=0)
    if shown == run_tokens:
        return []
    return [
        f"The text and the plane show a sample: {shown:,} of {run_tokens:,} tokens, from {len(excerpts):,} of "
        f"{documents.num_rows:,} documents; first those with the most confident and wrong tokens, then the domains "
        f"in turn, at most {longest:,} tokens a document. Means, colours and histograms are of the whole run."
    ]
