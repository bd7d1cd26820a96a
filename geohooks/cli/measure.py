"""`geohooks measure`: the per-position table of every signal over data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
        int | None, typer.Option(min=2, help="Tokens in a window.  [default: the model's own, at most 2048]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next.  [default: half the context]")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch, padding included.")] = 4096,
    part_size: Annotated[
        int, typer.Option(min=1, help="Characters in a part of the run: what an interruption can lose.")
    ] = 262_144,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64, or auto: as the weights are stored.")
    ] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Where the weights lie: auto, cpu, cuda:1, ...  [default: one device]")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
) -> None:
    """Measure every signal at every token of DATA, and write the table to a folder.

    An interrupted run is continued by the same command, and ends with the same rows. Under `torchrun` or
    `accelerate launch` several processes share the parts. In folders, hidden files and binary ones are left out.
    """
    from geohooks.cli.loading import load_pair
    from geohooks.pipeline import Options, measure_documents
