"""Measuring: documents through an instrumented model into the parts of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from geohooks.artifacts import DataSource, ModelSource, Provenance, code_versions
from geohooks.documents import Document, Window, check_stride, read_documents, size_of, windows
from geohooks.encoding import Encoded, Encoder
from geohooks.errors import ArtifactError, DataError
from geohooks.host import Host, instrument
from geohooks.measures import compiler_available
from geohooks.reference import InMemory
from geohooks.run import Column, Manifest, Part, Run, Totals

__all__ = ["Batch", "Group", "Measurement", "Settings", "batches", "groups", "processes"]

LONGEST_DEFAULT_CONTEXT = 2048
_BYTES_PER_TOKEN = 4
# Tokens times ids. Compiling takes about half a minute, and then saves 5 to 17 nanoseconds of a core for each of them.
_WORTH_COMPILING = 10_000_000_000


@attrs.frozen
class Settings:
    """How data is read and cut; `None` for `context` and `stride` means what the model allows and half of it."""

    context: int | None = None
    stride: int | None = None
    batch_tokens: int = 4096
    part_size: int = 1 << 18
    chat: bool = False
    text_field: str = "text"
    text_kept: bool = True


@attrs.frozen(eq=False)
class Group:
    """The documents of one part, and the number of the first of them in the run."""

    number: int
    first: int
    documents: tuple[Document, ...]


@attrs.frozen(eq=False)
class Batch:
    """Windows of about one length that go through the model together, each with its document's place in the group."""

    places: tuple[int, ...]
    windows: tuple[Window, ...]

    @property
    def length(self) -> int:
        """The length of its longest window."""
        return max(window.stop - window.start for window in self.windows)


def groups(documents: Iterable[Document], size: int) -> Iterator[Group]:
    """Documents in order, in groups that end when they have `size` characters."""
    number = first = characters = 0
    held: list[Document] = []
    for document in documents:
        held.append(document)
        characters += _characters(document)
        if characters >= size:
            yield Group(number, first, tuple(held))
            number, first, characters, held = number + 1, first + len(held), 0, []
    if held:
        yield Group(number, first, tuple(held))


def _characters(document: Document) -> int:
    return len(document.text) + sum(len(str(message["content"])) for message in document.messages or ())


def batches(lengths: Sequence[int], context: int, stride: int, batch_tokens: int) -> list[Batch]:
    """The windows of documents of these lengths, the longest first, in batches of at most `batch_tokens` with padding.

    A window that is longer than that is a batch of its own.
    """
    every = [(place, window) for place, length in enumerate(lengths) for window in windows(length, context, stride)]
    every.sort(key=lambda one: one[1].start - one[1].stop)
    found: list[Batch] = []
    start = 0
    while start < len(every):
        longest = every[start][1].stop - every[start][1].start
        chosen = every[start : start + max(1, batch_tokens // longest)]
        found.append(Batch(tuple(place for place, _ in chosen), tuple(window for _, window in chosen)))
        start += len(chosen)
    return found


def processes() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun and accelerate say it: 0 and 1 alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Measurement:
    """One model, with or without a base, over data: `run(folder)` makes or continues the run.

    `notice` is told what a person should know, `progress` how many tokens and bytes of the data were done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sources: Sequence[DataSource],
        *,
        names: tuple[ModelSource, ModelSource | None],
        base: Any = None,
        base_tokenizer: Any = None,
        settings: Settings | None = None,
        notice: Callable[[str], None] = lambda message: None,
        progress: Callable[[int, int], None] = lambda tokens, size: None,
    ) -> None:
        self.settings = _resolved(settings or Settings(), model, base)
        self._sources = tuple(sources)
        self._names = names
        self._model = model
        self._base = base
        self._encoder = Encoder(tokenizer, base_tokenizer)
        self._notice = notice
        self._progress = progress

    def run(self, folder: str | Path) -> Run:
        """Write the parts of this process that are missing in `folder`; the last process to end finishes the run."""
        with instrument(self._model, ["signals"], reference=self._base) as host, torch.inference_mode():
            host.compiled = self._pays_to_compile(host)
            schema = self._probe(host)
            run = Run.begin(folder, self._manifest(host, schema))
            count = 0
            for group in groups(self._documents(), self.settings.part_size):
                count += 1
                self._one(host, run, group, schema)
            if run.manifest.finished:
                self._notice(f"the run in '{folder}' is already finished")
                return run
            return self._finished(run, count)

    def _documents(self) -> Iterator[Document]:
        settings, rank = self.settings, processes()[0]
        return read_documents(
            self._sources,
            text_field=settings.text_field,
            chat=settings.chat,
            notice=self._notice if rank == 0 else None,
        )

    def _one(self, host: Host, run: Run, group: Group, schema: pa.Schema) -> None:
        rank, count = processes()
        size = sum(document.size for document in group.documents)
        if group.number % count != rank:
            self._progress(0, size)
            return
        texts = [self._encoder.text(document) for document in group.documents]
        if run.has_part(group.number):
            _check_unchanged(run, group, texts)
            self._progress(0, size)
            return
        if run.manifest.finished:
            raise ArtifactError(
                f"the run in '{run.path}' is finished, but part {group.number} is broken or the data have grown since; "
                "name another folder, or delete this one"
            )
        encoded = self._encoder.encode(group.documents, texts)
        some = any(len(one.token_ids) for one in encoded)
        positions = self._measured(host, group, encoded, size) if some else schema.empty_table()
        self._write(run, group, encoded, positions, schema)

    def _measured(self, host: Host, group: Group, encoded: Sequence[Encoded], size: int) -> pa.Table:
        settings, signals = self.settings, host["signals"]
        lengths = [len(one.token_ids) for one in encoded]
        assert settings.context is not None
        assert settings.stride is not None
        total, done = max(1, sum(lengths)), 0
        for batch in batches(lengths, settings.context, settings.stride, settings.batch_tokens):
            self._forward(host, batch, group, encoded)
            counted = sum(window.last - window.first for window in batch.windows)
            self._progress(counted, size * (done + counted) // total - size * done // total)
            done += counted
        table = signals.table()
        signals.clear()
        return table

    def _forward(self, host: Host, batch: Batch, group: Group, encoded: Sequence[Encoded]) -> None:
        shape = (len(batch.windows), batch.length)
        ids, mask, position, counted = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        for row, (place, window) in enumerate(zip(batch.places, batch.windows, strict=True)):
            width = window.stop - window.start
            ids[row, :width] = encoded[place].token_ids[window.start : window.stop]
            mask[row, :width] = 1
            position[row] = window.start + np.arange(batch.length)
            counted[row, window.first - window.start : window.last - window.start] = 1
        document = np.repeat(np.asarray(batch.places) + group.first, batch.length).reshape(shape)
        domain = [group.documents[place].domain for place in batch.places]
        self._call(host, ids, None if mask.all() else mask, (document, position, counted), domain)

    def _call(
        self,
        host: Host,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        labels: tuple[NDArray[np.int64], ...],
        domain: Sequence[str],
    ) -> None:
        device = self._model.device
        inputs = {"input_ids": torch.from_numpy(ids).to(device)}
        if mask is not None:
            inputs["attention_mask"] = torch.from_numpy(mask).to(device)
        document, position, counted = map(torch.from_numpy, labels)
        try:
            with host["signals"].labelled(document=document, position=position, counted=counted, domain=domain):
                self._model(**inputs, use_cache=False)
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"a batch of {ids.shape[0]} windows of {ids.shape[1]} tokens does not fit in memory; "
                "lower --batch-tokens or --context"
            ) from error

    def _write(
        self, run: Run, group: Group, encoded: Sequence[Encoded], positions: pa.Table, schema: pa.Schema
    ) -> None:
        filled = [(group.first + place, one) for place, one in enumerate(encoded) if len(one.token_ids)]
        named = {group.first + place: document for place, document in enumerate(group.documents)}
        columns: dict[str, Any] = {
            "document": pa.array([number for number, _ in filled], pa.int64()),
            "name": pa.array([named[number].name for number, _ in filled], pa.string()),
            "domain": pa.array([named[number].domain for number, _ in filled], pa.string()),
            "sha256": pa.array([_sha256(one.text) for _, one in filled], pa.string()),
            "tokens": pa.array([len(one.token_ids) for _, one in filled], pa.int64()),
        }
        table = positions.select(schema.names).cast(schema)
        if self.settings.text_kept:
            columns["text"] = pa.array([one.text for _, one in filled], pa.string())
            pieces = pa.array([piece for _, one in filled for piece in one.pieces], pa.string())
            table = table.add_column(4, _TOKEN, pieces)
        totals = Totals(1, len(filled), len(encoded) - len(filled), table.num_rows, _undefined(positions))
        run.write_part(Part(group.number, pa.table(columns), table), totals)

    def _finished(self, run: Run, count: int) -> Run:
        there = run.part_numbers()
        if there and there[-1] >= count:
            raise ArtifactError(
                f"'{run.path}' has a part {there[-1]}, and the data end before it now: they have changed since; "
                "name another folder, or delete this one"
            )
        if count == 0 or (len(there) == count and not any(run.part_totals(part).documents for part in there)):
            raise DataError("the data hold no text: no document, or only empty ones; name files with text in them")
        return run.finish() if len(there) == count else run

    def _probe(self, host: Host) -> pa.Schema:
        """The columns that the signals of this pair have, from two tokens."""
        ids = np.array([[0, 1]])
        self._call(host, ids, None, (np.zeros_like(ids), ids, np.ones_like(ids)), [""])
        schema = host["signals"].table().schema
        host["signals"].clear()
        return schema

    def _pays_to_compile(self, host: Host) -> bool:
        size = size_of(self._sources)
        tokens = float("inf") if size is None else size / _BYTES_PER_TOKEN
        if tokens * (host.anatomy.outputs or 0) / processes()[1] < _WORTH_COMPILING:
            return False
        if compiler_available(self._model.device):
            return True
        self._notice("no C++ compiler was found, so the statistics are not compiled, and slower")
        return False

    def _manifest(self, host: Host, schema: pa.Schema) -> Manifest:
        settings = self.settings
        base = host.reference.anatomy.outputs if isinstance(host.reference, InMemory) else None
        sizes = {size for size in (host.anatomy.outputs, base) if size}
        shared = min(sizes) if len(sizes) > 1 else None
        if shared is not None:
            self._notice(f"model and base differ in their vocabularies' padding: compared on the first {shared} ids")
        assert settings.context is not None
        assert settings.stride is not None
        return Manifest(
            provenance=Provenance(code_versions(), *self._names, self._sources),
            dtype=str(self._model.dtype).removeprefix("torch."),
            tokenizer=self._encoder.fingerprint,
            context=settings.context,
            stride=settings.stride,
            batch_tokens=settings.batch_tokens,
            part_size=settings.part_size,
            chat=settings.chat,
            text_field=settings.text_field,
            text_kept=settings.text_kept,
            compiled=host.compiled,
            domains=tuple(dict.fromkeys(source.domain for source in self._sources)),
            columns=tuple(_column(field) for field in [*_with_token(schema, kept=settings.text_kept)]),
            shared_ids=shared,
            totals=None,
        )


_TOKEN = pa.field("token", pa.string(), metadata={"unit": "1", "description": "the token's own text"})


def _with_token(schema: pa.Schema, *, kept: bool) -> Iterator[pa.Field]:
    fields = list(schema)
    yield from [*fields[:4], *([_TOKEN] if kept else []), *fields[4:]]


def _column(field: pa.Field) -> Column:
    return Column(field.name, field.metadata[b"unit"].decode(), field.metadata[b"description"].decode())


def _resolved(settings: Settings, model: Any, base: Any) -> Settings:
    """The settings with a context and a stride that the models allow; a `DataError` where they allow less."""
    limits = [getattr(one.config.get_text_config(), "max_position_embeddings", None) for one in (model, base) if one]
    most = min((limit for limit in limits if limit), default=None)
    context = settings.context or min(most or LONGEST_DEFAULT_CONTEXT, LONGEST_DEFAULT_CONTEXT)
    if most is not None and context > most:
        raise DataError(f"a context of {context} is more than the {most} positions of the model; lower --context")
    stride = settings.stride or max(1, context // 2)
    check_stride(context, stride)
    return attrs.evolve(settings, context=context, stride=stride)


def _check_unchanged(run: Run, group: Group, texts: Sequence[str]) -> None:
    there = run.part_documents(group.number)
    named = zip(there["document"].to_pylist(), there["sha256"].to_pylist(), strict=True)
    here = {group.first + place: _sha256(text) for place, text in enumerate(texts)}
    totals = run.part_totals(group.number)
    same = totals.documents + totals.empty_documents == len(here)
    if not same or any(here.get(number) != digest for number, digest in named):
        raise ArtifactError(
            f"'{run.path}' was begun with other data: the documents of part {group.number} have changed since; "
            "name another folder, or delete this one"
        )


def _undefined(positions: pa.Table) -> int:
    """How many rows have NaN statistics, of the model or of its base."""
    found = pc.is_nan(positions["entropy"])
    if "base_entropy" in positions.column_names:
        found = pc.or_(found, pc.is_nan(positions["base_entropy"]))
    return int(pc.sum(found).as_py() or 0)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
