"""Runs that tests write themselves: the folder of a measurement without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np
import pyarrow as pa

from geohooks.artifacts import DataSource, ModelSource, Provenance
from geohooks.run import Column, Manifest, Part, Run, Totals

MAIN = [
    "entropy",
    "renyi2",
    "varentropy",
    "residual",
    "top1_probability",
    "margin",
    "nll",
    "calibration_gap",
    "calibration_z",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "entropy_change",
    "varentropy_change",
    "top1_agreement",
    "base_entropy",
    "base_nll",
    "nll_increase",
]
NEXT_TOKEN = ("nll", "calibration_gap", "calibration_z", "base_nll", "nll_increase")


@attrs.frozen
class Written:
    """A document: its tokens, and its signals, one value (or None) a token."""

    name: str
    domain: str
    tokens: tuple[str, ...]
    signals: Mapping[str, Sequence[float | None]]


def drawn(name: str, domain: str, tokens: Sequence[str], seed: int, signals: Sequence[str] = MAIN) -> Written:
    """A document with random signals: null at the last token where they are about the next one."""
    generator = np.random.default_rng(seed)
    values: dict[str, list[float | None]] = {}
    for signal in signals:
        column = generator.gamma(1.5, size=len(tokens))
        if signal.endswith(("_change", "_increase", "_gap")):
            column = generator.normal(0.5, 1, size=len(tokens))
        if signal == "top1_probability":
            column = generator.uniform(size=len(tokens))
        values[signal] = [float(np.float32(value)) for value in column]
        if signal in NEXT_TOKEN and tokens:
            values[signal][-1] = None
    return Written(name, domain, tuple(tokens), values)


def write_run(
    path: Path,
    documents: Sequence[Written],
    *,
    text_kept: bool = True,
    finished: bool = True,
    parts: int = 1,
    base: bool = True,
) -> Run:
    """The run of `documents`, in `parts` parts of about equal numbers of documents."""
    signals = list(documents[0].signals) if documents else ["entropy", "nll"]
    manifest = Manifest(
        provenance=Provenance(
            versions={"geohooks": "0.1.0"},
            model=ModelSource("a-tuned", "1"),
            base=ModelSource("a-base", "0") if base else None,
            data=tuple(DataSource(name, f"/data/{name}") for name in dict.fromkeys(one.domain for one in documents)),
        ),
        dtype="float32",
        compiled=False,
        tokenizer="0" * 64,
        context=512,
        stride=256,
        batch_tokens=4096,
        part_size=1000,
        chat=False,
        text_field="text",
        text_kept=text_kept,
        domains=tuple(dict.fromkeys(one.domain for one in documents)),
        columns=tuple(Column(name, "nats", f"what {name} is") for name in ["document", "position", *signals]),
        shared_ids=None,
        totals=None,
    )
    run = Run.begin(path, manifest)
    for number, chosen in enumerate(np.array_split(np.arange(len(documents)), parts)):
        part = _part(number, [(int(one), documents[one]) for one in chosen], signals, text_kept=text_kept)
        tokens = part.positions.num_rows
        run.write_part(part, Totals(1, part.documents.num_rows, 0, tokens, 0))
    return run.finish() if finished else run


def _part(number: int, documents: Sequence[tuple[int, Written]], signals: Sequence[str], *, text_kept: bool) -> Part:
    text = ["".join(one.tokens) for _, one in documents]
    listing = {
        "document": pa.array([key for key, _ in documents], pa.int64()),
        "name": pa.array([one.name for _, one in documents], pa.string()),
        "domain": pa.array([one.domain for _, one in documents], pa.string()),
        "sha256": pa.array([hashlib.sha256(one.encode()).hexdigest() for one in text], pa.string()),
        "tokens": pa.array([len(one.tokens) for _, one in documents], pa.int64()),
    }
    rows = [(key, one, at) for key, one in documents for at in range(len(one.tokens))]
    columns = {
        "document": pa.array([key for key, _, _ in rows], pa.int64()),
        "position": pa.array([at for _, _, at in rows], pa.int32()),
        "token_id": pa.array([100 + at for _, _, at in rows], pa.int32()),
        "domain": pa.array([one.domain for _, one, _ in rows], pa.string()).dictionary_encode(),
    }
    if text_kept:
        listing["text"] = pa.array(text, pa.string())
        columns["token"] = pa.array([one.tokens[at] for _, one, at in rows], pa.string())
    for signal in signals:
        columns[signal] = pa.array([one.signals[signal][at] for _, one, at in rows], pa.float32())
    return Part(number, pa.table(listing), pa.table(columns))
