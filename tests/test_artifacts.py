from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geohooks.artifacts import (
    DataSource,
    ModelSource,
    Provenance,
    code_versions,
    dumps,
    loads,
    read_json,
    replacing,
    write_json,
)
from geohooks.errors import ArtifactError


@attrs.frozen
class Recipe:
    schema_version: ClassVar[int] = 3
    name: str
    amounts: tuple[float, ...]
    steps: dict[str, int]
    provenance: Provenance | None
    ready: bool


finite = st.floats(allow_nan=False, allow_infinity=False)
sources = st.builds(ModelSource, st.text(), st.text())
provenances = st.builds(
    Provenance,
    st.dictionaries(st.text(), st.text()),
    sources,
    st.none() | sources,
    st.lists(st.builds(DataSource, st.text(), st.text())).map(tuple),
)
recipes = st.builds(
    Recipe,
    st.text(),
    st.lists(finite).map(tuple),
    st.dictionaries(st.text(), st.integers()),
    st.none() | provenances,
    st.booleans(),
)
EXAMPLE = Recipe("soup", (1.0,), {"stir": 2}, Provenance({"a": "1"}, ModelSource("m", "f"), None, ()), ready=True)


@given(recipes)
def test_what_is_written_is_what_is_read(recipe: Recipe) -> None:
    assert loads(dumps(recipe), Recipe, "x") == recipe


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda content: content.update(salt=1), r"extra fields found \(salt\)"),
        (lambda content: content.pop("name"), r"required field missing @ \$.name"),
        (lambda content: content["provenance"].pop("base"), r"missing @ \$.provenance.base"),
        (lambda content: content["provenance"]["model"].update(size=1), r"\(size\) @ \$.provenance.model"),
        (lambda content: content.update(name=1), r"expected str @ \$.name"),
        (lambda content: content["steps"].update(stir=True), r"expected int"),
        (lambda content: content["steps"].update(stir="2"), r"expected int"),
        (lambda content: content.update(amounts="12"), r"expected tuple @ \$.amounts"),
        (lambda content: content.update(amounts=[1, "2"]), r"expected float @ \$.amounts\[1\]"),
        (lambda content: content.update(provenance=3), r"Provenance \| None @ \$.provenance"),
        (lambda content: content["steps"].update(stir=None), r"expected int"),
        (lambda content: content.update(ready=1), r"expected bool @ \$.ready"),
        (lambda content: content.update(schema_version=2), r"schema_version 2 and this geohooks reads 3"),
        (lambda content: content.pop("schema_version"), r"schema_version None"),
    ],
)
def test_what_differs_from_the_layout_is_named(change: Callable[[Any], Any], complaint: str) -> None:
    content = json.loads(dumps(EXAMPLE))
    change(content)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        loads(json.dumps(content), Recipe, "soup.json")
    assert "soup.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 3, "name": NaN}', "\x00"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="soup"):
        loads(text, Recipe, "soup")


def test_nan_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(attrs.evolve(EXAMPLE, amounts=(float("nan"),)))


def test_a_missing_file_and_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        read_json(tmp_path / "none.json", Recipe)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"bytes\.json"):
        read_json(tmp_path / "bytes.json", Recipe)


def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "soup.json"
    write_json(path, EXAMPLE)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"soup.json' can't be written: No space left on device; .* intact"):
        write_json(path, attrs.evolve(EXAMPLE, name="stew"))
    assert read_json(path, Recipe) == EXAMPLE
    assert [one.name for one in tmp_path.iterdir()] == ["soup.json"]


def test_an_error_inside_the_block_writes_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_versions_are_those_that_are_installed() -> None:
    import torch

    assert code_versions()["torch"] == str(torch.__version__)
    assert set(code_versions()) == {"geohooks", "torch", "transformers"}
