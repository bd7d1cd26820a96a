"""What hearing every layer costs: Python-level calls per captured layer, and forward time over the bare model.

Run `python benchmarks/host.py`; `--smoke` takes one small model and few repeats. Calls are counted by
`sys.setprofile` (Python and C functions alike), less those of the bare model, over the number of layers: they do not
depend on how busy the machine is. Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import geohooks


class Store(geohooks.Plugin):
    """Keeps every layer's output."""

    def __init__(self, number: int) -> None:
        self.name = f"store-{number}"
        self.kept: dict[geohooks.Site, torch.Tensor] = {}

    @geohooks.hookimpl
    def sites(self) -> list[str]:
        return ["decoder.*.output"]

    @geohooks.hookimpl
    def on_hidden(self, event: geohooks.HiddenEvent) -> None:
        self.kept[event.site.layer] = event.value


class Deaf(geohooks.Plugin):
    """Listens to nothing."""

    name = "deaf"

    @geohooks.hookimpl
    def sites(self) -> list[str]:
        return []


def model_of(width: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    """A random Llama of that shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64 or 1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def raw_hooks(model: nn.Module) -> Iterator[None]:
    """One raw hook a layer, that stores."""
    kept: dict[int, torch.Tensor] = {}

    def storing(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            kept[index] = output

        return hook

    handles = [layer.register_forward_hook(storing(i)) for i, layer in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def nnsight_forward(model: nn.Module) -> Callable[..., None]:
    """A pass under nnsight's trace that saves every layer's output."""
    from nnsight import NNsight, save

    traced = NNsight(model)

    def forward(**inputs: torch.Tensor) -> None:
        with traced.trace(**inputs):
            kept = save([])
            for layer in traced.model.layers:
                kept.append(layer.output)

    return forward


def calls(run: Callable[[], object]) -> int:
    """Python and C functions called by `run`."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    run()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def hooks_on(model: nn.Module) -> int:
    """Hooks on any module of `model`."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def ways(model: nn.Module) -> dict[str, Callable[[], object]]:
    """What surrounds the forward passes, by name."""
    return {
        "bare": nullcontext,
        "raw hook that stores": lambda: raw_hooks(model),
        "geohooks, no listener": lambda: geohooks.instrument(model, [Deaf()]),
        "geohooks, 1 plugin": lambda: geohooks.instrument(model, [Store(0)]),
        "geohooks, 5 plugins": lambda: geohooks.instrument(model, [Store(i) for i in range(5)]),
    }


def call_counts() -> dict[str, float]:
    """Calls per captured layer: the difference between a deep and a shallow model over the difference in depth."""
    counts: dict[str, float] = {}
    for depth in (2, 8):
        model = model_of(64, depth, 99)
        tokens = torch.randint(1, 99, (1, 8))
        with torch.no_grad():
            for name, surrounding in ways(model).items():
                with surrounding():
                    counted = calls(lambda: model(input_ids=tokens))
                counts[name] = counts.get(name, 0) + (counted if depth == 8 else -counted)
            traced = nnsight_forward(model)
            counted = calls(lambda: traced(input_ids=tokens))
            counts["nnsight trace"] = counts.get("nnsight trace", 0) + (counted if depth == 8 else -counted)
    bare = counts["bare"]
    return {name: (count - bare) / 6 for name, count in counts.items()}


def times(model: nn.Module, length: int, repeats: int) -> dict[str, float]:
    """Median seconds of one prefill under each way, interleaved."""
    tokens = torch.randint(1, 99, (1, length))
    taken: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(repeats):
            for name, surrounding in ways(model).items():
                with surrounding():
                    start = time.perf_counter()
                    model(input_ids=tokens)
                    taken.setdefault(name, []).append(time.perf_counter() - start)
    # nnsight puts itself into every module for good: it comes last.
    traced = nnsight_forward(model)
    with torch.no_grad():
        traced(input_ids=tokens)
        for _ in range(repeats):
            start = time.perf_counter()
            traced(input_ids=tokens)
            taken.setdefault("nnsight trace", []).append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one small model, few repeats")
    smoke = parser.parse_args().smoke
    counts = call_counts()
    print(f"{'calls per captured layer':<26}")
    for name, count in counts.items():
        print(f"  {name:<24} {count:8.1f}")
    model = model_of(64, 2, 99)
    with geohooks.instrument(model, [Deaf()]):
        print(f"hooks with no listener: {hooks_on(model)}")
    shapes = {"small (64 wide, 4 layers)": (64, 4, 999, 16)}
    if not smoke:
        shapes["medium (768 wide, 12 layers)"] = (768, 12, 50257, 128)
    for label, (width, depth, vocabulary, length) in shapes.items():
        seconds = times(model_of(width, depth, vocabulary), length, 3 if smoke else 25)
        print(f"forward of {length} tokens over bare, {label}")
        for name, value in seconds.items():
            print(f"  {name:<24} {value / seconds['bare']:8.3f}  ({value * 1e3:.2f} ms)")


if __name__ == "__main__":
    main()
