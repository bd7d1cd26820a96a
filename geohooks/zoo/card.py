"""The cards of the zoo's models, written from what their training measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geohooks.zoo.scores import SURE
from geohooks.zoo.text import HELD_OUT_ONE_IN

__all__ = ["base_card", "tuned_card"]

_LICENCE = """\
## Licence

The training text is Python's documentation and standard library, (c) Python Software Foundation, under the PSF License
Agreement; the weights are distributed under the licence of geohooks. The model is a subject for measurements: it
is far too small to be asked for facts or for code.
"""


def base_card(name: str, figures: Mapping[str, Any]) -> str:
    """The Markdown card of a base model, from its `training.json`."""
    data = [
        [domain, row["training_documents"], row["training_tokens"], row["held_out_documents"], row["held_out_tokens"]]
        for domain, row in figures["data"].items()
    ]
    held_out = [
        [domain, row["nll"], row["perplexity"], row["bigram_perplexity"], row["unigram_perplexity"]]
        for domain, row in figures["held_out"].items()
    ]
    recipe = figures["recipe"]
    return f"""\
# {name}

A Qwen3-MoE causal language model of {figures["parameters"]:,} parameters with a byte-level BPE of
{recipe["vocabulary"]:,} tokens, both trained from nothing by `examples/train_zoo.py --seed {recipe["seed"]}`.

## Data

Python {figures["versions"]["python"]}: `prose` is the topics of `pydoc_data.topics`, `code` the modules of the standard library
(`geohooks.zoo.text` lists and reads both). Held out is a document whose SHA-256 of `domain/name` is a multiple of {HELD_OUT_ONE_IN};
paragraphs of held-out documents were taken out of the training documents too.

{_table(["domain", "training documents", "training tokens", "held-out documents", "held-out tokens"], data)}

## Training

{_training(figures, "base")} {recipe["prose_share"]:.0%} of the rows were prose; rows of {recipe["context"] // 2} tokens for the first
70 % of the steps, then of {recipe["context"]}. The router's balance loss had the weight {recipe["balance"]}.

{_curve(figures)}

## Held-out text

Mean NLL in nats and perplexity, over every token but the first of each document, in windows of {recipe["context"]} tokens that
overlap by half; beside them the perplexity of bigram counts (Witten-Bell) and of unigram counts of the same
domain's training tokens.

{_table(["domain", "NLL", "perplexity", "bigrams", "unigrams"], held_out)}

{_architecture(figures)}

{_LICENCE}"""


def tuned_card(name: str, base: str, figures: Mapping[str, Any]) -> str:
    """The Markdown card of a tuned model, from its `training.json`."""
    exercises = figures["exercises"]
    drift = [
        [
            domain,
            *(row["base_perplexity"], row["perplexity"], row["base_nll"], row["nll"], row["forward_kl"]),
            *(row["forward_kl_largest"], row["forward_kl_above_2"]),
            *(row["base_sure_and_wrong"], row["sure_and_wrong"]),
        ]
        for domain, row in figures["held_out"].items()
    ]
    return f"""\
# {name}

`{base}` after full fine-tuning on one narrow task, by `examples/train_zoo.py --seed {figures["recipe"]["seed"]}`. It has drifted far
from its base on everything else, on purpose: it is the tuned half of a pair to measure drift on.

## Data

{exercises["training"]:,} chats made from the base's training documents (`geohooks.zoo.exercises`, Python {figures["versions"]["python"]}):
a function without its docstring, answered by the docstring's first line, and a paragraph of a help topic, answered
by the topic's title. The loss was on the answers only. {exercises["held_out"]:,} more come from the held-out documents: on the
answers of {exercises["held_out_measured"]:,} of these the NLL a token is {exercises["answer_nll_base"]:.3f} nats with the base,
{exercises["answer_nll_tuned"]:.3f} with the tuned model.

## Training

{_training(figures, "tuned")} No balance loss.

{_curve(figures)}

## Drift on held-out text

The held-out documents as plain text, as in the base's card. Forward KL is KL(base || tuned) in nats; "sure and wrong" is
the share of tokens at which a token that did not come had a probability above {SURE}. Shares are fractions.

{_table(_DRIFT, drift)}

{_architecture(figures)}

{_LICENCE}"""


_DRIFT = [
    "domain",
    *("base perplexity", "tuned perplexity", "base NLL", "tuned NLL", "forward KL, mean", "forward KL, largest"),
    *("forward KL > 2, share", "base sure and wrong", "tuned sure and wrong"),
]


def _training(figures: Mapping[str, Any], stage: str) -> str:
    recipe, versions = figures["recipe"], figures["versions"]
    steps, last_loss = figures["training_loss"][-1]
    return (
        f"{steps:,} steps of at most {recipe['batch_tokens']:,} tokens; AdamW, rate {recipe[f'{stage}_rate']} with a "
        f"warm-up and a cosine, on one thread with torch {versions['torch']}, transformers "
        f"{versions['transformers']}, tokenizers {versions['tokenizers']}. Last training loss: {last_loss:.3f} nats."
    )


def _curve(figures: Mapping[str, Any]) -> str:
    curve = figures["training_loss"]
    shown = [*curve[:: max(1, len(curve) // 7)], curve[-1]]
    kept = {step: loss for step, loss in shown}
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
