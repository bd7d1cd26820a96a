from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geohooks.documents import Document
from geohooks.pipeline import batches, groups, processes


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(2, 20), st.integers(1, 100), st.data())
def test_batches_count_every_row_once_and_stay_within_their_tokens(
    lengths: list[int], context: int, batch_tokens: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    found = batches(lengths, context, stride, batch_tokens)
    counted = [
        (place, row)
        for batch in found
        for place, window in zip(batch.places, batch.windows, strict=True)
        for row in range(window.first, window.last)
    ]
    assert sorted(counted) == [(place, row) for place, length in enumerate(lengths) for row in range(length)]
    for batch in found:
        assert len(batch.windows) == 1 or len(batch.windows) * batch.length <= batch_tokens
    longest = [batch.length for batch in found]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 50))
def test_groups_keep_the_order_and_end_when_they_are_full(texts: list[str], size: int) -> None:
    documents = [Document(str(number), "d", text) for number, text in enumerate(texts)]
    found = list(groups(iter(documents), size))
    assert [document for group in found for document in group.documents] == documents
    assert [group.number for group in found] == list(range(len(found)))
    for group in found:
        assert documents[group.first] is group.documents[0]
        assert sum(len(one.text) for one in group.documents[:-1]) < size
    for group in found[:-1]:
        assert sum(len(one.text) for one in group.documents) >= size


def test_groups_are_made_as_documents_come() -> None:
    def endless() -> object:
        while True:
            yield Document("a", "d", "text")

    stream = groups(endless(), 6)
    assert [len(next(stream).documents) for _ in range(3)] == [2, 2, 2]


def test_the_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes() == (3, 4)
