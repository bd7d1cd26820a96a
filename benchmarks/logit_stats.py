"""H, H2, V, NLL and both KLs of a pair of logits, over one float32 `torch.log_softmax` of the upcast tensor.

Prints, for each shape and dtype, the time of ours (eager, compiled; beside them with Jensen-Shannon, which
`compare_logits` also gives unless it is left out) and of the separate textbook calls as ratios, each the median over
interleaved repeats of the same run and the ratio of the fastest; the memory each takes beyond its inputs (MiB, the
peak of the allocator's own count); and the largest error against float64 of any of the six.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from geohooks.measures import compare_logits, compiler_available

NAMES = ("entropy", "renyi2", "varentropy", "nll", "forward_kl", "reverse_kl")
REACH = {"eager": (5.0, 8.0), "compiled": (1.5, 3.0)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--smoke", action="store_true", help="small tensors, one repeat")
    smoke = arguments.parse_args().smoke
    shapes = [(2, 8, 2048), (1, 1, 4096)] if smoke else [(4, 256, 50257), (1, 1, 151936)]
    print(f"{torch.get_num_threads()} threads; ratios over one float32 log_softmax", flush=True)
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            repeats = 1 if smoke else (7 if shape[0] > 1 else 101)
            # Each in a process of its own: what one leaves in the allocator makes the next one's yardstick faster.
            process = get_context("spawn").Process(target=compare_ways, args=(shape, dtype, repeats))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


def compare_ways(shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).mul_(2)
    tuned = torch.randn(shape, generator=generator).mul_(0.3).add_(base).to(dtype)
    base, targets = base.to(dtype), torch.randint(0, shape[-1], shape[:-1], generator=generator)
    upcast = tuned.float()
    ways: dict[str, Callable[[], object]] = {
        "log_softmax": lambda: torch.log_softmax(upcast, -1),
        "textbook": lambda: textbook(tuned, base, targets),
    }
    for name in ("eager", "compiled") if compiler_available() else ("eager",):
        for shannon in (False, True):
            ways[name + " + JS" * shannon] = partial(
                compare_logits, tuned, base, targets, jensen_shannon=shannon, compiled=name == "compiled"
            )
    times = interleaved(ways, repeats)
    exact = exact_statistics(tuned, base, targets)
    load = os.getloadavg()[0]
    print(f"\n{list(shape)} {dtype}: log_softmax {times['log_softmax'][0] * 1e3:.3f} ms, load {load:.1f}")
    for name, way in ways.items():
        median, fastest = (ours / theirs for ours, theirs in zip(times[name], times["log_softmax"], strict=True))
        line = f"  {name:13s} {median:6.2f}x (fastest {fastest:5.2f}x)  {extra_mebibytes(way):8.1f} MiB"
        if name in REACH:
            line += f"  error {largest_error(way(), exact):.1e}  (reach {REACH[name][shape[0] == 1]}x, 16 MiB, 1e-4)"
        print(line)


def textbook(tuned: Tensor, base: Tensor, targets: Tensor) -> list[Tensor]:
    """Each quantity by its own formula from the logits."""
    found = []
    for logits in (tuned, base):
        found.append(torch.distributions.Categorical(logits=logits, validate_args=False).entropy())
        found.append(-(logits.softmax(-1) ** 2).sum(-1).log())
        surprise = -logits.log_softmax(-1)
        mean = (logits.softmax(-1) * surprise).sum(-1, keepdim=True)
        found.append((logits.softmax(-1) * (surprise - mean) ** 2).sum(-1))
        found.append(F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none"))
    for one, other in ((base, tuned), (tuned, base)):
        logs = other.log_softmax(-1), one.log_softmax(-1)
        found.append(F.kl_div(*logs, log_target=True, reduction="none").sum(-1))
    return found


def exact_statistics(tuned: Tensor, base: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The textbook in float64, a few rows at a time."""
    rows = zip(*(one.flatten(0, -2).split(16) for one in (tuned, base)), targets.flatten().split(16), strict=True)
    parts = [textbook(q.double(), p.double(), wanted) for q, p, wanted in rows]
    names = [*(f"tuned.{name}" for name in NAMES[:4]), *(f"base.{name}" for name in NAMES[:4]), *NAMES[4:]]
    return {name: torch.cat(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def largest_error(measured: object, exact: dict[str, Tensor]) -> float:
    def value(path: str) -> Tensor:
        found = measured
        for name in path.split("."):
            found = getattr(found, name)
        assert isinstance(found, Tensor)
        return found.flatten().double()

    return max(float((value(path) - expected).abs().max()) for path, expected in exact.items())


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """The median and the least seconds of each way; the first call of each is not counted."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            if name == "textbook" and repeat > 2:
                continue
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(taken), min(taken)) for name, taken in seconds.items()}


def extra_mebibytes(way: Callable[[], object]) -> float:
    """The peak of what `way` holds allocated beyond what was there, as the allocator reports each block."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = way()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


if __name__ == "__main__":
    main()
