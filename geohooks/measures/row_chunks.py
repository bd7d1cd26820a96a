"""Rows of logits taken a few at a time, so that what is computed in between stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["chunks", "computing_dtype", "rows_at_once"]

# Eight to ten rows of a vocabulary of fifty thousand: five scratch tensors of this size stay under 9 MiB.
_CPU_SCRATCH_BYTES = 7 << 18
# An accelerator has no use for small chunks: each costs it a launch.
_DEVICE_SCRATCH_BYTES = 32 << 20


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of `dtype` are computed in: float64 stays, every other floating dtype becomes float32."""
    if not dtype.is_floating_point:
        raise TypeError(f"expected a tensor of floating-point numbers, got {dtype}; convert it with .float()")
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_at_once(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of `width` numbers one chunk has, 1 to 32 on a CPU."""
    budget = _CPU_SCRATCH_BYTES if device.type == "cpu" else _DEVICE_SCRATCH_BYTES
    rows = max(1, budget // (max(width, 1) * dtype.itemsize))
    return min(rows, 32) if device.type == "cpu" else rows


def chunks(tensors: tuple[Tensor, ...], at_once: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Views `[rows, width]` of at most `at_once` rows that together cover `tensors`, and which rows they are.

    The tensors have one leading shape; where it is empty, so is the one chunk. Nothing is copied, whatever the strides.
    """
    for start, group in _matrices(tensors, 0):
        rows = len(group[0])
        for first in range(0, max(rows, 1), at_once):
            last = min(first + at_once, rows)
            yield slice(start + first, start + last), [matrix[first:last] for matrix in group]


def _matrices(tensors: tuple[Tensor, ...], start: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Views `[rows, width]`, each with its first row's number: as few as the strides allow."""
    leading = tensors[0].shape[:-1]
    if leading.numel() == 0 or all(_is_matrix(tensor) for tensor in tensors):
        yield start, [tensor.view(leading.numel(), tensor.shape[-1]) for tensor in tensors]
        return
    step = leading[1:].numel()
    for number, parts in enumerate(zip(*(tensor.unbind(0) for tensor in tensors), strict=True)):
        yield from _matrices(parts, start + number * step)


def _is_matrix(tensor: Tensor) -> bool:
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(
        outer_stride == inner_size * inner_stride for (_, outer_stride), (inner_size, inner_stride) in pairwise(kept)
    )
