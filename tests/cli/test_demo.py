from __future__ import annotations

from pathlib import Path

import pytest

from geohooks.cli import main
from geohooks.run import Run
from geohooks.zoo import text


def test_measures_the_embedded_pair_on_held_out_text_and_says_where_the_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", "--smoke", "--out", str(tmp_path)])
    assert not left.value.code
    page = tmp_path / "smoke" / "report.html"
    assert f"report: {page}" in capsys.readouterr().out
    assert page.stat().st_size > 20_000
    run = Run.open(tmp_path / "smoke" / "run")
    assert run.manifest.finished
    held_out = {one.text[:1_200] for domain in text.domains() for one in text.documents(domain) if one.held_out}
    assert run.documents().num_rows == 2 * len(text.domains())
    assert set(run.documents(["text"])["text"].to_pylist()) <= held_out
