from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geohooks.documents import Document, find_sources, read_documents, size_of, windows
from geohooks.errors import DataError


def read(*arguments: str | Path, **options: Any) -> list[Document]:
    return list(read_documents(find_sources(map(str, arguments)), **options))


def texts(documents: list[Document]) -> list[str]:
    return [one.text for one in documents]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_windows_count_every_row_once_with_its_next_token(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    found = list(windows(length, context, stride))
    assert [row for one in found for row in range(one.first, one.last)] == list(range(length))
    for one in found:
        assert 0 <= one.start <= one.first < one.last <= one.stop <= length
        assert one.stop - one.start == min(context, length)
        assert one.last < one.stop or one.stop == length
        assert one.first == 0 or one.first - one.start >= context - stride - 1
    assert all(after.start - before.start <= stride for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_a_stride_that_would_leave_rows_out_is_refused(stride: int) -> None:
    with pytest.raises(DataError, match=f"a stride of {stride} with a context of 8"):
        list(windows(20, 8, stride))


def test_domains_are_named_or_the_folder_or_the_suffix(tmp_path: Path) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    file = folder / "a=b.md"
    file.write_text("x")
    bare = folder / "README"
    bare.write_text("x")
    arguments = [str(folder), f"talk={folder}", str(file), f"notes={file}", "user/set", "mine=user/set", str(bare)]
    assert [one.domain for one in find_sources(arguments)] == ["prose", "talk", "md", "notes", "set", "mine", "README"]
    assert find_sources(["."])[0].domain == Path.cwd().name


@pytest.mark.parametrize("path", ["none.txt", "./none", "/none/at/all", "a b", "x=none.jsonl"])
def test_what_does_not_exist_and_names_no_data_set_is_refused(path: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_sources([path])


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub").mkdir()
    for name, content in {
        ".git/config": b"no", ".hidden": b"no", "b.py": b"second", "a.txt": b"first", "sub/c.rs": "drittes ß".encode(),
        "sub/picture": b"\x89PNG\r\n\x1a\n\0\0", "photo.png": b"\x89PNG", "empty.c": b"",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    heard: list[str] = []
    found = read(tmp_path, notice=heard.append)
    assert [(one.name, one.text) for one in found] == [
        ("a.txt", "first"), ("b.py", "second"), ("empty.c", ""), ("sub/c.rs", "drittes ß"),
    ]  # fmt: skip
    assert len(heard) == 2
    assert "photo.png" in heard[0]
    assert "picture" in heard[1]
    assert sum(one.size for one in found) == size_of(find_sources([str(tmp_path)])) == 21


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "", "n": 1}, {"text": "two\nlines"})
    table = tmp_path / "b.parquet"
    pq.write_table(pa.table({"body": [f"row {number}" for number in range(600)]}), table)
    assert [(one.name, one.text) for one in read(lines)] == [
        ("a.jsonl:1", "one"), ("a.jsonl:2", ""), ("a.jsonl:3", "two\nlines"),
    ]  # fmt: skip
    found = read(table, text_field="body")
    assert texts(found) == [f"row {number}" for number in range(600)]
    assert found[-1].name == "b.parquet:600"
    assert texts(read(tmp_path / "a.jsonl", text_field="text")) == ["one", "", "two\nlines"]


def test_conversations_are_read_under_chat_only(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = jsonl(tmp_path / "talk.jsonl", {"messages": messages})
    assert read(file, chat=True)[0].messages == tuple(messages)
    with pytest.raises(DataError, match="row 1 has no field 'text' but a conversation; read it with --chat"):
        read(file)
    (tmp_path / "x.txt").write_text("hi")
    with pytest.raises(DataError, match="conversations are read from"):
        read(tmp_path / "x.txt", chat=True)
    with pytest.raises(DataError, match="no list of objects with 'role' and 'content'"):
        read(jsonl(tmp_path / "y.jsonl", {"messages": ["hi"]}), chat=True)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("half.txt", b"good text\xff\xfe\0", "byte 0xff at offset 9"),
        ("zero.py", b"good\0text", "a zero byte at offset 4"),
        ("late.md", b"x" * 10_000 + b"\0", "a zero byte at offset 10000"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xc3"}\n', "byte 0xc3 at offset 24"),
        ("cut.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", "row 1 has no field 'text'; it is list"),
        ("other.jsonl", b'{"body": "a"}\n', "it has body: name one with --text-field"),
        ("number.jsonl", b'{"text": 3}\n', "'text' is int, not a string"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("not.parquet", b"PAR1 not really", "no readable parquet file"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_what_can_not_be_read_is_named(tmp_path: Path, name: str, content: bytes, complaint: str, folder: bool) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        read(tmp_path if folder else tmp_path / name)
    assert name in str(caught.value)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "title": ["b"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no column 'text'; it has body, title: name one with --text-field"):
        read(tmp_path / "t.parquet")


def test_documents_before_the_broken_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    found = read_documents(find_sources([str(tmp_path)]))
    assert next(found).text == "good"
    with pytest.raises(DataError):
        next(found)


def test_a_byte_order_mark_and_line_ends_are_text_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(read(tmp_path / "a.txt")) == ["one\r\ntwo"]


def test_every_split_of_a_data_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]}
    made = datasets.IterableDatasetDict(
        {name: datasets.Dataset.from_list(rows).to_iterable_dataset() for name, rows in splits.items()}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: made)
    assert [(one.name, one.text) for one in read("user/set")] == [("train:1", "a"), ("train:2", "b"), ("test:1", "c")]
    assert size_of(find_sources(["user/set"])) is None


def test_a_data_set_that_can_not_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, streaming: bool) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'user/set' is no file or folder here, .* Couldn't reach 'user/set'"):
        read("user/set")
