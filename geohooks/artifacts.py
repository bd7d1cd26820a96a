"""Files that outlive a run: JSON that is read strictly, writes that happen whole or not at all, provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn

from geohooks.errors import ArtifactError

__all__ = [
    "Artifact",
    "DataSource",
    "ModelSource",
    "Provenance",
    "code_versions",
    "dumps",
    "loads",
    "read_json",
    "replacing",
    "write_json",
]


class Artifact(Protocol):
    """An attrs class of JSON values that states the version of its layout; no field has a default."""

    schema_version: ClassVar[int]
    __attrs_attrs__: ClassVar[Any]


A = TypeVar("A", bound=Artifact)


@attrs.frozen
class ModelSource:
    """A model: the name or folder it was loaded from, and what tells its weights from others."""

    name: str
    fingerprint: str


@attrs.frozen
class DataSource:
    """What was read as the documents of one domain, as it was named: a file, a folder, or a hub data set."""

    domain: str
    path: str


@attrs.frozen
class Provenance:
    """What a file comes from: versions of the code by distribution, models, and data."""

    versions: dict[str, str]
    model: ModelSource
    base: ModelSource | None
    data: tuple[DataSource, ...]


def code_versions() -> dict[str, str]:
    """The versions of geohooks and of the libraries that decide its figures."""
    return {name: metadata.version(name) for name in ("geohooks", "torch", "transformers")}


def dumps(artifact: Artifact) -> str:
    """`artifact` as JSON text, with the version of its layout first; a ValueError for NaN and infinities."""
    content = {"schema_version": artifact.schema_version, **_converter.unstructure(artifact)}
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def loads(text: str, kind: type[A], name: str) -> A:
    """The `kind` that `text` holds; an `ArtifactError` about `name` says what is unknown, missing or mistyped."""
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise ArtifactError(f"'{name}' is not JSON: {error}; it is broken or foreign") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"'{name}' is no JSON object; it is broken or foreign")
    version = content.pop("schema_version", None)
    if version != kind.schema_version or isinstance(version, bool):
        raise ArtifactError(
            f"'{name}' has schema_version {version!r} and this geohooks reads {kind.schema_version}; "
            "make the file again, or use the geohooks that wrote it"
        )
    try:
        return _converter.structure(content, kind)
    except cattrs.BaseValidationError as error:
        problems = "; ".join(cattrs.transform_error(error))
        raise ArtifactError(f"'{name}' is not what {kind.__name__} looks like: {problems}") from error


def read_json(path: Path, kind: type[A]) -> A:
    """The `kind` in the file at `path`, read strictly; an `ArtifactError` names the file and what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' does not exist") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"'{path}' is not JSON: {error}; it is broken or foreign") from error
    return loads(text, kind, str(path))


def write_json(path: Path, artifact: Artifact) -> None:
    """Write `artifact` to `path`, whole or not at all."""
    text = dumps(artifact)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place when the block ends without an error.

    The content reaches the disk before the name does. An `ArtifactError` where the system refuses a write (a full
    disk); `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ArtifactError(
            f"'{path}' can't be written: {reason}; what was written before is intact, so make room and run the same "
            "command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _exactly(*types: type) -> Callable[[Any, type], Any]:
    """Accept values of these types as they are: nothing is converted, and True is no number."""

    def structure(value: Any, wanted: type) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(value)
        return wanted(value)

    return structure


def _is_tuple(wanted: Any) -> bool:
    return get_origin(wanted) is tuple


def _strict_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.items():
        converter.register_structure_hook(kind, _exactly(*accepted))

    def listed(value: Any, wanted: Any) -> Any:
        if not isinstance(value, list):
            raise TypeError(value)
        items: Any = list[get_args(wanted)[0]]  # type: ignore[misc]
        return tuple(converter.structure(value, items))

    def named(kind: type) -> Callable[[Any, type], Any]:
        structure: Callable[[Any, type], Any] = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

        def checked(value: Any, wanted: type) -> Any:
            if not isinstance(value, dict):
                raise TypeError(value)
            return structure(value, wanted)

        return checked

    converter.register_structure_hook_func(_is_tuple, listed)
    converter.register_structure_hook_factory(attrs.has, named)
    return converter


_converter = _strict_converter()
