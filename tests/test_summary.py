from __future__ import annotations

import math
from pathlib import Path

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import MAIN, Written, drawn, write_run

from geohooks.errors import ArtifactError
from geohooks.run import Run
from geohooks.summary import (
    WHOLE,
    confident_and_wrong,
    domain_codes,
    format_number,
    overview,
    remarks,
    rows_of,
    signal_columns,
    signal_values,
    summarise,
    tail_threshold,
)

NAN = math.nan


def names(run: Run) -> list[str]:
    return [column.name for column in signal_columns(run)]


def of(path: Path, **signals: list[float | None]) -> Run:
    """A run of one document whose signals are these."""
    count = len(next(iter(signals.values())))
    return write_run(path, [Written("one", "prose", tuple("abcdefghijklmnopqrstuvwxyz"[:count]), signals)])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 9)), min_size=1, max_size=6),
    parts=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_means_and_spreads_are_those_of_a_loop(tmp_path_factory, lengths, parts, seed) -> None:
    documents = [drawn(f"d{at}", name, "t" * size, seed + at) for at, (name, size) in enumerate(lengths)]
    run = write_run(tmp_path_factory.mktemp("run"), documents, parts=parts)
    summary = summarise(run, MAIN)
    assert [one.domain for one in summary.domains] == sorted({name for name, _ in lengths})
    for one in (*summary.domains, summary.whole):
        mine = [each for each in documents if one is summary.whole or each.domain == one.domain]
        assert (one.documents, one.tokens) == (len(mine), sum(len(each.tokens) for each in mine))
        for signal in MAIN:
            values = [value for each in mine for value in each.signals[signal] if value is not None]
            got = one.moments[signal]
            assert got.count == len(values)
            if values:
                mean = math.fsum(values) / len(values)
                spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
                assert got.mean == pytest.approx(mean, abs=1e-9)
                assert got.spread == pytest.approx(spread, abs=1e-7)
            else:
                assert math.isnan(got.mean)


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_the_share_in_the_tail_is_that_of_a_loop(tmp_path_factory, sizes, seed) -> None:
    documents = [drawn(f"d{at}", "xy"[at % 2], "t" * size, seed + at) for at, size in enumerate(sizes)]
    summary = summarise(write_run(tmp_path_factory.mktemp("run"), documents), MAIN)
    rows = [
        (each.domain, kl, increase)
        for each in documents
        for kl, increase in zip(each.signals["forward_kl"], each.signals["nll_increase"], strict=True)
        if increase is not None
    ]
    ordered = sorted(kl for _, kl, _ in rows)
    tail = ordered[math.ceil(0.9 * (len(ordered) - 1) - 1e-9) :] if ordered else []
    for one in (*summary.domains, summary.whole):
        mine = [row for row in rows if one is summary.whole or row[0] == one.domain]
        inside = [increase for _, kl, increase in mine if tail and kl >= tail[0]]
        total = math.fsum(increase for _, _, increase in mine)
        assert one.tail_positions == len(inside)
        if total > 1e-6:
            assert one.tail_share == pytest.approx(math.fsum(inside) / total, rel=1e-6)
        elif total < -1e-6 or not mine:
            assert one.tail_share is None


def test_the_tail_by_hand(tmp_path: Path) -> None:
    kl = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 5.0, 9.9]
    run = of(tmp_path, forward_kl=kl, nll_increase=[0.25] * 9 + [6.75, None])
    summary = summarise(run, names(run))
    # the last token has no NLL, so its KL of 9.9 is in no tail; the highest tenth of ten is one: (0.9, 5.0]
    assert summary.tail_threshold == 5.0
    assert summary.whole.tail_positions == 1
    assert summary.whole.tail_share == pytest.approx(0.75)


def test_the_share_exceeds_one_where_the_others_improved(tmp_path: Path) -> None:
    run = of(tmp_path, forward_kl=[0.0, 1.0], nll_increase=[-1.0, 2.0])
    assert summarise(run, names(run)).whole.tail_share == pytest.approx(2.0)


@pytest.mark.parametrize("increase", [[-1.0, 0.5], [0.0, 0.0], [None, None], [math.inf, 1.0]])
def test_there_is_no_share_of_what_is_not_a_positive_sum(tmp_path: Path, increase: list[float | None]) -> None:
    run = of(tmp_path, forward_kl=[0.0, 1.0], nll_increase=increase)
    assert summarise(run, names(run)).whole.tail_share is None


def test_of_equal_models_nothing_is_shared(tmp_path: Path) -> None:
    run = of(tmp_path, forward_kl=[0.0] * 5, nll_increase=[0.0] * 5)
    summary = summarise(run, names(run))
    assert (summary.tail_threshold, summary.whole.tail_share, summary.whole.health) == (0.0, None, "healthy")


def test_tail_threshold_of_nothing_is_none() -> None:
    assert tail_threshold(np.array([NAN, NAN])) is None


def test_perplexities_and_health(tmp_path: Path) -> None:
    run = of(tmp_path, nll=[0.0, 2.0, None], base_nll=[1.0, 1.0, None], forward_kl=[3.0, 1.5, 1.8])
    whole = summarise(run, names(run)).whole
    assert whole.perplexity == pytest.approx(math.e)
    assert whole.base_perplexity == pytest.approx(math.e)
    assert whole.health == "critical"


def test_a_masked_target_makes_the_perplexity_infinite_and_says_so(tmp_path: Path) -> None:
    run = of(tmp_path, nll=[math.inf, 1.0, None])
    whole = summarise(run, names(run)).whole
    assert whole.perplexity == math.inf
    assert math.isnan(whole.moments["nll"].spread)
    assert "∞" in overview(summarise(run, names(run)))["rows"][0]


def test_nan_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    run = of(tmp_path, entropy=[1.0, NAN, 3.0])
    summary = summarise(run, names(run))
    assert summary.whole.moments["entropy"].mean == 2.0
    assert summary.whole.not_a_number == 1
    assert any("NaN" in remark and remark.endswith(" 1.") for remark in remarks(run, summary))


def test_without_a_base_there_is_no_comparison(tmp_path: Path) -> None:
    run = write_run(tmp_path, [drawn("a", "prose", "abc", 0, ["entropy", "nll"])], base=False)
    summary = summarise(run, names(run))
    assert summary.tail_threshold is None
    assert summary.whole.health is None
    assert overview(summary)["head"] == ["domain", "documents", "tokens", "perplexity", "entropy"]
    assert remarks(run, summary) == ()


def test_a_domain_called_as_the_whole_stays_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path, [drawn("a", WHOLE, "abc", 0), drawn("b", "z", "abcd", 1)])
    summary = summarise(run, names(run))
    assert [(one.domain, one.tokens) for one in summary.domains] == [(WHOLE, 3), ("z", 4)]
    assert summary.whole.tokens == 7


def test_domains_keep_their_rows_over_parts_with_other_dictionaries(tmp_path: Path) -> None:
    documents = [drawn(str(at), domain, "ab", at) for at, domain in enumerate("zazb")]
    domains, codes = domain_codes(write_run(tmp_path, documents, parts=4))
    assert domains == ("a", "b", "z")
    assert [domains[code] for code in codes] == list("zzaazzbb")


def test_a_run_without_tokens_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, [drawn("a", "prose", "", 0)])
    with pytest.raises(ArtifactError, match="no tokens"):
        summarise(run, names(run))


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path, [drawn("a", "prose", "abc", 0)], finished=False)
    assert "not finished" in remarks(run, summarise(run, names(run)))[0]


def test_shared_ids_and_empty_documents_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, [drawn("a", "prose", "abc", 0)])
    assert run.manifest.totals is not None
    manifest = attrs.evolve(
        run.manifest, shared_ids=32_000, totals=attrs.evolve(run.manifest.totals, empty_documents=2)
    )
    said = " ".join(remarks(attrs.evolve(run, manifest=manifest), summarise(run, names(run))))
    assert "32,000" in said
    assert "left out: 2." in said


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 1000), count=st.integers(0, 9))
def test_the_worst_are_those_of_a_loop(tmp_path_factory, sizes, seed, count) -> None:
    documents = [drawn(f"d{at}", "x", [f"{at}.{i} " for i in range(n)], seed + at) for at, n in enumerate(sizes)]
    run = write_run(tmp_path_factory.mktemp("run"), documents, parts=2)
    wrong = [
        (each.signals["nll_increase"][i], at, i)
        for at, each in enumerate(documents)
        for i in range(len(each.tokens) - 1)
        if each.signals["top1_probability"][i] > 0.5 and each.signals["nll"][i] > math.log(2)
    ]
    worst = sorted(wrong, key=lambda one: -one[0])[:count]
    got = confident_and_wrong(run, MAIN, count)
    assert [(one.document, one.position) for one in got] == [(at, i) for _, at, i in worst]
    for one in got:
        tokens = documents[one.document].tokens
        assert one.token == tokens[one.position + 1]
        assert "".join(tokens[: one.position + 1]).endswith(one.before)
        assert one.before.endswith(tokens[one.position])
        assert one.signals["nll"] == documents[one.document].signals["nll"][one.position]


def test_without_a_base_the_worst_have_the_highest_nll(tmp_path: Path) -> None:
    run = of(tmp_path, top1_probability=[0.9, 0.9, 0.4, 0.9, 0.9], nll=[0.1, 2.0, 9.0, 5.0, None])
    got = confident_and_wrong(run, names(run), 10)
    assert [(one.token, one.signals["nll"]) for one in got] == [("e", 5.0), ("c", 2.0)]


def test_without_text_the_worst_are_token_ids(tmp_path: Path) -> None:
    signals = {"top1_probability": [0.9, 0.9], "nll": [3.0, None]}
    run = write_run(tmp_path, [Written("a", "x", ("p", "q"), signals)], text_kept=False)
    (worst,) = confident_and_wrong(run, names(run), 10)
    assert (worst.before, worst.token) == ("[100]", "[101]")


def test_without_the_columns_nothing_is_called_wrong(tmp_path: Path) -> None:
    run = of(tmp_path, entropy=[1.0])
    assert confident_and_wrong(run, names(run), 10) == ()


def test_rows_of_gives_each_document_by_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path, [drawn(str(at), "x", "ab" * (at + 1), at) for at in range(4)], parts=2)
    rows = rows_of(run, [3, 1], ["entropy"])
    assert {key: table.num_rows for key, table in rows.items()} == {1: 4, 3: 8}
    assert rows[3]["position"].to_pylist() == list(range(8))


def test_a_missing_column_names_the_file(tmp_path: Path) -> None:
    run = of(tmp_path, entropy=[1.0, 2.0])
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet' has no column 'entropi'; nearest are entropy"):
        signal_values(run, "entropi")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "\N{EN DASH}"),
        (NAN, "\N{EN DASH}"),
        (math.inf, "\N{INFINITY}"),
        (-math.inf, "\N{MINUS SIGN}\N{INFINITY}"),
        (-1.23456, "\N{MINUS SIGN}1.235"),
        (12345.6, "12,346"),
        (0, "0"),
    ],
)
def test_numbers_have_four_digits(value: float | None, written: str) -> None:
    assert format_number(value) == written
