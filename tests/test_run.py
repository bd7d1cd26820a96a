from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import attrs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geohooks.artifacts import DataSource, ModelSource, Provenance
from geohooks.errors import ArtifactError
from geohooks.run import Column, Manifest, Part, Run, Totals

MANIFEST = Manifest(
    provenance=Provenance({"geohooks": "0.1.0"}, ModelSource("m", "f"), None, (DataSource("prose", "a.txt"),)),
    dtype="float32",
    tokenizer="ab",
    context=8,
    stride=4,
    batch_tokens=16,
    part_size=100,
    chat=False,
    text_field="text",
    text_kept=True,
    compiled=False,
    domains=("prose",),
    columns=(Column("entropy", "nats", "H"),),
    shared_ids=None,
    totals=None,
)


def part(number: int, tokens: int = 3) -> Part:
    documents = pa.table({"document": [number], "name": ["a"], "tokens": [tokens]})
    rows = {
        "document": [number] * tokens,
        "position": list(range(tokens)),
        "domain": pa.array([f"d{number}"] * tokens).dictionary_encode(),
        "entropy": pa.array([None, *[float(number)] * (tokens - 1)], pa.float32()),
    }
    return Part(number, documents, pa.table(rows))


def totals(tokens: int = 3) -> Totals:
    return Totals(1, 1, 2, tokens, 0)


def test_parts_come_back_in_order_and_add_up(tmp_path: Path) -> None:
    run = Run.begin(tmp_path / "run", MANIFEST)
    for number in (2, 0, 1):
        run.write_part(part(number), totals())
    opened = Run.open(tmp_path / "run")
    assert opened.part_numbers() == (0, 1, 2)
    assert opened.positions(["document", "domain"]).to_pydict() == {
        "document": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "domain": ["d0"] * 3 + ["d1"] * 3 + ["d2"] * 3,
    }
    assert [one.positions.equals(part(one.number).positions) for one in opened.parts()] == [True] * 3
    assert opened.documents()["document"].to_pylist() == [0, 1, 2]
    finished = opened.finish()
    assert finished.manifest.totals == Totals(3, 3, 6, 9, 0)
    assert Run.open(tmp_path / "run").manifest == finished.manifest
    assert finished.manifest.finished
    assert not opened.manifest.finished


def test_a_write_that_fails_leaves_the_parts_before_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.begin(tmp_path, MANIFEST)
    run.write_part(part(0), totals())

    def full(table: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        with pytest.raises(ArtifactError, match=r"part-00001\.parquet' can't be written: No space left on device"):
            run.write_part(part(1), totals())
    assert Run.open(tmp_path).part_numbers() == (0,)
    assert run.positions().equals(part(0).positions)
    assert not list(tmp_path.rglob("*.tmp"))
    run.write_part(part(1), totals())
    assert run.part_numbers() == (0, 1)


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    run = Run.begin(tmp_path, MANIFEST)
    (tmp_path / "positions").mkdir()
    abandoned = tmp_path / "positions" / ".part-00000.parquet.12345.tmp"
    abandoned.write_bytes(b"half")
    assert run.part_numbers() == ()
    run.write_part(part(0), totals())
    assert not abandoned.exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"context": 9}, "its context is 8, not 9"),
        ({"columns": ()}, "its columns is"),
        ({"provenance": attrs.evolve(MANIFEST.provenance, model=ModelSource("other", "f"))},
         "its provenance.model.name is 'm', not 'other'"),
        ({"provenance": attrs.evolve(MANIFEST.provenance, base=ModelSource("base", "f"))}, "its provenance.base"),
    ],
)  # fmt: skip
def test_another_command_on_the_folder_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    Run.begin(tmp_path, MANIFEST)
    Run.begin(tmp_path, MANIFEST)
    with pytest.raises(ArtifactError, match=complaint):
        Run.begin(tmp_path, attrs.evolve(MANIFEST, **change))


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match=r"holds no run, but 'thesis\.tex'"):
        Run.begin(tmp_path, MANIFEST)
    with pytest.raises(ArtifactError, match=r"holds no run: it has no run.json"):
        Run.open(tmp_path)


def test_a_broken_part_and_an_unknown_column_are_named(tmp_path: Path) -> None:
    run = Run.begin(tmp_path, MANIFEST)
    with pytest.raises(ArtifactError, match="has no part yet"):
        run.positions()
    run.write_part(part(0), totals())
    with pytest.raises(ArtifactError, match="no column 'entropi'; nearest are entropy"):
        run.positions(["entropi"])
    (tmp_path / "positions" / "part-00000.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ArtifactError, match=r"part-00000.parquet' is broken"):
        run.positions()
    pq.write_table(part(0).documents, tmp_path / "documents" / "part-00000.parquet")
    with pytest.raises(ArtifactError, match="was not written by geohooks"):
        run.finish()
