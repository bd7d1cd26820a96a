"""`geohooks plugins`: what is installed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import metadata
from typing import TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from geohooks.errors import PluginError
from geohooks.registry import Installed, disabled, installed
from geohooks.roster import Roster

__all__ = ["plugins"]

Row: TypeAlias = tuple[Text, ...]


def plugins() -> None:
    """List the plugins and adapters that are installed, where they come from, and which hooks they implement.

    One that can't be loaded is listed with its error. GEOHOOKS_DISABLE_PLUGINS=name,name keeps plugins out.
    """
    console = Console()
    for title in ("plugins", "adapters"):
        rows = [_row(title, entry) for entry in installed(f"geohooks.{title}")]
        rows += _kept_out() if title == "plugins" else []
        console.print(_listing(title, rows) if rows else f"no {title} are installed")


def _row(title: str, entry: Installed) -> Row:
    return _plugin_row(entry) if title == "plugins" else _adapter_row(entry)


def _listing(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for column in ("from", "hooks", "description") if title == "plugins" else ("from", "description"):
        table.add_column(column, overflow="fold")
    for row in sorted(rows, key=lambda row: row[0].plain):
        table.add_row(*row)
    return table


def _kept_out() -> list[Row]:
    """The plugins that the environment names; they are not imported, so their hooks are not known."""
    found = {point.name: point for point in metadata.entry_points(group="geohooks.plugins")}
    rows: list[Row] = []
    for name in sorted(disabled()):
        point = found.get(name)
        origin = f"{point.dist.name} {point.dist.version} ({point.value})" if point and point.dist else "not installed"
        said = Text("kept out by GEOHOOKS_DISABLE_PLUGINS", style="yellow")
        rows.append((Text(f"{name} (disabled)"), Text(origin), Text(""), said))
    return rows


def _plugin_row(entry: Installed) -> Row:
    if entry.error is not None:
        return (Text(entry.name), Text(entry.origin), Text(""), _broken(entry.error))
    try:
        # the class as it stands: listing a plugin must not make one
        hooks = dict(Roster({entry.name: entry.target}).all_hooks())[entry.name]
    except PluginError as error:
        return (Text(entry.name), Text(entry.origin), Text(""), _broken(error))
    return (Text(entry.name), Text(entry.origin), Text(", ".join(hooks) or "none"), Text(_description(entry.target)))


def _adapter_row(entry: Installed) -> Row:
    said = _broken(entry.error) if entry.error is not None else Text(_description(entry.target))
    return (Text(entry.name), Text(entry.origin), said)


def _broken(error: BaseException) -> Text:
    said = str(error) if isinstance(error, PluginError) else repr(error)
    return Text(f"can't be loaded: {' '.join(said.split())}", style="red")


def _description(target: object) -> str:
    said = getattr(target, "description", "")
    return said if isinstance(said, str) and said else (inspect.getdoc(target) or "").partition("\n")[0]
