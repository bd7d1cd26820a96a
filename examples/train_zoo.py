"""Make the zoo's models again: `python examples/train_zoo.py [--out DIR] [--seed 0] [--smoke]`.

A base model learns the prose and the code of `geohooks.zoo.text`; the tuned one goes on from it and learns to
summarise functions and to name topics, and nothing else. All on one thread: with the same versions of Python,
torch and transformers, a seed gives the same weights. A model that lies finished in DIR is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from geohooks.zoo.card import base_card, tuned_card
from geohooks.zoo.exercises import Exercise, exercises
from geohooks.zoo.scores import answer_nll, bigram_nll, held_out_figures, unigram_nll
from geohooks.zoo.text import Document, documents, domains, training_texts

BASE, TUNED = "qwen3-moe-tiny-base", "qwen3-moe-tiny-tuned"
END, PAD, ROLES = "<|endoftext|>", "<|pad|>", ["<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
IGNORED = -100
MEASURED_EXERCISES = 400
Batches = Iterator[tuple[Tensor, Tensor]]


@attrs.frozen
class Recipe:
    """What decides the models, besides the text."""

    seed: int = 0
    vocabulary: int = 2048
    hidden_size: int = 128
    layers: int = 4
    context: int = 512
    batch_tokens: int = 4096
    base_steps: int = 1750
    base_rate: float = 3e-3
    short_rows: float = 0.7
    prose_share: float = 0.25
    balance: float = 0.01
    tuned_steps: int = 400
    tuned_rate: float = 6e-4
    document_stride: int = 1
    report_every: int = 50


SMOKE = Recipe(
    vocabulary=512, hidden_size=32, layers=2, context=256, batch_tokens=1024, base_steps=4, tuned_steps=4,
    document_stride=25, report_every=1,
)  # fmt: skip


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, the special ones included."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden_size // 4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=recipe.hidden_size * 3 // 4,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance,
        tie_word_embeddings=True,
        max_position_embeddings=recipe.context,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(recipe.seed)
    return Qwen3MoeForCausalLM(config)


def stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts as one row of ids, an end of text after each."""
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def packed(streams: dict[str, Tensor], recipe: Recipe) -> Batches:
    """Rows cut anywhere from the domains' streams, first of half the context, then of the whole."""
    generator = torch.Generator().manual_seed(recipe.seed)
    prose = torch.tensor([name == "prose" for name in streams])
    shares = torch.where(prose, recipe.prose_share, 1 - recipe.prose_share)
    texts = list(streams.values())
    for step in range(recipe.base_steps):
        length = recipe.context // 2 if step < recipe.short_rows * recipe.base_steps else recipe.context
        rows = recipe.batch_tokens // length
        chosen = torch.multinomial(shares, rows, replacement=True, generator=generator).tolist()
        cuts = [int(torch.randint(len(texts[i]) - length, (), generator=generator)) for i in chosen]
        batch = torch.stack([texts[i][cut : cut + length] for i, cut in zip(chosen, cuts, strict=True)])
        yield batch, batch


def padded(chats: Sequence[Exercise], recipe: Recipe, pad: int) -> Batches:
    """Chats of about equal length together, in random order; labels on the answers only."""
    generator = torch.Generator().manual_seed(recipe.seed)
    ordered = sorted(chats, key=lambda chat: len(chat.ids))
    rows = recipe.batch_tokens // (recipe.context // 2)
    batches = [ordered[i : i + rows] for i in range(0, len(ordered), rows)]
    for _ in range(recipe.tuned_steps):
        batch = batches[int(torch.randint(len(batches), (), generator=generator))]
        ids = torch.full((len(batch), len(batch[-1].ids)), pad)
        labels = torch.full_like(ids, IGNORED)
        for row, chat in enumerate(batch):
            ids[row, : len(chat.ids)] = torch.tensor(chat.ids)
            labels[row, chat.answer_start : len(chat.ids)] = torch.tensor(chat.answer_ids)
        yield ids, labels


def fit(
    model: Qwen3MoeForCausalLM, batches: Batches, steps: int, rate: float, every: int, *, balanced: bool
) -> list[tuple[int, float]]:
    """AdamW with a short warm-up and a cosine; the mean NLL (nats) of the labels after each `every` steps."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimiser, 0.02, total_iters=max(1, steps // 20))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=rate * 0.02)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warm_up, cosine])
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    start = time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(batches, start=1):
        output = model(input_ids=ids, output_router_logits=balanced)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        recent.append(loss.item())
        if balanced:
            loss = loss + model.router_aux_loss_coef * balance(output.router_logits, model.config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append((step, sum(recent) / len(recent)))
            recent = []
            print(f"step {step}/{steps}  loss {curve[-1][1]:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return curve


def balance(router_logits: Sequence[Tensor], config: Qwen3MoeConfig) -> Tensor:
    """Mean over layers of experts x sum(share of choices x mean probability); 1 where the load is even.

    Source: Fedus, Zoph, Shazeer, "Switch Transformers" (2021), equation 4, with all k choices counted.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(config.num_experts_per_tok).indices.flatten()
        share = torch.bincount(chosen, minlength=config.num_experts) / chosen.numel()
        losses.append(config.num_experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def train_base(folder: Path, recipe: Recipe) -> None:
    texts = {domain: training_texts(domain)[:: recipe.document_stride] for domain in domains()}
    tokenizer = train_tokenizer([text for part in texts.values() for text in part], recipe.vocabulary)
    streams = {domain: stream(tokenizer, part) for domain, part in texts.items()}
    model = new_model(recipe, tokenizer)
    batches = packed(streams, recipe)
    curve = fit(model, batches, recipe.base_steps, recipe.base_rate, recipe.report_every, balanced=True)
    store(folder, model, tokenizer)
    counts = {domain: len(part) for domain, part in texts.items()}
    finish(folder, base_figures(folder, recipe, streams, counts), recipe, curve)


def base_figures(folder: Path, recipe: Recipe, streams: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Any]:
    """What the stored base model knows of held-out text, and what counts know."""
    model, tokenizer = load(folder)
    data, figures = {}, {}
    for domain, training in streams.items():
        texts = held_out_ids(tokenizer, domain, recipe)
        data[domain] = {
            "training_documents": counts[domain],
            "training_tokens": len(training),
            "held_out_documents": len(texts),
            "held_out_tokens": sum(map(len, texts)),
        }
        figures[domain] = {
            **held_out_figures([model], texts),
            "bigram_nll": bigram_nll(training, texts, len(tokenizer)),
            "unigram_nll": unigram_nll(training, texts, len(tokenizer)),
        }
    return {"data": data, "held_out": figures}


def train_tuned(folder: Path, base_folder: Path, recipe: Recipe) -> None:
    model, tokenizer = load(base_folder)
    chats = exercises(tokenizer, part(recipe, held_out=False), recipe.context // 2)
    torch.manual_seed(recipe.seed)
    batches = padded(chats, recipe, tokenizer.pad_token_id)
    curve = fit(model, batches, recipe.tuned_steps, recipe.tuned_rate, recipe.report_every, balanced=False)
    store(folder, model, tokenizer)
    finish(folder, tuned_figures(folder, base_folder, recipe, len(chats)), recipe, curve)


def tuned_figures(folder: Path, base_folder: Path, recipe: Recipe, chats: int) -> dict[str, Any]:
    """What the stored tuned model has learnt, and how far it is from the stored base elsewhere."""
    model, tokenizer = load(folder)
    base, _ = load(base_folder)
    unseen = exercises(tokenizer, part(recipe, held_out=True), recipe.context // 2)
    measured = unseen[:: max(1, len(unseen) // MEASURED_EXERCISES)]
    return {
        "exercises": {
            "training": chats,
            "held_out": len(unseen),
            "held_out_measured": len(measured),
            "answer_nll_base": answer_nll(base, measured),
            "answer_nll_tuned": answer_nll(model, measured),
        },
        "held_out": {
            domain: held_out_figures([base, model], held_out_ids(tokenizer, domain, recipe)) for domain in domains()
        },
    }


def part(recipe: Recipe, *, held_out: bool) -> list[Document]:
    """The documents of all domains on one side of the split."""
    return [
        document
        for domain in domains()
        for document in [found for found in documents(domain) if found.held_out == held_out][:: recipe.document_stride]
    ]


def held_out_ids(tokenizer: PreTrainedTokenizerFast, domain: str, recipe: Recipe) -> list[Tensor]:
    """The ids of the domain's held-out documents that have a token to predict."""
    texts = [document.text for document in part(recipe, held_out=True) if document.domain == domain]
    ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    return [row for row in ids if len(row) > 1]


def load(folder: Path) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    """The stored model, computing in single precision, and its tokenizer."""
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def store(folder: Path, model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def finish(folder: Path, figures: dict[str, Any], recipe: Recipe, curve: list[tuple[int, float]]) -> None:
    """Writes the figures, for programs and for people."""
    model, _ = load(folder)
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    mixture = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    rest = ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
    packages = {package.__name__: package.__version__ for package in (torch, transformers, tokenizers)}
    figures = {
        "versions": {"python": platform.python_version(), **packages},
        "recipe": attrs.asdict(recipe),
        "parameters": model.num_parameters(),
        "architecture": {name: getattr(model.config, name) for name in (*shape, *mixture, *rest)},
        "training_loss": curve,
        **figures,
    }
    tuned = folder.name == TUNED
    card = tuned_card(folder.name, BASE, figures) if tuned else base_card(folder.name, figures)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"{folder} is ready; README.md there is its card")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the zoo's models again.")
    parser.add_argument("--out", type=Path, default=Path("zoo"), help="folder that gets one folder a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a smaller model on less text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    recipe = attrs.evolve(SMOKE if arguments.smoke else Recipe(), seed=arguments.seed)
    base_folder, tuned_folder = arguments.out / BASE, arguments.out / TUNED
    if not (base_folder / "training.json").exists():
        train_base(base_folder, recipe)
    if not (tuned_folder / "training.json").exists():
        train_tuned(tuned_folder, base_folder, recipe)


if __name__ == "__main__":
    main()
