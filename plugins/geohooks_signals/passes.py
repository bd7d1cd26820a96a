"""What is kept of each forward pass, and which documents its rows are of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Labels", "Pass", "Rows", "placed"]

Integers = NDArray[np.int64]


@attrs.frozen(eq=False)
class Labels:
    """Where the rows of a pass belong, as a pipeline says it: all `[batch, position]`, and a domain a row."""

    document: Tensor
    position: Tensor
    counted: Tensor
    domain: Sequence[str | None]


@attrs.define(eq=False)
class Pass:
    """One forward pass; tensors stay on their device, so that recording never waits for it.

    `tokens` (None where the model was given embeddings), `mask`, `position_ids` (None where none were given):
    `[batch, length]`, of the pass; `past` is how many columns came before. `signals` and `known` (whether the next
    token is known) are `[batch, kept]`, of the last `kept` columns. `sequences` is what the rows continue, the same in
    all passes that do. `next_nll` is what the following pass says of the last column's next token: `[batch]` each.
    """

    tokens: Tensor | None
    mask: Tensor
    position_ids: Tensor | None
    past: int | Tensor
    sequences: object
    restarts: bool
    signals: dict[str, Tensor]
    known: Tensor
    labels: Labels | None
    next_nll: dict[str, Tensor] = attrs.Factory(dict)
    next_known: Tensor | None = None


@attrs.frozen(eq=False)
class Rows:
    """Rows of one pass: their `row` and `column` in it, `[rows]` each, and where they belong."""

    of: Pass
    row: Integers
    column: Integers
    document: Integers
    position: Integers
    domain: NDArray[Any]
    followed: bool
    """Whether the following pass has the column after this one's last."""


def placed(passes: Sequence[Pass]) -> Iterator[Rows]:
    """The rows of every pass with their documents; documents without labels are numbered in order of appearance."""
    first = 0
    for group in _sequences(passes):
        if group[0].labels is not None:
            yield _labelled(group[0], group[0].labels)
        else:
            rows, first = _numbered(group, first)
            yield from rows


def _sequences(passes: Iterable[Pass]) -> list[list[Pass]]:
    """Passes that continue each other, together; in order of their first ones."""
    groups: list[list[Pass]] = []
    current: dict[int, list[Pass]] = {}
    for one in passes:
        group = current.get(id(one.sequences))
        begins = one.restarts and int(one.past) == 0
        if group is None or begins or one.labels is not None or len(one.mask) != len(group[0].mask):
            group = []
            groups.append(group)
            current[id(one.sequences)] = group
        group.append(one)
    return groups


def _labelled(one: Pass, labels: Labels) -> Rows:
    skipped = one.mask.shape[1] - one.known.shape[1]
    counted = _array(labels.counted).astype(bool)
    row, column = np.nonzero(counted[:, skipped:])
    column = column + skipped
    return Rows(
        one,
        row,
        column,
        _array(labels.document)[row, column],
        _array(labels.position)[row, column],
        np.asarray(labels.domain, dtype=object)[row],
        followed=False,
    )


def _numbered(group: Sequence[Pass], first: int) -> tuple[list[Rows], int]:
    """The rows of passes that continue each other; a column that came again (a draft was rejected) counts once."""
    length = int(group[-1].past) + group[-1].mask.shape[1]
    batch = len(group[0].mask)
    owner = np.full(length, -1)
    mask = np.ones((batch, length), dtype=bool)
    ids = np.full((batch, length), np.iinfo(np.int64).max)
    for number, one in enumerate(group):
        columns = slice(int(one.past), min(int(one.past) + one.mask.shape[1], length))
        width = columns.stop - columns.start
        owner[max(columns.start, columns.start + one.mask.shape[1] - one.known.shape[1]) : columns.stop] = number
        mask[:, columns] = _array(one.mask)[:, :width]
        if one.position_ids is not None:
            ids[:, columns] = _array(one.position_ids)[:, :width]
    document, position = _segments(mask, ids)
    rows = []
    for number, one in enumerate(group):
        past, width = int(one.past), one.mask.shape[1]
        row, column = np.nonzero(mask & (owner == number))
        followed = past + width < length and number + 1 < len(group) and _holds(group[number + 1], past + width)
        domain = np.full(len(row), None, dtype=object)
        rows.append(
            Rows(one, row, column - past, document[row, column], position[row, column], domain, followed=followed)
        )
    appearing = np.unique(np.concatenate([one.document for one in rows]))
    numbered = [attrs.evolve(one, document=first + np.searchsorted(appearing, one.document)) for one in rows]
    return numbered, first + len(appearing)


def _holds(one: Pass, column: int) -> bool:
    return int(one.past) <= column < int(one.past) + one.mask.shape[1]


def _segments(mask: NDArray[np.bool_], ids: Integers) -> tuple[Integers, Integers]:
    """Documents and positions in them, `[batch, length]`: a new one where the position ids do not rise."""
    document, position = np.zeros_like(ids), np.zeros_like(ids)
    first = 0
    for row, (tokens, own) in enumerate(zip(mask, ids, strict=True)):
        if not tokens.any():
            continue
        own = own[tokens]
        begins = np.concatenate([[True], (own[1:] <= own[:-1]) & (own[1:] != np.iinfo(np.int64).max)])
        starts = np.maximum.accumulate(np.where(begins, np.arange(len(own)), 0))
        document[row, tokens] = first + np.cumsum(begins) - 1
        position[row, tokens] = np.arange(len(own)) - starts
        first += int(begins.sum())
    return document, position


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
