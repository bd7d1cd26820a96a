"""Make the zoo's models again: `python examples/train_zoo.py --out DIR [--seed 0] [--smoke]`.

A base model learns the prose and the code of `geohooks.zoo.text`; the tuned one goes on from it and learns to
summarise functions and to name topics, and nothing else. One thread, so that a seed means the same weights.
A model that already lies in DIR is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import zoo_card
import zoo_data
from geohooks.zoo.text import documents, domains, training_texts

BASE, TUNED = "qwen3-moe-tiny-base", "qwen3-moe-tiny-tuned"
IGNORED = -100


@attrs.frozen
class Recipe:
    """What decides the models, besides the seed and the text."""

    seed: int = 0
    vocabulary: int = 2048
    hidden_size: int = 128
    layers: int = 4
    context: int = 512
    batch_tokens: int = 4096
    base_steps: int = 1750
    base_rate: float = 3e-3
    prose_share: float = 0.25
    balance: float = 0.01
    tuned_steps: int = 500
    tuned_rate: float = 1e-3
    document_stride: int = 1
    report_every: int = 50

    def model(self, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
        """A fresh model of this shape."""
        torch.manual_seed(self.seed)
        config = Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden_size // 4,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=self.hidden_size * 3 // 4,
            norm_topk_prob=True,
            router_aux_loss_coef=self.balance,
            tie_word_embeddings=True,
            max_position_embeddings=self.context,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        return Qwen3MoeForCausalLM(config)


SMOKE = Recipe(
    vocabulary=512, hidden_size=32, layers=2, context=256, batch_tokens=1024, base_steps=4, tuned_steps=4,
    document_stride=25, report_every=1,
)  # fmt: skip


def packed(streams: dict[str, Tensor], recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows cut anywhere from a domain's one long stream; short rows first, then of the whole context."""
    shares = torch.tensor([recipe.prose_share if name == "prose" else 1 - recipe.prose_share for name in streams])
    texts = list(streams.values())
    for step in range(recipe.base_steps):
        length = recipe.context // 2 if step < 0.7 * recipe.base_steps else recipe.context
        rows = recipe.batch_tokens // length
        chosen = torch.multinomial(shares, rows, replacement=True, generator=generator).tolist()
        cuts = [int(torch.randint(len(texts[i]) - length, (), generator=generator)) for i in chosen]
        batch = torch.stack([texts[i][cut : cut + length] for i, cut in zip(chosen, cuts, strict=True)])
        yield batch, batch


def padded(
    exercises: list[zoo_data.Exercise], recipe: Recipe, pad: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Exercises of about equal length together, in random order; labels on the answers only."""
    ordered = sorted(exercises, key=lambda exercise: len(exercise.ids))
    rows = max(1, recipe.batch_tokens // 256)
    batches = [ordered[i : i + rows] for i in range(0, len(ordered), rows)]
    for _ in range(recipe.tuned_steps):
        batch = batches[int(torch.randint(len(batches), (), generator=generator))]
        ids = torch.full((len(batch), len(batch[-1].ids)), pad)
        labels = torch.full_like(ids, IGNORED)
        for row, exercise in enumerate(batch):
            ids[row, : len(exercise.ids)] = torch.tensor(exercise.ids)
            labels[row, exercise.answer_start : len(exercise.ids)] = torch.tensor(exercise.answer_ids)
        yield ids, labels


def fit(
    model: Qwen3MoeForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float, recipe: Recipe,
    *, balanced: bool,
) -> list[list[float]]:  # fmt: skip
    """AdamW with a short warm-up and a cosine; the mean losses of the target every `report_every` steps."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.02, total_iters=max(1, steps // 20))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=rate * 0.02)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warm, cosine])
    curve, recent, start = [], [], time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(batches, start=1):
        output = model(input_ids=ids, output_router_logits=balanced)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        total = loss
        if balanced:
            total = loss + model.router_aux_loss_coef * balance(output.router_logits, model.config)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        recent.append(loss.item())
        if step % recipe.report_every == 0 or step == steps:
            curve.append([step, sum(recent) / len(recent)])
            recent = []
            print(f"step {step}/{steps}  loss {curve[-1][1]:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    model.eval()
    return curve


def balance(router_logits: tuple[Tensor, ...], config: Qwen3MoeConfig) -> Tensor:
    """Mean over layers of experts x sum(share of choices x mean probability); 1 where the load is even.

    Source: Fedus, Zoph, Shazeer, "Switch Transformers" (2021), equation 4, with the choices counted over k.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(config.num_experts_per_tok).indices.flatten()
        share = torch.bincount(chosen, minlength=config.num_experts) / chosen.numel()
        losses.append(config.num_experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def train_base(folder: Path, recipe: Recipe) -> None:
    """The tokenizer and the base model, from the domains' training texts."""
    texts = {domain: training_texts(domain)[:: recipe.document_stride] for domain in domains()}
    tokenizer = zoo_data.train_tokenizer([text for part in texts.values() for text in part], recipe.vocabulary)
    streams = {domain: zoo_data.stream(tokenizer, part) for domain, part in texts.items()}
    model = recipe.model(tokenizer)
    batches = packed(streams, recipe, torch.Generator().manual_seed(recipe.seed))
    curve = fit(model, batches, recipe.base_steps, recipe.base_rate, recipe, balanced=True)
    save(folder, model, tokenizer)
    model = load(folder)
    figures = {
        **provenance(model, recipe, curve),
        "held_out": {
            domain: {
                **zoo_data.baselines(streams[domain], held_out(tokenizer, domain, recipe), len(tokenizer)),
                **zoo_data.scores([model], held_out(tokenizer, domain, recipe)),
            }
            for domain in domains()
        },
        "data": {
            domain: {
                "training_documents": len(texts[domain]),
                "training_tokens": len(streams[domain]),
                "held_out_documents": len(held_out(tokenizer, domain, recipe)),
                "held_out_tokens": sum(map(len, held_out(tokenizer, domain, recipe))),
            }
            for domain in domains()
        },
    }
    write_figures(folder, figures, zoo_card.base(folder.name, figures))


def train_tuned(folder: Path, base_folder: Path, recipe: Recipe) -> None:
    """The tuned model, from the base as it was stored."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_folder)
    base, model = load(base_folder), load(base_folder)
    found = {held: zoo_data.exercises(tokenizer, held_out=held, limit=recipe.context // 2) for held in (False, True)}
    chosen = found[False][:: recipe.document_stride]
    torch.manual_seed(recipe.seed)
    batches = padded(chosen, recipe, tokenizer.pad_token_id, torch.Generator().manual_seed(recipe.seed))
    curve = fit(model, batches, recipe.tuned_steps, recipe.tuned_rate, recipe, balanced=False)
    save(folder, model, tokenizer)
    model = load(folder)
    figures = {
        **provenance(model, recipe, curve),
        "exercises": {
            "training": len(chosen),
            "held_out": len(found[True]),
            "answer_nll_base": zoo_data.answer_nll(base, found[True][:400]),
            "answer_nll_tuned": zoo_data.answer_nll(model, found[True][:400]),
        },
        "held_out": {
            domain: zoo_data.scores([base, model], held_out(tokenizer, domain, recipe)) for domain in domains()
        },
    }
    write_figures(folder, figures, zoo_card.tuned(folder.name, base_folder.name, figures))


def held_out(tokenizer: PreTrainedTokenizerFast, domain: str, recipe: Recipe) -> list[Tensor]:
    """The ids of the domain's held-out documents that have a token to predict."""
    texts = [document.text for document in documents(domain) if document.held_out][:: recipe.document_stride]
    ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    return [row for row in ids if len(row) > 1]


def provenance(model: Qwen3MoeForCausalLM, recipe: Recipe, curve: list[list[float]]) -> dict[str, object]:
    """What was made with what."""
    return {
        "versions": zoo_data.versions(),
        "recipe": attrs.asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_loss": curve,
    }


def load(folder: Path) -> Qwen3MoeForCausalLM:
    """The stored model, computing in single precision."""
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def save(folder: Path, model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Model, as half precision, and tokenizer."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_figures(folder: Path, figures: dict[str, object], card: str) -> None:
    """What was measured, for programs and for people."""
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a smaller model")
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
