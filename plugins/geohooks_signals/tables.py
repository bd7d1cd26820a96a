"""Recorded passes as tables: one row a token, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from geohooks_signals.columns import KEYS, NEXT_TOKEN, SIGNALS, field
from geohooks_signals.passes import Pass, Rows, placed

if TYPE_CHECKING:
    import rich.table

__all__ = ["as_rich", "summary_of", "table_of"]

_Values = NDArray[np.float32]


def table_of(passes: Sequence[Pass]) -> pa.Table:
    """One row a token, in order of document and position."""
    rows = list(placed(passes))
    names = _column_names(passes)
    if not rows:
        return pa.Table.from_batches([], schema=pa.schema([*KEYS, *map(field, names)]))
    document = np.concatenate([one.document for one in rows])
    position = np.concatenate([one.position for one in rows])
    order = np.lexsort((position, document))
    tokens = pa.concat_arrays([_token_ids(one) for one in rows]).take(order)
    domain = pa.array(np.concatenate([one.domain for one in rows])[order], pa.string()).dictionary_encode()
    keys = [pa.array(document[order]), pa.array(position[order], pa.int32()), tokens, domain]
    values, missing = (np.concatenate(parts) for parts in zip(*(_signals(one, names) for one in rows), strict=True))
    values, missing = values[order].T, missing[order].T
    columns = [
        pa.array(np.ascontiguousarray(own), mask=np.ascontiguousarray(absent))
        for own, absent in zip(values, missing, strict=True)
    ]
    return pa.table([*keys, *columns], schema=pa.schema([*KEYS, *map(field, names)]))


def _column_names(passes: Sequence[Pass]) -> list[str]:
    """The signals that any pass has: those of the logits, then the routers' by layer, then the drift."""
    found = {name: None for one in passes for name in one.signals}
    routers = [name for name in found if name not in SIGNALS]
    drift = [name for name in found if name == "router_drift"]
    return [*(name for name in SIGNALS if name in found and name not in drift), *routers, *drift]


def _token_ids(rows: Rows) -> pa.Array:
    tokens = rows.of.tokens
    if tokens is None:
        return pa.nulls(len(rows.row), pa.int32())
    return pa.array(tokens.cpu().numpy()[rows.row, rows.column], pa.int32())


def _signals(rows: Rows, names: Sequence[str]) -> tuple[_Values, NDArray[np.bool_]]:
    """Values and which are missing, `[rows, signals]`; one transfer from the device for all of them."""
    one = rows.of
    stacked = torch.stack([value.to(torch.float32) for value in one.signals.values()], dim=-1).cpu().numpy()
    known = one.known.cpu().numpy()
    column = rows.column - (one.mask.shape[1] - known.shape[1])
    values = np.full((len(column), len(names)), np.nan, dtype=np.float32)
    missing = np.ones(values.shape, dtype=bool)
    places = [names.index(name) for name in one.signals]
    values[:, places] = stacked[rows.row, column]
    missing[:, places] = False
    followed = _following(rows, column, values, names) if rows.followed else np.zeros(len(column), dtype=bool)
    unknown = ~known[rows.row, column] & ~followed
    later = [place for place, name in enumerate(names) if name in NEXT_TOKEN]
    missing[:, later] |= unknown[:, None]
    return values, missing


def _following(rows: Rows, column: NDArray[np.int64], values: _Values, names: Sequence[str]) -> NDArray[np.bool_]:
    """Fill in what the pass after says of the last column's next token; answers which rows have one now."""
    one = rows.of
    if one.next_known is None:
        return np.zeros(len(column), dtype=bool)
    filled = (column == one.known.shape[1] - 1) & one.next_known.cpu().numpy()[rows.row]
    own: dict[str, Any] = {name: values[filled, names.index(name)] for name in ("entropy", "varentropy")}
    own |= {name: nll.float().cpu().numpy()[rows.row[filled]] for name, nll in one.next_nll.items()}
    own["calibration_gap"] = own["nll"] - own["entropy"]
    spread = np.sqrt(own["varentropy"])
    with np.errstate(divide="ignore", invalid="ignore"):
        settled = (spread == 0) & np.isfinite(own["calibration_gap"])
        own["calibration_z"] = np.where(settled, np.float32(0), own["calibration_gap"] / spread)
    if "base_nll" in own:
        own["nll_increase"] = own["nll"] - own["base_nll"]
    for name in NEXT_TOKEN & own.keys():
        values[filled, names.index(name)] = own[name]
    return filled


def summary_of(table: pa.Table) -> pa.Table:
    """One row a domain and signal: positions that have it, mean, and spread (population standard deviation).

    Positions whose logits were NaN are counted apart, as `undefined`, and are in neither mean nor spread; an infinite
    NLL makes its mean infinite.
    """
    domains = np.asarray(table["domain"].cast(pa.string()).to_pylist(), dtype=object)
    rows: list[dict[str, Any]] = []
    for name in table.column_names[len(KEYS) :]:
        unit = table.schema.field(name).metadata[b"unit"].decode()
        there = np.asarray(table[name].is_valid())
        values = table[name].to_numpy().astype(np.float64)
        for domain in sorted(set(domains)):
            found = _spread(values[there & (domains == domain)])
            rows.append({"domain": domain, "signal": name, "unit": unit, **found})
    return pa.Table.from_pylist(rows, schema=_SUMMARY)


def _spread(values: NDArray[np.float64]) -> dict[str, float | int | None]:
    counted = values[~np.isnan(values)]
    found: dict[str, float | int | None] = {"positions": len(counted), "undefined": len(values) - len(counted)}
    with np.errstate(invalid="ignore"):
        found["mean"] = float(counted.mean()) if len(counted) else None
        found["spread"] = float(counted.std()) if len(counted) else None
    return found


_SUMMARY = pa.schema(
    {
        "domain": pa.string(),
        "signal": pa.string(),
        "unit": pa.string(),
        "positions": pa.int64(),
        "undefined": pa.int64(),
        "mean": pa.float64(),
        "spread": pa.float64(),
    }
)


def as_rich(summary: pa.Table) -> rich.table.Table:
    """The summary for a person to read."""
    import rich.table

    shown = rich.table.Table(*summary.column_names, title="signals")
    for row in summary.to_pylist():
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value or "") for value in row.values()]
        shown.add_row(*cells)
    return shown
