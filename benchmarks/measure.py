"""Tokens per second of the measuring pipeline over the bare forward passes that it contains.

`python benchmarks/measure.py [--smoke]`. The same batches go through the model and its base alone, and through the
whole pipeline (tokenizer, hooks, statistics, Parquet on disk), in turn; the median ratio of the rounds is shown.
On a machine that does other work as well, the ratio of processor times is the steadier one.
Loading and compiling are done before the clock runs. Reach: 0.85 for the large pair, 0.6 for the embedded one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from geohooks import zoo
from geohooks.artifacts import ModelSource
from geohooks.documents import find_sources
from geohooks.pipeline import Measurement, Settings
from geohooks.zoo.text import documents

EMBEDDED = ("qwen3-moe-tiny-tuned", "qwen3-moe-tiny-base")


@attrs.frozen(eq=False)
class Pair:
    """Two models and how much text they are measured on."""

    name: str
    reach: float
    model: Any
    base: Any
    characters: int
    settings: Settings


def random_model(seed: int, *, smoke: bool) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = Qwen3Config(
        vocab_size=3000 if smoke else 50_257,
        num_key_value_heads=4,
        head_dim=16 if smoke else 64,
        max_position_embeddings=1024,
        **(tiny if smoke else shape),
    )
    return Qwen3ForCausalLM(config).eval()


def pairs(*, smoke: bool) -> list[Pair]:
    models = [zoo.load(name).model for name in EMBEDDED]
    large = [random_model(seed, smoke=smoke) for seed in (0, 1)]
    settings = Settings(context=256, batch_tokens=1024)
    return [
        Pair("768 wide, 12 layers, 50,257 ids", 0.85, *large, 2_000 if smoke else 4_000, settings),
        Pair("embedded", 0.6, *models, 4_000 if smoke else 60_000, Settings()),
    ]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time."""
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def ratios(pair: Pair, folder: Path, rounds: int) -> tuple[list[tuple[float, float]], int, float]:
    """For each round, wall and processor time of the bare passes over the pipeline's; tokens; its best wall time."""
    data = folder / "prose.txt"
    data.write_text("\n\n".join(one.text for one in documents("prose"))[: pair.characters])
    measurement = Measurement(
        pair.model,
        zoo.load(EMBEDDED[0]).tokenizer,
        find_sources([str(data)]),
        names=(ModelSource("model", "none"), ModelSource("base", "none")),
        base=pair.base,
        settings=pair.settings,
    )
    inputs: list[dict[str, Any]] = []
    hook = pair.model.register_forward_pre_hook(lambda _, __, given: inputs.append(given), with_kwargs=True)
    first = measurement.run(folder / "warm")
    hook.remove()
    batches = inputs[1:]

    def bare() -> None:
        with torch.inference_mode():
            for given in batches:
                pair.model(**given)
                pair.base(**given)

    found, best = [], float("inf")
    for number in range(rounds):
        alone = seconds(bare)
        whole = seconds(lambda number=number: measurement.run(folder / str(number)))
        best = min(best, whole[0])
        found.append((alone[0] / whole[0], alone[1] / whole[1]))
    assert first.manifest.totals is not None
    return found, first.manifest.totals.tokens, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny models, one round")
    smoke = parser.parse_args().smoke
    for pair in pairs(smoke=smoke):
        with tempfile.TemporaryDirectory() as folder:
            found, tokens, best = ratios(pair, Path(folder), rounds=1 if smoke else 3)
        wall, processor = zip(*found, strict=True)
        print(
            f"{pair.name}: {tokens:,} tokens, {tokens / best:,.0f} tokens/s; over the bare passes "
            f"{statistics.median(wall):.3f} ({min(wall):.3f} to {max(wall):.3f}), by processor time "
            f"{statistics.median(processor):.3f}; to be reached: {pair.reach}"
        )


if __name__ == "__main__":
    main()
