"""The sums of `row_sums`, fused by `torch.compile`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from geohooks.measures.moments import divergences, jensen_shannon, moments
from geohooks.measures.top_two import top_two

__all__ = ["CompiledRowSums", "check_compiler", "compiler_available"]

# What is copied of one distribution at a time.
_BYTES = 5 << 20


def compiler_available(device: torch.device | str = "cpu") -> bool:
    """Whether `compiled=True` can work on `device`: a C++ compiler and Python's headers, and Triton off the CPU.

    Looks for files only; nothing is compiled.
    """
    return _found(torch.device(device).type, os.environ.get("CXX", "g++"), os.environ.get("PATH"))


@cache
def _found(device: str, compiler: str, path: str | None) -> bool:
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    triton = device == "cpu" or importlib.util.find_spec("triton") is not None
    return shutil.which(compiler, path=path) is not None and headers and triton


def check_compiler(device: torch.device) -> None:
    """A `RuntimeError` where `compiled=True` cannot work."""
    if not compiler_available(device):
        raise RuntimeError(
            f"compiled=True needs a C++ compiler, Python's headers and, off the CPU, Triton; not all of them were "
            f"found for the device '{device}': install them or pass compiled=False"
        )


class CompiledRowSums:
    """What `RowSums` gives, from kernels that keep nothing of the logits' size.

    They see contiguous rows of the computing dtype alone, so that few of them have to be compiled: other rows are
    copied into scratch.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.at_once = max(1, min(rows, _BYTES // (width * dtype.itemsize)))
        self._shape, self._dtype, self._device = (self.at_once, width), dtype, device
        self._scratch: dict[int, Tensor] = {}

    def one(self, logits: Tensor) -> tuple[Tensor, ...]:
        """As `RowSums.one`."""
        return _compiled(_one)(self._plain(0, logits))

    def pair(self, tuned: Tensor, base: Tensor, *, shannon: bool) -> tuple[Tensor, ...]:
        """As `RowSums.pair`."""
        rows = self._plain(0, tuned), self._plain(1, base)
        found = _compiled(_pair)(*rows)
        return (*found, _compiled(_shannon)(*rows, *found)) if shannon else found

    def _plain(self, side: int, logits: Tensor) -> Tensor:
        if logits.dtype == self._dtype and logits.is_contiguous():
            # `.data` forgets which tensor a view was taken of, whose shape would be guarded too.
            return logits.data
        if side not in self._scratch:
            self._scratch[side] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._scratch[side][: len(logits)].copy_(logits).data


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Any, torch.compile)(function, dynamic=True, fullgraph=True, recompile_limit=64)


def _one(logits: Tensor) -> tuple[Tensor, ...]:
    values, ids = top_two(logits)
    x = logits - values[:, :1]
    return moments(values, ids, _sums(x, x.exp()))


def _pair(tuned: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    tops = top_two(tuned), top_two(base)
    xt, xb = tuned - tops[0][0][:, :1], base - tops[1][0][:, :1]
    et, eb = xt.exp(), xb.exp()
    cross = [_total(torch.where(e == 0, 0, e * (xt - xb))) for e in (et, eb)]
    tuned_sums, base_sums = _sums(xt, et), _sums(xb, eb)
    of_tuned, of_base = moments(*tops[0], tuned_sums), moments(*tops[1], base_sums)
    between = divergences(tuned_sums[0], base_sums[0], *cross)
    return *of_tuned, *of_base, *(value.to(tuned.dtype) for value in between)


def _sums(x: Tensor, e: Tensor) -> list[Tensor]:
    weighted = torch.where(e == 0, 0, e * x)
    return [_total(summand) for summand in (e, e * e, weighted, torch.where(e == 0, 0, weighted * x))]


def _shannon(tuned: Tensor, base: Tensor, *found: Tensor) -> Tensor:
    tuned_total, base_total = found[0] + found[1], found[7] + found[8]
    mixture = (tuned - tuned_total[:, None]).exp() + (base - base_total[:, None]).exp()
    summed = _total(torch.where(mixture == 0, 0, mixture * mixture.log())).to(tuned.dtype)
    return jensen_shannon(found[2], found[9], found[14], found[15], summed)


def _total(summands: Tensor) -> Tensor:
    # One running sum a lane: in single precision it would lose its small terms.
    return summands.sum(1, dtype=torch.float64)
