"""Run: the folder that a measurement writes, part by part, and that everything later reads."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Self

from geohooks.artifacts import Provenance, dumps, loads, read_json, replacing, write_json
from geohooks.errors import ArtifactError

__all__ = ["Column", "Manifest", "Part", "Run", "Totals"]

MANIFEST = "run.json"
_PART = re.compile(r"part-(\d{5,})\.parquet")
_TOTALS = b"geohooks.totals"


@attrs.frozen
class Column:
    """A column of positions: its name, its unit ("nats", "1" for plain numbers, ...), and what it says."""

    name: str
    unit: str
    description: str


@attrs.frozen
class Totals:
    """What a part, or a finished run, holds.

    `documents` has no empty ones, which are counted apart; `undefined_positions` are those whose logits had a NaN or
    an infinity above.
    """

    schema_version: ClassVar[int] = 1
    parts: int
    documents: int
    empty_documents: int
    tokens: int
    undefined_positions: int

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(mine + its for mine, its in zip(attrs.astuple(self), attrs.astuple(other), strict=True)))


@attrs.frozen
class Manifest:
    """What decides a run's rows, and, once it is finished, its totals.

    `tokenizer` is a SHA-256; `context`, `stride` and `batch_tokens` count tokens, `part_size` characters;
    `compiled` says whether the statistics were; `shared_ids` how many token ids models of differing vocabularies were
    compared on.
    """

    schema_version: ClassVar[int] = 1
    provenance: Provenance
    dtype: str
    tokenizer: str
    context: int
    stride: int
    batch_tokens: int
    part_size: int
    chat: bool
    text_field: str
    text_kept: bool
    compiled: bool
    domains: tuple[str, ...]
    columns: tuple[Column, ...]
    shared_ids: int | None
    totals: Totals | None

    @property
    def finished(self) -> bool:
        """Whether every part is there."""
        return self.totals is not None


@attrs.frozen(eq=False)
class Part:
    """One part of a run: its number, one row a document, and one row a token in order of document and position."""

    number: int
    documents: pa.Table
    positions: pa.Table


@attrs.frozen(eq=False)
class Run:
    """The folder at `path`: `run.json`, `documents/part-NNNNN.parquet`, `positions/part-NNNNN.parquet`.

    A part is there when its positions are, which are written last. Reading an unfinished run gives the parts that are
    there.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run at `path`; an `ArtifactError` where there is none, or where its manifest is broken."""
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(f"'{folder}' holds no run: it has no {MANIFEST}; make one with `geohooks measure`")
        return cls(folder, read_json(folder / MANIFEST, Manifest))

    @classmethod
    def begin(cls, path: str | Path, manifest: Manifest) -> Self:
        """The run at `path`, new or to be continued.

        An `ArtifactError` where the folder has something else in it, or a run whose manifest differs: it names the
        first difference.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        # Looked for before the manifest: another process of this run may be about to write it.
        strangers = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
        if (folder / MANIFEST).is_file():
            run = cls.open(folder)
            run._check_same(manifest)
            return run
        if strangers:
            raise ArtifactError(f"'{folder}' holds no run, but '{strangers[0]}'; name an empty or a new folder")
        write_json(folder / MANIFEST, attrs.evolve(manifest, totals=None))
        return cls(folder, attrs.evolve(manifest, totals=None))

    def _check_same(self, manifest: Manifest) -> None:
        there, here = (_flat(attrs.asdict(attrs.evolve(one, totals=None))) for one in (self.manifest, manifest))
        for name in {**there, **here}:
            if there.get(name) != here.get(name):
                raise ArtifactError(
                    f"'{self.path}' holds the run of another command: its {name} is {there.get(name)!r}, not "
                    f"{here.get(name)!r}; name another folder, or delete this one"
                )

    def part_numbers(self) -> tuple[int, ...]:
        """The numbers of the parts that are there, ascending."""
        found = (_PART.fullmatch(file.name) for file in self._folder("positions").glob("part-*.parquet"))
        return tuple(sorted(int(match[1]) for match in found if match))

    def has_part(self, number: int) -> bool:
        """Whether part `number` is there, with both its files readable to their end."""
        return all(_is_whole(self._file(kind, number)) for kind in ("documents", "positions"))

    def write_part(self, part: Part, totals: Totals) -> None:
        """Write the tables of a part, documents first; whole or not at all."""
        metadata = {**(part.documents.schema.metadata or {}), _TOTALS: dumps(totals)}
        tables = {"documents": part.documents.replace_schema_metadata(metadata), "positions": part.positions}
        for kind, table in tables.items():
            path = self._file(kind, part.number)
            path.parent.mkdir(exist_ok=True)
            for abandoned in path.parent.glob(f".{path.name}.*.tmp"):
                abandoned.unlink(missing_ok=True)
            with replacing(path) as temporary:
                named = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
                pq.write_table(table, temporary, compression="zstd", use_dictionary=named)

    def finish(self) -> Self:
        """This run with its totals in its manifest."""
        totals = sum((self.part_totals(number) for number in self.part_numbers()), Totals(0, 0, 0, 0, 0))
        finished = attrs.evolve(self.manifest, totals=totals)
        write_json(self.path / MANIFEST, finished)
        return attrs.evolve(self, manifest=finished)

    def part_totals(self, number: int) -> Totals:
        """What part `number` holds."""
        path = self._file("documents", number)
        found = (_read_schema(path).metadata or {}).get(_TOTALS)
        if found is None:
            raise ArtifactError(f"'{path}' was not written by geohooks: it has no totals")
        return loads(found.decode(), Totals, str(path))

    def part(self, number: int, columns: Sequence[str] | None = None) -> Part:
        """Part `number`, with the named columns of positions (all by default)."""
        return Part(number, self.part_documents(number), self._read(self._file("positions", number), columns))

    def part_documents(self, number: int) -> pa.Table:
        """The documents of part `number`."""
        return self._read(self._file("documents", number))

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[Part]:
        """The parts one by one, for runs larger than memory."""
        return (self.part(number, columns) for number in self.part_numbers())

    def documents(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row a document: document, name, domain, sha256, tokens and, where text was kept, text."""
        return self._all("documents", columns)

    def positions(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row a token, in order of document and position; the named columns, or all."""
        return self._all("positions", columns)

    def _all(self, kind: str, columns: Sequence[str] | None) -> pa.Table:
        numbers = self.part_numbers()
        if not numbers:
            raise ArtifactError(f"the run at '{self.path}' has no part yet; let `geohooks measure` write one first")
        tables = [self._read(self._file(kind, number), columns) for number in numbers]
        return pa.concat_tables(tables).unify_dictionaries()

    def _read(self, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        names = _read_schema(path).names
        for name in columns or ():
            if name not in names:
                nearest = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.3)) or ", ".join(names)
                raise ArtifactError(f"'{path}' has no column '{name}'; nearest are {nearest}")
        try:
            return pq.read_table(path, columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(f"'{path}' is broken: {error}; delete the run's folder, and measure again") from error

    def _folder(self, kind: str) -> Path:
        return self.path / kind

    def _file(self, kind: str, number: int) -> Path:
        return self._folder(kind) / f"part-{number:05d}.parquet"


def _is_whole(path: Path) -> bool:
    try:
        return path.is_file() and pq.read_metadata(path).num_rows >= 0
    except (pa.ArrowException, OSError):
        return False


def _read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' does not exist") from error
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"'{path}' is broken: {error}; delete the run's folder, and measure again") from error


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted name; lists are leaves."""
    if not isinstance(value, dict):
        return {name: json.loads(json.dumps(value))}
    prefix = f"{name}." if name else ""
    return {path: leaf for key, one in value.items() for path, leaf in _flat(one, prefix + key).items()}
