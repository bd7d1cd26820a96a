"""`geohooks plugins`: what is installed."""

from __future__ import annotations

import inspect

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from geohooks.errors import PluginError
from geohooks.registry import Installed, disabled, installed
from geohooks.roster import Roster

__all__ = ["plugins"]


def plugins() -> None:
    """List the plugins and adapters that are installed, where they come from, and which hooks they implement.

    One that can't be loaded is listed with its error. GEOHOOKS_DISABLE_PLUGINS=name,name keeps plugins out.
    """
    console = Console()
    for title in ("plugins", "adapters"):
        found = installed(f"geohooks.{title}")
        if found:
            console.print(_listing(title, found))
        else:
            console.print(f"no {title} are installed")


def _listing(title: str, found: tuple[Installed, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("from", overflow="fold")
    if title == "plugins":
        table.add_column("hooks", overflow="fold")
    table.add_column("description", overflow="fold")
    for entry in found:
        table.add_row(*(_plugin_row(entry) if title == "plugins" else _adapter_row(entry)))
    return table


def _plugin_row(entry: Installed) -> tuple[Text, ...]:
    if entry.error is not None:
        return (Text(entry.name), Text(entry.origin), Text(""), _broken(entry.error))
    name = Text(entry.name)
    if entry.name in disabled():
        name.append(" (disabled)", style="yellow")
    try:
        # the class as it stands: listing a plugin must not make one
        hooks = dict(Roster({entry.name: entry.target}).all_hooks())[entry.name]
    except PluginError as error:
        return (name, Text(entry.origin), Text(""), _broken(error))
    return (name, Text(entry.origin), Text(", ".join(hooks) or "none"), Text(_description(entry.target)))


def _adapter_row(entry: Installed) -> tuple[Text, ...]:
    said = _broken(entry.error) if entry.error is not None else Text(_description(entry.target))
    return (Text(entry.name), Text(entry.origin), said)


def _broken(error: Exception) -> Text:
    return Text(f"can't be loaded: {' '.join(repr(error).split())}", style="red")


def _description(target: object) -> str:
    said = getattr(target, "description", "")
    return said if isinstance(said, str) and said else (inspect.getdoc(target) or "").partition("\n")[0]
