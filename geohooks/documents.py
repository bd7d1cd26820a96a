"""Data as documents: where they come from, which domain they are of, and the windows that a context cuts them into."""

from __future__ import annotations

import codecs
import json
import mimetypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from geohooks.artifacts import DataSource
from geohooks.errors import DataError

__all__ = ["Document", "Window", "check_stride", "find_sources", "read_documents", "size_of", "windows"]

Notice = Callable[[str], None]

_HEAD = 8192
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROWS = 256


@attrs.frozen
class Document:
    """One document: a text, or the messages of a conversation; `size` is how many bytes of its source it takes."""

    name: str
    domain: str
    text: str
    messages: tuple[Mapping[str, Any], ...] | None = None
    size: int = 0


@attrs.frozen
class Window:
    """Tokens `start` to `stop` of a document, of which rows `first` to `last` count."""

    start: int
    stop: int
    first: int
    last: int


def windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` tokens, `stride` apart, in which each of `length` rows counts exactly once.

    A row counts in the first window that has both it and the token after it. The last window lies as far back as it
    can, so that every window of a long document is full. A `DataError` unless 1 <= stride < context.
    """
    check_stride(context, stride)
    start = first = 0
    while first < length:
        stop = min(start + context, length)
        last = length if stop == length else stop - 1
        yield Window(start, stop, first, last)
        first, start = last, max(0, min(start + stride, length - context))


def check_stride(context: int, stride: int) -> None:
    """Raise a `DataError` unless 1 <= stride < context."""
    if not 1 <= stride < context:
        raise DataError(f"a stride of {stride} with a context of {context}: it must be from 1 to {context - 1}")


def find_sources(arguments: Iterable[str]) -> tuple[DataSource, ...]:
    """What `PATH` and `NAME=PATH` name: files, folders and hub data sets, with their domains.

    The domain is NAME, else the folder's own name, else the file's suffix, else the data set's name. A `DataError`
    where a path does not exist and can't be the name of a data set.
    """
    return tuple(_source(argument) for argument in arguments)


def _source(argument: str) -> DataSource:
    name, equals, path = argument.partition("=")
    if not equals or not name or Path(argument).exists():
        name, path = "", argument
    place = Path(path)
    if place.is_dir():
        return DataSource(name or place.resolve().name, path)
    if place.exists():
        return DataSource(name or place.suffix.removeprefix(".") or place.name, path)
    if not _HUB_NAME.fullmatch(path) or place.suffix.lower() in {".txt", ".jsonl", ".parquet", ".md", ".py"}:
        raise DataError(f"'{path}' does not exist: there is no such file or folder, and no data set has such a name")
    return DataSource(name or path.rpartition("/")[2], path)


def size_of(sources: Iterable[DataSource]) -> int | None:
    """How many bytes the sources have that `read_documents` reads; None where a hub data set is among them."""
    places = [Path(source.path) for source in sources]
    if not all(place.exists() for place in places):
        return None
    files = (file for place in places for file in (_files(place, _silent) if place.is_dir() else [place]))
    return sum(file.stat().st_size for file in files)


def read_documents(
    sources: Iterable[DataSource], *, text_field: str = "text", chat: bool = False, notice: Notice | None = None
) -> Iterator[Document]:
    """The documents of the sources, one by one and always in the same order.

    jsonl and parquet hold a document a row, in `text_field`, or under `chat` a conversation a row, in `messages`; every
    other file is one document. In folders, hidden files are left out, and binary ones with a `notice`. A `DataError`
    names the file, and the row or the offset, of what can't be read.
    """
    field = "messages" if chat else text_field
    for source in sources:
        place = Path(source.path)
        if place.is_dir():
            for file in _files(place, notice or _silent):
                yield from _in_file(file, file.relative_to(place).as_posix(), source.domain, field, chat=chat)
        elif place.exists():
            yield from _in_file(place, place.name, source.domain, field, chat=chat)
        else:
            yield from _in_data_set(source, field, chat=chat)


def _silent(message: str) -> None:
    del message


def _files(folder: Path, notice: Notice) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts):
            continue
        if not file.is_file():
            continue
        if file.suffix.lower() != ".parquet" and _is_binary(file):
            notice(f"left out '{file}': it is binary")
        else:
            yield file


def _is_binary(file: Path) -> bool:
    """Whether a file looks binary, and its name does not say that it is text."""
    if file.suffix.lower() == ".jsonl" or (mimetypes.guess_type(file.name)[0] or "").startswith("text/"):
        return False
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return b"\0" in head


def _in_file(file: Path, name: str, domain: str, field: str, *, chat: bool) -> Iterator[Document]:
    kind = file.suffix.lower()
    if kind == ".jsonl":
        rows = _json_rows(file)
    elif kind == ".parquet":
        rows = _parquet_rows(file, field)
    elif chat:
        raise DataError(f"'{file}' is no jsonl or parquet file: conversations are read from these; leave out --chat")
    else:
        content = file.read_bytes()
        yield Document(name, domain, _decoded(content, file), size=len(content))
        return
    for number, row, size in rows:
        yield _in_row(row, f"{name}:{number}", str(file), domain, field, chat=chat, size=size)


def _decoded(content: bytes, file: Path, offset: int = 0) -> str:
    """`content`, which begins at `offset` of the file, as UTF-8 text without a byte-order mark."""
    wrong = content.find(b"\0")
    reason = "a zero byte"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if wrong < 0 or error.start < wrong:
            wrong, reason = error.start, f"byte 0x{content[error.start]:02x}"
    if wrong >= 0:
        raise DataError(
            f"'{file}' is not UTF-8 text: {reason} at offset {offset + wrong}; convert it, repair it or leave it out"
        )
    return text


def _json_rows(file: Path) -> Iterator[tuple[int, Any, int]]:
    offset = 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            text = _decoded(line, file, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"'{file}' line {number} is not JSON: {error}") from error
            yield number, row, len(line)


def _parquet_rows(file: Path, field: str) -> Iterator[tuple[int, Any, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if field not in names:
                raise DataError(
                    f"'{file}' has no column '{field}'; it has {', '.join(names)}: name one with --text-field"
                )
            size = file.stat().st_size // max(1, opened.metadata.num_rows)
            number = 0
            for batch in opened.iter_batches(_ROWS, columns=[field]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, size
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{file}' is no readable parquet file: {error}") from error


def _in_row(row: Any, name: str, file: str, domain: str, field: str, *, chat: bool, size: int = 0) -> Document:
    number = name.rpartition(":")[2]
    if not isinstance(row, Mapping) or field not in row:
        raise DataError(f"'{file}' row {number} has no field '{field}'{_instead(row, chat=chat)}")
    value = row[field]
    if not chat:
        if not isinstance(value, str):
            raise DataError(f"'{file}' row {number}: '{field}' is {type(value).__name__}, not a string")
        if _SURROGATE.search(value):
            raise DataError(f"'{file}' row {number}: '{field}' has half of a surrogate pair, which is no text")
        return Document(name, domain, value, size=size)
    if not _is_conversation(value):
        raise DataError(f"'{file}' row {number}: 'messages' is no list of objects with 'role' and 'content'")
    return Document(name, domain, "", tuple(value), size=size)


def _instead(row: Any, *, chat: bool) -> str:
    if not isinstance(row, Mapping):
        return f"; it is {type(row).__name__}, not an object"
    if "messages" in row and not chat:
        return " but a conversation; read it with --chat"
    return f"; it has {', '.join(row) or 'none'}" + ("" if chat else ": name one with --text-field")


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value
    )


def _in_data_set(source: DataSource, field: str, *, chat: bool) -> Iterator[Document]:
    """Every row of every split of a data set on the hub."""
    import datasets

    try:
        for split, rows in datasets.load_dataset(source.path, streaming=True).items():
            for number, row in enumerate(rows, 1):
                yield _in_row(row, f"{split}:{number}", f"{source.path}/{split}", source.domain, field, chat=chat)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"'{source.path}' is no file or folder here, and as a data set on the hub it can't be read: {error}"
        ) from error
