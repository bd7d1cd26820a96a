"""The moments of every row of logits, gathered in one pass over row chunks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from geohooks.measures.compiled_sums import CompiledRowSums, check_compiler
from geohooks.measures.moments import Divergences, Moments
from geohooks.measures.row_chunks import chunks, computing_dtype, rows_at_once
from geohooks.measures.row_sums import RowSums

__all__ = ["pair_moments", "row_moments"]

_WORTH_COMPILING = 1024


def row_moments(logits: Tensor, *, compiled: bool = False) -> Moments:
    """The moments of every row of `logits` `[..., width]`."""
    sums, at_once = _prepare((logits,), compiled=compiled)
    return Moments(*_joined([sums.one(*parts) for _, parts in chunks((logits,), at_once)]))


def pair_moments(
    tuned: Tensor, base: Tensor, *, jensen_shannon: bool = True, compiled: bool = False
) -> tuple[Moments, Moments, Divergences]:
    """The moments of every row of `tuned` and `base` `[..., width]`, and what lies between them."""
    sums, at_once = _prepare((tuned, base), compiled=compiled)
    found = _joined([sums.pair(*parts, shannon=jensen_shannon) for _, parts in chunks((tuned, base), at_once)])
    return Moments(*found[:7]), Moments(*found[7:14]), Divergences(*found[14:])


def _prepare(logits: tuple[Tensor, ...], *, compiled: bool) -> tuple[RowSums | CompiledRowSums, int]:
    rows, width, device = logits[0].shape[:-1].numel(), logits[0].shape[-1], logits[0].device
    dtype = functools.reduce(torch.promote_types, (computing_dtype(one.dtype) for one in logits))
    if compiled:
        check_compiler(device)
        if rows and width >= _WORTH_COMPILING:
            sums = CompiledRowSums(rows, width, dtype, device)
            return sums, sums.at_once
    at_once = max(1, min(rows, rows_at_once(width, dtype, device)))
    return RowSums(at_once, width, dtype, device, sides=len(logits)), at_once


def _joined(found: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return found[0] if len(found) == 1 else tuple(torch.cat(parts) for parts in zip(*found, strict=True))
