from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from runs import MAIN, Written, drawn, write_run

from geohooks import page
from geohooks.cli import main
from geohooks.errors import ArtifactError
from geohooks.page import EXCERPTS, Excerpt, choose_excerpts, colour_cuts

HOSTILE = ("</script><script>alert(1)</script>", "<b>bold</b>", "&amp;", '"', "'", "\x1b[31m", "[bold]", "\u2028", "🙂")


def embedded(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def values(data: dict[str, Any], signal: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data["columns"][signal]), "<f4")


def geohooks(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_prints_the_figures_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [drawn("a", "prose", "abcd" * 8, 0), drawn("b", "code", "efg" * 5, 1)], parts=2)
    assert geohooks("show", run.path) == 0
    said = capsys.readouterr().out
    for word in ("code", "prose", "all", "perplexity", "base perplexity", "health", "increase in the tail", "a-tuned"):
        assert word in said
    assert f"report: {run.path / 'report.html'}" in said
    data = embedded((run.path / "report.html").read_text(encoding="utf-8"))
    assert [signal["name"] for signal in data["signals"]] == MAIN
    assert data["overview"]["rows"][-1][:3] == ["all", "2", "47"]


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.lists(st.lists(st.text(max_size=4), min_size=1, max_size=8), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_page_holds_the_very_rows(tmp_path_factory, tokens: list[list[str]], seed: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    documents = [drawn(f"d{at}", "xy"[at % 2], each, seed + at) for at, each in enumerate(tokens)]
    write_run(folder / "run", documents, parts=2)
    assert geohooks("show", folder / "run") == 0
    data = embedded((folder / "run" / "report.html").read_text(encoding="utf-8"))
    assert [one["tokens"] for one in data["excerpts"]] == tokens
    for signal in MAIN:
        expected = [value for each in documents for value in each.signals[signal]]
        np.testing.assert_array_equal(values(data, signal), np.array(expected, "f4"))


def test_the_page_is_inert_and_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [drawn("<img src=x onerror=alert(1)>", "</title>", HOSTILE * 3, 0)])
    assert geohooks("show", run.path) == 0
    assert "\x1b" not in capsys.readouterr().out
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script>") == 2
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|@import|url\(|<b>bold|<img", html)
    assert tuple(embedded(html)["excerpts"][0]["tokens"]) == HOSTILE * 3


def test_signal_document_and_path_are_the_users(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [drawn(name, "x", "abc", at) for at, name in enumerate("pqrs")])
    assert geohooks("show", run.path, "--html", tmp_path / "p.html", "--signal", "varentropy", "--document", 2) == 0
    data = embedded((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert data["chosen"] == "varentropy"
    assert [one["name"] for one in data["excerpts"]] == ["r"]
    assert not (run.path / "report.html").exists()


def test_without_text_the_page_has_token_ids(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [drawn("a", "x", "secret", 0)], text_kept=False)
    assert geohooks("show", run.path) == 0
    data = embedded((run.path / "report.html").read_text(encoding="utf-8"))
    assert data["text"] is False
    assert data["excerpts"][0]["tokens"] == [100, 101, 102, 103, 104, 105]


def test_undefined_and_infinite_values_are_kept_apart_from_numbers(tmp_path: Path) -> None:
    signals = {"entropy": [1.0, float("nan"), 2.0], "nll": [float("inf"), 1.0, None], "top1_probability": [0.9] * 3}
    run = write_run(tmp_path / "run", [Written("a", "x", ("p", "q", "r"), signals)], base=False)
    assert geohooks("show", run.path) == 0
    data = embedded((run.path / "report.html").read_text(encoding="utf-8"))
    np.testing.assert_array_equal(values(data, "nll"), np.array([np.inf, 1, np.nan], "f4"))
    assert data["worst"][0]["signals"]["nll"] == "∞"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--signal", "entropi"], "has no signal 'entropi'; nearest are entropy"),
        (["--document", "9"], "document 9 is not in the run, which has 1 documents, numbered 0 to 0"),
        (["--html", "/no/such/folder/page.html"], "there is no folder '/no/such/folder'"),
    ],
)
def test_a_wrong_choice_is_one_line(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    run = write_run(tmp_path / "run", [drawn("a", "x", "abc", 0)])
    assert geohooks("show", run.path, *arguments) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert geohooks("show", tmp_path) == 1
    assert f"'{tmp_path}' holds no run: it has no run.json" in capsys.readouterr().err


def test_a_run_without_parts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [drawn("a", "x", "abc", 0)], finished=False)
    shutil.rmtree(run.path / "positions")
    assert geohooks("show", run.path) == 1
    assert "has no part yet" in capsys.readouterr().err


def test_an_unfinished_run_is_shown_and_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [drawn("a", "x", "abc", 0), drawn("b", "x", "abc", 1)], parts=2, finished=False)
    (run.path / "positions" / "part-00001.parquet").unlink()
    assert geohooks("show", run.path) == 0
    assert "not finished" in capsys.readouterr().out
    assert "not finished" in (run.path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_broken_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: float) -> None:
    run = write_run(tmp_path / "run", [drawn("a", "x", "abc" * 50, 0)])
    part = run.path / "positions" / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    assert geohooks("show", run.path) == 1
    said = capsys.readouterr().err
    assert f"'{part}' is broken" in said
    assert said.count("\n") == 1


def test_bytes_changed_within_a_part_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [drawn("a", "x", "abc" * 500, 0)])
    part = run.path / "positions" / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    part.write_bytes(bytes(content))
    assert geohooks("show", run.path) == 1
    assert f"'{part}' is broken" in capsys.readouterr().err


def test_a_large_run_shows_a_sample_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_TOKENS", 50)
    run = write_run(tmp_path / "run", [drawn(str(at), "x", "t" * 40, at) for at in range(4)], parts=2)
    assert geohooks("show", run.path) == 0
    data = embedded((run.path / "report.html").read_text(encoding="utf-8"))
    assert sum(len(one["tokens"]) for one in data["excerpts"]) == 48
    assert data["notes"][0].startswith("The text and the plane show a sample: 48 of 160 tokens, from 4 of 4 documents")
    assert all(sum(map(sum, signal["counts"])) in (156, 160) for signal in data["signals"])
    for one in data["worst"]:
        if one["excerpt"] is not None:
            excerpt = data["excerpts"][one["excerpt"]]
            assert excerpt["document"] == one["document"]
            assert excerpt["start"] <= one["position"] + 1 < excerpt["stop"]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=EXCERPTS + 3),
    most=st.integers(1, 4000),
    data=st.data(),
)
def test_excerpts_are_bounded_whole_where_they_fit_and_hold_the_worst(sizes: list[int], most: int, data) -> None:
    rows = [
        {"document": 7 * at, "name": str(at), "domain": "xy"[at % 2], "tokens": size} for at, size in enumerate(sizes)
    ]
    filled = [row for row in rows if row["tokens"]]
    worst = {}
    if filled:
        row = data.draw(st.sampled_from(filled))
        worst = {row["document"]: data.draw(st.integers(0, row["tokens"] - 1))}
    got = choose_excerpts(pa.Table.from_pylist(rows), worst, most)
    assert sum(one.stop - one.start for one in got) <= most
    assert all(0 <= one.start < one.stop <= one.total for one in got)
    assert [one.document for one in got] == sorted(one.document for one in got)
    if sum(sizes) <= most:
        assert got == tuple(Excerpt(r["document"], r["name"], r["domain"], r["tokens"], 0, r["tokens"]) for r in filled)
    for document, position in worst.items():
        (one,) = (one for one in got if one.document == document)
        assert one.start <= position < one.stop
    if sum(sizes) > most >= EXCERPTS:
        assert max(one.stop - one.start for one in got) <= most // min(EXCERPTS, len(rows))


@settings(max_examples=60, deadline=None)
@given(values=numpy_strategies.arrays(np.float64, st.integers(0, 60), elements=st.floats(-1e6, 1e6, width=32)))
def test_colours_change_at_quantiles_and_tell_values_apart(values: np.ndarray) -> None:
    signed, cuts = colour_cuts(np.append(values, [np.nan, np.inf]))
    assert cuts == sorted(set(cuts))
    size = np.abs(values) if signed else values
    if values.size:
        assert all(np.quantile(size, 0) <= cut < size.max() for cut in cuts)
    if not signed and values.size and values.max() > np.median(values):
        assert any((values > cut).any() for cut in cuts)


def test_a_signal_of_two_values_has_two_colours() -> None:
    assert colour_cuts(np.array([0.0, 1.0] * 50)) == (False, [0.0])
    assert colour_cuts(np.full(9, 3.0)) == (False, [])


def test_a_signal_of_both_signs_is_cut_by_magnitude() -> None:
    signed, cuts = colour_cuts(np.arange(-100.0, 101.0))
    assert signed
    assert cuts == pytest.approx([50, 75, 90, 97])


def test_unknown_documents_are_refused() -> None:
    table = pa.table({"document": [3, 5], "name": ["a", "b"], "domain": ["x", "x"], "tokens": [1, 1]})
    with pytest.raises(ArtifactError, match="document 4 is not in the run, which has 2 documents, numbered 3 to 5"):
        choose_excerpts(table, {}, 10, [4])
