"""The cards of the zoo's models, written from what their training measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from geohooks.zoo.scores import SURE
from geohooks.zoo.text import HELD_OUT_ONE_IN

__all__ = ["base_card", "tuned_card"]

_LICENCE = """\
## Licence

The training text is Python's documentation and standard library, (c) Python Software Foundation, under the
PSF License Agreement; the weights come under the licence of geohooks. The model is a subject for measurements:
it is far too small to be asked for facts or for code.
"""

_DRIFT = {
    "base_perplexity": "base perplexity",
    "perplexity": "tuned perplexity",
    "base_nll": "base NLL",
    "nll": "tuned NLL",
    "forward_kl": "forward KL, mean",
    "forward_kl_largest": "forward KL, largest",
    "forward_kl_above_2": "forward KL > 2, share",
    "base_sure_and_wrong": "base sure and wrong",
    "sure_and_wrong": "tuned sure and wrong",
}


def base_card(name: str, figures: Mapping[str, Any]) -> str:
    """The Markdown card of a base model, from its `training.json`."""
    recipe = figures["recipe"]
    context = recipe["context"]
    data = [[domain, *row.values()] for domain, row in figures["data"].items()]
    counts = next(iter(figures["data"].values()))
    held_out = [
        [domain, row["nll"], *(math.exp(row[nll]) for nll in ("nll", "bigram_nll", "unigram_nll"))]
        for domain, row in figures["held_out"].items()
    ]
    return f"""\
# {name}

A Qwen3-MoE causal language model of {figures["parameters"]:,} parameters with a byte-level BPE of
{recipe["vocabulary"]:,} tokens, both trained from nothing by `examples/train_zoo.py --seed {recipe["seed"]}`.

## Data

Python {figures["versions"]["python"]}: `prose` is the topics of `pydoc_data.topics`, `code` the modules of
the standard library; `geohooks.zoo.text` reads both. Held out is a document whose SHA-256 of `domain/name`
is a multiple of {HELD_OUT_ONE_IN}; paragraphs that a held-out document has too were left out of the
training documents.

{_table(["domain", *(name.replace("_", " ") for name in counts)], data)}

## Training

{_training(figures, "base")}
Of the rows {recipe["prose_share"]:.0%} were prose; they had {context // 2} tokens for the first
{recipe["short_rows"]:.0%} of the steps, then {context}. The routers' balance loss had the weight
{recipe["balance"]}.

{_curve(figures)}

## Held-out text

Mean NLL (nats) and perplexity over every token but the first of each document, in windows of {context}
tokens that overlap by half; beside them the perplexities of counts in the same domain's training tokens:
bigrams (Witten-Bell) and unigrams.

{_table(["domain", "NLL", "perplexity", "bigrams", "unigrams"], held_out)}

{_architecture(figures)}

{_LICENCE}"""


def tuned_card(name: str, base: str, figures: Mapping[str, Any]) -> str:
    """The Markdown card of a tuned model, from its `training.json`."""
    exercises = figures["exercises"]
    drift = [[domain, *(row[column] for column in _DRIFT)] for domain, row in figures["held_out"].items()]
    return f"""\
# {name}

`{base}` after full fine-tuning on one narrow task by
`examples/train_zoo.py --seed {figures["recipe"]["seed"]}`. Nothing held it near its base on other text: it is
the tuned half of a pair on which to measure drift.

## Data

{exercises["training"]:,} chats made from the base's training documents (`geohooks.zoo.exercises`, Python
{figures["versions"]["python"]}): a function without its docstring, answered by the docstring's first line,
and a paragraph of a help topic, answered by the topic's title. The loss was on the answers only.
The held-out documents give {exercises["held_out"]:,} more; over {exercises["held_out_measured"]:,} of them the
mean NLL of the answers' tokens is {exercises["answer_nll_base"]:.3f} nats with the base and
{exercises["answer_nll_tuned"]:.3f} with this model.

## Training

{_training(figures, "tuned")}
No balance loss.

{_curve(figures)}

## Drift on held-out text

The base's held-out documents as plain text, in the same windows; unseen by both models. Forward KL is
KL(base || tuned) in nats. "Sure and wrong" is the share of tokens at which one that did not come had a
probability above {SURE}. Shares are fractions.

{_table(["domain", *_DRIFT.values()], drift)}

{_architecture(figures)}

{_LICENCE}"""


def _training(figures: Mapping[str, Any], stage: str) -> str:
    recipe, versions = figures["recipe"], figures["versions"]
    steps, last_loss = figures["training_loss"][-1]
    return (
        f"{steps:,} steps of at most {recipe['batch_tokens']:,} tokens; AdamW, rate {recipe[f'{stage}_rate']}\n"
        f"with a warm-up and a cosine, on one thread with torch {versions['torch']}, transformers\n"
        f"{versions['transformers']}, tokenizers {versions['tokenizers']}. Training loss (nats, the mean over the\n"
        f"{recipe['report_every']} steps before): {last_loss:.3f} at the end."
    )


def _curve(figures: Mapping[str, Any]) -> str:
    curve = figures["training_loss"]
    shown = [*curve[:: max(1, len(curve) // 7)], curve[-1]]
    kept = dict(shown)
    return _table(["step", *map(str, kept)], [["training loss", *kept.values()]])


def _architecture(figures: Mapping[str, Any]) -> str:
    rows = [[name, value] for name, value in figures["architecture"].items()]
    return "## Architecture\n\n" + _table(["field", "value"], rows) + "\n\nWeights are stored as float16."


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
