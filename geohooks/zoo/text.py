"""The text that the trained models were made from: it lies on every machine that has Python."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sysconfig
from collections.abc import Callable
from pathlib import Path

import attrs

from geohooks.errors import DataError

__all__ = ["HELD_OUT_ONE_IN", "Document", "documents", "domains", "training_texts"]

HELD_OUT_ONE_IN = 11

_PACKAGES = (
    *(
        "asyncio",
        "collections",
        "concurrent",
        "ctypes",
        "curses",
        "dbm",
        "email",
        "html",
        "http",
        "importlib",
    ),
    *(
        "json",
        "logging",
        "multiprocessing",
        "re",
        "sqlite3",
        "tkinter",
        "tomllib",
        "unittest",
        "urllib",
        "venv",
    ),
    *("wsgiref", "xml", "xmlrpc", "zipfile", "zoneinfo"),
)
# sysconfig's data differs from machine to machine, and tests are no code that one would read
_LEFT_OUT = ("_sysconfigdata", "test", "tests", "__phello__")


@attrs.frozen
class Document:
    """One text of a domain; no model of the zoo was trained on it where it is `held_out`."""

    domain: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the SHA-256 of `domain/name`, as a number, is a multiple of `HELD_OUT_ONE_IN`."""
        digest = hashlib.sha256(f"{self.domain}/{self.name}".encode()).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def domains() -> tuple[str, ...]:
    """The names that `documents` knows."""
    return tuple(_SOURCES)


def documents(domain: str) -> tuple[Document, ...]:
    """The texts of `prose` (the topics of Python's help) or `code` (modules of its library), sorted by name.

    They are read from the Python that runs, so they differ a little from version to version. Raises
    `DataError` for an unknown domain, and where Python was installed without its sources.
    """
    if domain not in _SOURCES:
        nearest = ", ".join(difflib.get_close_matches(domain, _SOURCES, cutoff=0.3)) or ", ".join(_SOURCES)
        raise DataError(f"no domain '{domain}'; nearest are {nearest}")
    found = tuple(Document(domain, name, text) for name, text in sorted(_SOURCES[domain]().items()) if text)
    if not found:
        raise DataError(f"no text of domain '{domain}' in {_library()}; install Python with its sources")
    return found


def training_texts(domain: str) -> tuple[str, ...]:
    """What the models were trained on: the texts that are not held out, without any paragraph of one that is.

    Topics quote each other at length, so whole documents held out would still be known by their parts.
    """
    found = documents(domain)
    held_out = {part.strip() for document in found if document.held_out for part in document.text.split("\n\n")}
    return tuple(
        "\n\n".join(part for part in document.text.split("\n\n") if part.strip() not in held_out)
        for document in found
        if not document.held_out
    )


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _code() -> dict[str, str]:
    root = _library()
    files = [*root.glob("*.py"), *(file for package in _PACKAGES for file in (root / package).rglob("*.py"))]
    names = {file.relative_to(root): file for file in files}
    return {
        name.as_posix(): file.read_text(encoding="utf-8")
        for name, file in names.items()
        if not any(part.startswith("_sysconfigdata") or part in _LEFT_OUT for part in name.with_suffix("").parts)
    }


def _prose() -> dict[str, str]:
    if importlib.util.find_spec("pydoc_data") is None:
        return {}
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return topics


_SOURCES: dict[str, Callable[[], dict[str, str]]] = {"prose": _prose, "code": _code}
