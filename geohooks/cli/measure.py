"""`geohooks measure`: the per-position table of every signal over data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from geohooks.run import Totals

__all__ = ["measure"]


def measure(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Files (txt, jsonl, parquet, source code), folders, or hub data sets; NAME=PATH names the domain.",
        ),
    ],
    *,
    model: Annotated[str, typer.Option(help="The model: a hub name, a local folder, or zoo:NAME.")],
    out: Annotated[Path, typer.Option(help="The folder of the run; one that was interrupted is continued.")],
    base: Annotated[str | None, typer.Option(help="The base model to compare with, named likewise.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Read conversations (`messages`) through the tokenizer's chat template.")
    ] = False,
    text_field: Annotated[str, typer.Option(help="The field of jsonl and parquet rows that holds the text.")] = "text",
    no_text: Annotated[bool, typer.Option("--no-text", help="Keep text out of the files.")] = False,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens in a window; if left out, as many as the model has, up to 2048."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; half the context if left out.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch, padding included.")] = 4096,
    part_size: Annotated[
        int, typer.Option(min=1, help="Characters in a part of the run: what an interruption can lose.")
    ] = 262_144,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64, or auto: as the weights are stored.")
    ] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Where the weights lie: auto, cpu, cuda:1, ...; one device if left out.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
) -> None:
    """Measure every signal at every token of DATA, and write the table to a folder.

    An interrupted run is continued by the same command, and ends with the same rows. Under `torchrun` or
    `accelerate launch` several processes share the parts. In folders, hidden files and binary ones are left out.
    """
    from geohooks.cli.loading import load
    from geohooks.documents import find_sources, size_of
    from geohooks.errors import DataError
    from geohooks.pipeline import Measurement, Settings, processes

    sources = find_sources(data)
    first = processes()[0] == 0
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    measured = load(model, **options)
    reference = None if base is None else load(base, **options)
    with _Display(size_of(sources), shown=first) as display:
        run = Measurement(
            measured.model,
            measured.tokenizer,
            sources,
            names=(measured.source, None if reference is None else reference.source),
            base=None if reference is None else reference.model,
            base_tokenizer=None if reference is None else reference.tokenizer,
            settings=Settings(context, stride, batch_tokens, part_size, chat, text_field, not no_text),
            notice=display.notice,
            progress=display.progress,
        ).run(out)
    totals = run.manifest.totals
    if totals is not None:
        typer.echo(_last_line(totals, out))
        if totals.undefined_positions:
            raise DataError(
                f"at {totals.undefined_positions:,} of {totals.tokens:,} positions the logits had NaN or infinity, and "
                "so have the signals there; the run is whole, but look at the model's weights and --dtype"
            )


class _Display:
    """A progress bar with tokens per second on standard error, and notices above it; of one process only."""

    def __init__(self, size: int | None, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._shown = shown
        self._bar = Progress(
            TextColumn("measuring"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("measuring", total=size, tokens=0, rate=0.0)
        self._tokens = 0
        self._began = 0.0

    def __enter__(self) -> _Display:
        self._bar.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def notice(self, message: str) -> None:
        if self._shown:
            self._bar.console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)

    def progress(self, tokens: int, size: int) -> None:
        self._tokens += tokens
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        self._bar.update(self._task, advance=size, tokens=self._tokens, rate=rate)


def _last_line(totals: Totals, out: Path) -> str:
    line = f"measured {totals.tokens:,} tokens of {totals.documents:,} documents; the run is in {out}"
    if totals.empty_documents:
        what = "document was" if totals.empty_documents == 1 else "documents were"
        line += f"; {totals.empty_documents:,} empty {what} skipped"
    return line
