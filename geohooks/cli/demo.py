"""`geohooks demo`: the main job on models and text that every installation has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from geohooks.cli.measure import measure
from geohooks.cli.show import report
from geohooks.run import Run
from geohooks.zoo import text

__all__ = ["demo"]

MODEL, BASE = "zoo:qwen3-moe-tiny-tuned", "zoo:qwen3-moe-tiny-base"


def demo(
    *,
    out: Annotated[Path, typer.Option(help="The folder for the texts, the run and the page.")] = Path("demo-report"),
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Two short documents a domain, in the folder's `smoke`."),
    ] = False,
) -> None:
    """Measure an embedded model against its base, on help texts and sources of this Python that neither was trained on.

    Prints the figures and the most confident and wrong tokens, and says where the page lies.
    """
    folder, documents, longest = (out / "smoke", 2, 1_200) if smoke else (out, 10, 5_000)
    data = [f"{domain}={_written(folder / 'data' / domain, domain, documents, longest)}" for domain in text.domains()]
    measure(data, model=MODEL, base=BASE, out=folder / "run", dtype="float32")
    report(Console(), Run.open(folder / "run"), html=folder / "report.html")


def _written(folder: Path, domain: str, count: int, longest: int) -> Path:
    """The beginnings of `count` held-out documents as files in `folder`, spread evenly over those of the domain."""
    held_out = [one for one in text.documents(domain) if one.held_out and len(one.text) >= 1_000]
    for one in held_out[:: max(1, len(held_out) // count)][:count]:
        path = folder / (one.name if domain == "code" else f"{one.name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one.text[:longest], encoding="utf-8")
    return folder
