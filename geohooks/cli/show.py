"""`geohooks show`: a run as a table on the terminal and as a page for the browser."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from geohooks.artifacts import replacing
from geohooks.errors import ArtifactError
from geohooks.page import facts, render
from geohooks.run import Run
from geohooks.summary import (
    Summary,
    WrongToken,
    confident_and_wrong,
    format_number,
    overview,
    remarks,
    signal_columns,
    summarise,
)

__all__ = ["report", "show"]

MOST_WORST = 24
_STYLES = {"healthy": "green", "warning": "yellow", "critical": "bold red"}


def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, from `geohooks measure`.")],
    *,
    html: Annotated[
        Path | None, typer.Option(help="Where the page is written; report.html in DIR where left out.")
    ] = None,
    signal: Annotated[str | None, typer.Option(help="The signal that colours the text at first.")] = None,
    document: Annotated[
        list[int] | None, typer.Option(help="The number of a document to show, and no others; may be repeated.")
    ] = None,
) -> None:
    """Sum a run up by domain, and write one HTML page with its text token by token.

    The page needs no network and no other file. Of a run too large for a page it shows a sample, and says so.
    """
    report(Console(), Run.open(directory), html=html, signal=signal, documents=document or ())


def report(
    console: Console,
    run: Run,
    *,
    html: Path | None = None,
    signal: str | None = None,
    documents: Sequence[int] = (),
    worst_shown: int = 6,
) -> Path:
    """Print the figures of `run` and its most confident and wrong tokens, and write its page; returns the page's path.

    Raises `ArtifactError` for a signal or a document that the run does not have, and for a broken part.
    """
    path = run.path / "report.html" if html is None else html
    _check(run, signal, path)
    names = [column.name for column in signal_columns(run)]
    summary = summarise(run, names)
    worst = confident_and_wrong(run, names, MOST_WORST)
    page = render(run, summary, worst, signal=signal, documents=documents)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    for name, value in facts(run).items():
        console.print(Text(f"{name:9}", style="dim"), Text(visible(value)), soft_wrap=True)
    console.print(_table(summary, [name for name in names if name == signal or not _layered(name)]))
    for remark in remarks(run, summary):
        console.print(Text(remark, style="dim"))
    if worst:
        console.print(_worst(worst[:worst_shown]), soft_wrap=True)
    console.print(Text("report: ", style="bold"), Text(str(path)), sep="", soft_wrap=True)
    return path


def visible(text: str) -> str:
    """`text` on one line, without characters that would steer a terminal."""
    shown = text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    return "".join(one if one.isprintable() else "\N{MIDDLE DOT}" for one in shown)


def _check(run: Run, signal: str | None, path: Path) -> None:
    names = [column.name for column in signal_columns(run)]
    if signal is not None and signal not in names:
        nearest = ", ".join(difflib.get_close_matches(signal, names, n=3, cutoff=0.3)) or ", ".join(names)
        raise ArtifactError(f"the run at '{run.path}' has no signal '{signal}'; nearest are {nearest}")
    if not path.parent.is_dir():
        raise ArtifactError(f"'{path}' can't be written: there is no folder '{path.parent}'; make it first")


def _layered(name: str) -> bool:
    return name.startswith("router.")


def _table(summary: Summary, signals: Sequence[str]) -> Table:
    """Figures down, domains across; then the mean and the spread of each signal."""
    figures = overview(summary)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for row in figures["rows"]:
        table.add_column(Text(visible(row[0])), justify="right")
    cells = list(zip(*figures["rows"], strict=True))
    for title, values in list(zip(figures["head"], cells, strict=True))[1:]:
        table.add_row(title, *(Text(value, style=_STYLES.get(value, "")) for value in values))
    table.add_section()
    domains = summary.domains if len(summary.domains) == 1 else (*summary.domains, summary.whole)
    for signal in signals:
        table.add_row(signal.replace("_", " "), *(str(one.moments[signal]) for one in domains))
    return table


def _worst(worst: Sequence[WrongToken]) -> Text:
    """What the model had read, the token that came (marked), and how sure it was of another one."""
    said = Text("most confident and wrong", style="bold")
    for one in worst:
        figures = ", ".join(f"{name.replace('_', ' ')} {format_number(value)}" for name, value in one.signals.items())
        said.append("\n  ").append(visible(one.before)[-48:], style="not bold")
        said.append(f"\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}{visible(one.token)}", style="reverse")
        said.append("\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", style="reverse")
        said.append(f"\n      {figures}; token {one.position + 1} of {visible(one.name)}", style="not bold dim")
    return said
