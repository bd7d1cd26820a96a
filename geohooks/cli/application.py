"""The command-line application: its commands, those that plugins add, and how errors are shown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from geohooks.cli.demo import demo
from geohooks.cli.listing import plugins
from geohooks.cli.measure import measure
from geohooks.cli.show import show
from geohooks.errors import GeohooksError

__all__ = ["application", "main"]

_TRACEBACK = "--traceback"
_EPILOG = "Plugins may add commands of their own: `geohooks plugins` lists what is installed."


class _Commands(TyperGroup):
    """The built-in commands; plugins, which take seconds to load, are asked only for a name that is none of them."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _plugin_commands().get(cmd_name)


def application() -> typer.Typer:
    """The application with its built-in commands."""
    app = typer.Typer(
        name="geohooks",
        cls=_Commands,
        help="Look inside transformers: measure models over data and look at what came out.",
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_options)
    app.command("measure")(measure)
    app.command("show")(show)
    app.command("plugins")(plugins)
    app.command("demo")(demo)
    return app


def _print_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("geohooks"))
        raise typer.Exit


def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and leave.",
            is_eager=True,
            callback=lambda value: _print_version(wanted=value),
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option(_TRACEBACK, help="Show where an error comes from; may stand anywhere.")
    ] = False,
) -> None:
    """Take the options before the command; `main` itself looks for the second one."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of the user's or of the system's is one line and exit status 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    traced = _TRACEBACK in given
    try:
        application()(args=[argument for argument in given if argument != _TRACEBACK], prog_name="geohooks")
    except Exception as error:
        if traced:
            raise
        # What is not geohooks' own or the system's needs its kind, and says where it comes from only when asked.
        ours = isinstance(error, (GeohooksError, OSError))
        text = str(error) if ours else f"{type(error).__name__}: {error}; --traceback shows where it comes from"
        typer.echo(f"error: {' '.join(text.split())}", err=True)
        raise SystemExit(1) from error


def _plugin_commands() -> Mapping[str, Any]:
    from geohooks.registry import disabled, installed, load_plugin
    from geohooks.roster import Roster

    names = [one.name for one in installed("geohooks.plugins") if one.error is None and one.name not in disabled()]
    app = typer.Typer()
    for listener in Roster({name: load_plugin(name) for name in names}).listeners("commands"):
        listener.function(app)
    if not app.registered_commands and not app.registered_groups:
        return {}
    app.callback()(lambda: None)
    return typer.main.get_group(app).commands
