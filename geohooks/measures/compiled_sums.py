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
from torch.fx.experimental import _config as fx_config

from geohooks.measures.row_sums import RowSums

__all__ = ["CompiledRowSums", "compiler_available"]

# Partial sums of this many ids each: a long running sum in single precision would lose its small terms, and blocks
# of one row are shared out between threads.
_BLOCK = 1024


def compiler_available(device: torch.device | str = "cpu") -> bool:
    """Whether `compiled=True` can work on `device`: a C++ compiler and Python's headers, and Triton off the CPU.

    Looks for files only; nothing is compiled.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    triton = torch.device(device).type == "cpu" or importlib.util.find_spec("triton") is not None
    return compiler and headers and triton


class CompiledRowSums(RowSums):
    """`RowSums` whose whole blocks of ids are summed by one compiled loop; what they leave over is summed eagerly."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, *, sides: int) -> None:
        if not compiler_available(device):
            raise RuntimeError(
                f"compiled=True needs a C++ compiler, Python's headers and, off the CPU, Triton; not all of them were "
                f"found for the device '{device}': install them or pass compiled=False"
            )
        super().__init__(rows, width, dtype, device, sides=sides)
        self._whole = width - width % _BLOCK

    def one(self, logits: Tensor, maximum: Tensor, own: Tensor) -> None:
        """As `RowSums.one`."""
        super()._own_sums(0, logits, maximum, own, self._whole)
        if self._whole:
            own += _run(_own_blocks, logits[:, : self._whole], maximum).sum(2)

    def pair(
        self, logits: tuple[Tensor, Tensor], maxima: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], cross: Tensor
    ) -> None:
        """As `RowSums.pair`."""
        for side in range(2):
            self._own_sums(side, logits[side], maxima[side], own[side], self._whole)
        self._difference_sums(cross[:2], self._whole)
        heads = [logit[:, : self._whole] for logit in logits]
        weights = self._weights[:, : len(logits[0]), : self._whole]
        if self._whole:
            sums = _run(_pair_blocks, *heads, *maxima, *weights).sum(2)
            own[0].add_(sums[:4])
            own[1].add_(sums[4:8])
            cross[:2].add_(sums[8:])
        self._mixture_sum(own, cross[2], self._whole)
        if self._whole:
            scales = [one[0, :, None].reciprocal() for one in own]
            cross[2].add_(_run(_mixture_blocks, *weights, *scales).sum(1))


def _run(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    # Sizes that happen to be equal in the first call must not have to be equal in the next: that would compile again.
    with cast(Any, fx_config).patch(use_duck_shape=False):
        # `.data` forgets which tensor a view was taken of, whose shape would be guarded too.
        return _compiled(function)(*(tensor.data for tensor in tensors))


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return cast(Any, torch.compile)(function, dynamic=True, fullgraph=True, recompile_limit=64)


def _own_blocks(logits: Tensor, maximum: Tensor) -> Tensor:
    """The sums of each block, `[4, rows, blocks]`."""
    return torch.stack(_weighted_sums(*_centred(logits, maximum)))


def _pair_blocks(
    tuned: Tensor,
    base: Tensor,
    tuned_maximum: Tensor,
    base_maximum: Tensor,
    tuned_weights: Tensor,
    base_weights: Tensor,
) -> Tensor:
    """The sums of each block, `[10, rows, blocks]`; leaves e^x in the weights."""
    xt, et = _centred(tuned, tuned_maximum)
    xb, eb = _centred(base, base_maximum)
    tuned_weights.copy_(et.flatten(1))
    base_weights.copy_(eb.flatten(1))
    difference = xt - xb
    between = [torch.where(e == 0, 0, e * difference).sum(2) for e in (et, eb)]
    return torch.stack([*_weighted_sums(xt, et), *_weighted_sums(xb, eb), *between])


def _mixture_blocks(tuned_weights: Tensor, base_weights: Tensor, tuned_scale: Tensor, base_scale: Tensor) -> Tensor:
    mixture = (tuned_weights * tuned_scale + base_weights * base_scale).view(len(base_scale), -1, _BLOCK)
    return torch.where(mixture == 0, 0, mixture * mixture.log()).sum(2)


def _centred(logits: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    x = (logits.to(maximum.dtype) - maximum).view(len(maximum), -1, _BLOCK)
    return x, x.exp()


def _weighted_sums(x: Tensor, e: Tensor) -> list[Tensor]:
    weighted = torch.where(e == 0, 0, e * x)
    return [e.sum(2), (e * e).sum(2), weighted.sum(2), torch.where(e == 0, 0, weighted * x).sum(2)]
