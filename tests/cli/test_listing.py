from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from geohooks import registry
from geohooks.cli import main

MODULE = '''
import geohooks

class Counter(geohooks.Plugin):
    """Counts calls."""
    name = "counter"
    def __init__(self, needed):
        raise AssertionError("listing must not make a plugin")
    @geohooks.hookimpl
    def on_call_end(self, call): ...
    @geohooks.hookimpl
    def on_hidden(self, event): ...

class Misspelt:
    @geohooks.hookimpl
    def on_hiden(self, event): ...
'''


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution on the path with a plugin, one that is wrong, one that breaks on import, and a broken adapter."""
    (tmp_path / "listed_counter.py").write_text(MODULE)
    (tmp_path / "listed_broken.py").write_text("raise ZeroDivisionError('on import')")
    information = tmp_path / "foreign_plugins-3.2.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-plugins\nVersion: 3.2.1\n")
    (information / "entry_points.txt").write_text(
        "[geohooks.plugins]\ncounter = listed_counter:Counter\nmisspelt = listed_counter:Misspelt\n"
        "broken = listed_broken\n[geohooks.adapters]\nlost = listed_nowhere\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.installed.cache_clear()
    yield tmp_path
    registry.installed.cache_clear()


def listing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as left:
        main(["plugins"])
    assert not left.value.code
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> str:
    (found,) = (line for line in lines if line.split()[:1] == [name])
    return found


def test_lists_what_ships(capsys, monkeypatch) -> None:
    lines = listing(capsys, monkeypatch)
    signals = row(lines, "signals")
    assert "geohooks 0.1.0 (geohooks_signals:Signals)" in signals
    assert "on_attach, on_logits, on_router, report, sites" in signals
    for adapter in ("llama", "qwen", "deepseek", "t5", "vit", "structural"):
        assert f"(geohooks_{adapter})" in row(lines, adapter)


def test_lists_foreign_plugins_without_making_them(foreign, capsys, monkeypatch) -> None:
    counter = row(listing(capsys, monkeypatch), "counter")
    assert "foreign-plugins 3.2.1 (listed_counter:Counter)" in counter
    assert "on_call_end, on_hidden" in counter
    assert "Counts calls." in counter


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "can't be loaded: ZeroDivisionError('on import')"),
        ("misspelt", "there is no hook 'on_hiden'; did you mean 'on_hidden'?"),
        ("lost", "can't be loaded: ModuleNotFoundError(\"No module named 'listed_nowhere'\")"),
    ],
)
def test_what_is_broken_is_listed_with_its_error_and_stops_nothing(foreign, capsys, monkeypatch, name, said) -> None:
    lines = listing(capsys, monkeypatch)
    assert said in row(lines, name)
    assert "can't be loaded" not in row(lines, "signals")
    assert "can't be loaded" not in row(lines, "llama")


def test_what_is_kept_out_is_marked_and_not_imported(foreign, capsys, monkeypatch) -> None:
    monkeypatch.setenv("GEOHOOKS_DISABLE_PLUGINS", "broken,absent")
    lines = listing(capsys, monkeypatch)
    broken = row(lines, "broken")
    assert "broken (disabled)" in broken
    assert "foreign-plugins 3.2.1 (listed_broken)" in broken
    assert "ZeroDivisionError" not in "".join(lines)
    assert "not installed" in row(lines, "absent")
    assert "(disabled)" not in row(lines, "signals")


def test_says_so_where_nothing_is_installed(capsys, monkeypatch) -> None:
    monkeypatch.setattr("geohooks.cli.listing.installed", lambda group: ())
    assert listing(capsys, monkeypatch) == ["no plugins are installed", "no adapters are installed"]
