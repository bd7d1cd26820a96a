from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from geohooks.errors import DataError
from geohooks.zoo.text import HELD_OUT_ONE_IN, Document, documents, domains, training_texts


@pytest.mark.parametrize("domain", domains())
def test_documents(domain: str) -> None:
    found = documents(domain)
    names = [document.name for document in found]
    assert names == sorted(set(names))
    assert all(document.text and document.domain == domain for document in found)
    assert {document.held_out for document in found} == {True, False}


def test_domains_are_what_they_say() -> None:
    prose = {document.name: document.text for document in documents("prose")}
    code = {document.name: document.text for document in documents("code")}
    assert "assignment" in prose["assignment"].lower()
    assert "def dumps(" in code["json/__init__.py"]
    assert not [name for name in code if "/test/" in name or "/tests/" in name or "_sysconfigdata" in name]


def test_held_out_follows_the_hash() -> None:
    for name in ("assignment", "json/decoder.py", "ünïcode"):
        digest = hashlib.sha256(f"code/{name}".encode()).hexdigest()
        assert Document("code", name, "x").held_out == (int(digest, 16) % HELD_OUT_ONE_IN == 0)


def test_held_out_share() -> None:
    count = 5000
    share = sum(Document("code", str(i), "").held_out for i in range(count)) / count
    deviation = (1 / HELD_OUT_ONE_IN * (1 - 1 / HELD_OUT_ONE_IN) / count) ** 0.5
    assert abs(share - 1 / HELD_OUT_ONE_IN) < 4 * deviation


@pytest.mark.parametrize("domain", domains())
def test_no_held_out_paragraph_is_trained_on(domain: str) -> None:
    found = documents(domain)
    texts = training_texts(domain)
    held_out = {part.strip() for document in found if document.held_out for part in document.text.split("\n\n")}
    trained = {part.strip() for text in texts for part in text.split("\n\n")}
    assert not (trained & held_out) - {""}
    assert len(texts) == sum(not document.held_out for document in found)
    assert sum(map(len, texts)) > 0.85 * sum(len(document.text) for document in found if not document.held_out)


def test_unknown_domain() -> None:
    with pytest.raises(DataError, match="'codes'; nearest are code"):
        documents("codes")


@pytest.mark.parametrize("domain", domains())
def test_python_without_its_texts(domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match=f"no text of domain '{domain}'.*install Python with its sources"):
        documents(domain)
