from __future__ import annotations

from importlib import metadata

import pytest
import typer

import geohooks
from geohooks import registry
from geohooks.cli import main
from geohooks.registry import Installed


class Greeter(geohooks.Plugin):
    name = "greeter"

    @geohooks.hookimpl
    def commands(self, app: typer.Typer) -> None:
        @app.command("greet")
        def greet(who: str, *, loud: bool = False) -> None:
            """Greet somebody."""
            if who == "nobody":
                raise geohooks.DataError("there is\n nobody")
            typer.echo(f"hello {who}".upper() if loud else f"hello {who}")


@pytest.fixture
def greeter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "installed", lambda group: (Installed("greeter", "d", "d 1", Greeter),))


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_a_plugin_adds_commands(greeter: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("greet", "you", "--loud") == 0
    assert capsys.readouterr().out == "HELLO YOU\n"


def test_a_plugin_that_is_kept_out_adds_none(
    greeter: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEOHOOKS_DISABLE_PLUGINS", "greeter")
    assert status("greet", "you") == 2
    assert "No such command 'greet'" in capsys.readouterr().err


def test_errors_are_one_line_and_a_status(greeter: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("greet", "nobody") == 1
    assert capsys.readouterr().err == "error: there is nobody\n"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_traceback_may_stand_anywhere(greeter: None, place: int) -> None:
    arguments = ["greet", "nobody"]
    arguments.insert(place, "--traceback")
    with pytest.raises(geohooks.DataError):
        main(arguments)


def test_help_lists_the_commands_and_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("measure", "show", "plugins", "demo"))
    assert status("--version") == 0
    assert capsys.readouterr().out == metadata.version("geohooks") + "\n"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("measur") == 2
    assert "Did you mean 'measure'?" in capsys.readouterr().err
