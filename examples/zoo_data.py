"""What `train_zoo.py` trains and measures on: tokenizer, token streams, exercises, held-out scores."""

from __future__ import annotations

import ast
import platform
import textwrap
from collections.abc import Iterator, Sequence

import attrs
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from geohooks.zoo.text import Document, documents, domains

END, PAD, ROLES = "<|endoftext|>", "<|pad|>", ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SUMMARISE = "Summarise this function in one line.\n"
NAME_TOPIC = "Name the topic of this text.\n"


@attrs.frozen
class Exercise:
    """A chat of one question and its answer, as token ids; the answer runs from `answer_start` to the end."""

    ids: list[int]
    answer_start: int

    @property
    def answer_ids(self) -> list[int]:
        """The tokens that the tuned model learns."""
        return self.ids[self.answer_start :]


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, the special ones included."""
    bpe = Tokenizer(models.BPE())
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
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts as one row of ids, an end of text after each."""
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def exercises(tokenizer: PreTrainedTokenizerFast, *, held_out: bool, limit: int) -> list[Exercise]:
    """Functions to summarise and topics to name, at most `limit` tokens each; from one side of the split."""
    pairs = [
        pair
        for domain in domains()
        for document in documents(domain)
        if document.held_out == held_out
        for pair in (_functions(document) if domain == "code" else _topics(document))
    ]
    made = (_exercise(tokenizer, question, text, answer, limit) for question, text, answer in pairs)
    return [exercise for exercise in made if exercise is not None]


def _functions(document: Document) -> Iterator[tuple[str, str, str]]:
    lines = document.text.splitlines()
    for node in ast.walk(ast.parse(document.text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
        if summary:
            first = node.body[0]
            code = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
            yield SUMMARISE, textwrap.dedent("\n".join(code)), summary


def _topics(document: Document) -> Iterator[tuple[str, str, str]]:
    title, _, body = document.text.partition("\n")
    for paragraph in body.split("\n\n"):
        if len(paragraph) > 200:
            yield NAME_TOPIC, paragraph.strip(), title


def _exercise(
    tokenizer: PreTrainedTokenizerFast, question: str, text: str, answer: str, limit: int
) -> Exercise | None:
    """None where the answer leaves no room for a text."""

    def ids(content: str) -> list[int]:
        user = {"role": "user", "content": question + content}
        return tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)

    answer_ids = tokenizer(f"{answer}\n{END}")["input_ids"]
    room = limit - len(ids("")) - len(answer_ids)
    if room < 32:
        return None
    kept = tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][:room])
    prompt = ids(kept)
    return Exercise([*prompt, *answer_ids], len(prompt))


def windows(ids: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of at most `context` tokens that overlap by half, and which of each row's predictions to count."""
    if len(ids) <= context:
        yield ids[None], torch.ones(1, len(ids) - 1, dtype=torch.bool)
        return
    starts = [*range(0, len(ids) - context, context // 2), len(ids) - context]
    for chunk in (starts[i : i + 8] for i in range(0, len(starts), 8)):
        rows = torch.stack([ids[start : start + context] for start in chunk])
        targets = torch.tensor(chunk)[:, None] + torch.arange(1, context)
        before = torch.tensor([starts[starts.index(start) - 1] + context if start else 0 for start in chunk])
        yield rows, targets >= before[:, None]


@torch.no_grad()
def scores(pair: Sequence[nn.Module], held_out: Sequence[Tensor]) -> dict[str, float]:
    """Held-out figures of one model, or of a base and the model tuned from it, over every token but the firsts.

    `perplexity`, `nll` (mean, nats), and `sure_and_wrong`: the share of tokens at which the top probability is
    above 0.9 and its token is not the one that came. Of a pair: these of the tuned model, those of the base under
    `base_...`, and the forward KL(base || tuned) in nats.
    """
    columns: dict[str, list[Tensor]] = {}
    for ids in held_out:
        for rows, counted in windows(ids, pair[0].config.max_position_embeddings):
            targets = rows[:, 1:][counted]
            found = [F.log_softmax(model(input_ids=rows).logits[:, :-1][counted], -1) for model in pair]
            for log_p, prefix in zip(found, ("base_", "") if len(found) == 2 else ("",), strict=True):
                top = log_p.max(-1)
                wrong = (top.values.exp() > 0.9) & (top.indices != targets)
                columns.setdefault(f"{prefix}nll", []).append(-log_p.gather(1, targets[:, None])[:, 0])
                columns.setdefault(f"{prefix}sure_and_wrong", []).append(wrong.float())
            if len(found) == 2:
                kl = (found[0].exp() * (found[0] - found[1])).sum(-1)
                columns.setdefault("forward_kl", []).append(kl)
                columns.setdefault("forward_kl_above_2", []).append((kl > 2).float())
    means = {name: torch.cat(parts).double().mean().item() for name, parts in columns.items()}
    perplexities = {
        name.replace("nll", "perplexity"): float(torch.tensor(value).exp())
        for name, value in means.items()
        if name.endswith("nll")
    }
    largest = {"forward_kl_largest": torch.cat(columns["forward_kl"]).max().item()} if len(pair) == 2 else {}
    return {**perplexities, **means, **largest}


def baselines(training: Tensor, held_out: Sequence[Tensor], vocabulary: int) -> dict[str, float]:
    """Held-out perplexity of counts: unigrams (one added to each) and bigrams backed off to them.

    Source of the back-off: Witten, Bell, "The zero-frequency problem" (1991), method C, interpolated.
    """
    unigram = torch.bincount(training, minlength=vocabulary).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(training[:-1] * vocabulary + training[1:], minlength=vocabulary**2)
    counts = pairs.view(vocabulary, vocabulary).double()
    kinds = (counts > 0).sum(1).clamp(min=1)
    before = torch.cat([ids[:-1] for ids in held_out])
    after = torch.cat([ids[1:] for ids in held_out])
    bigram = (counts[before, after] + kinds[before] * unigram[after]) / (counts.sum(1) + kinds)[before]
    return {
        "unigram_perplexity": (-unigram[after].log().mean()).exp().item(),
        "bigram_perplexity": (-bigram.log().mean()).exp().item(),
    }


@torch.no_grad()
def answer_nll(model: nn.Module, found: Sequence[Exercise]) -> float:
    """Mean NLL, in nats, of the answers' tokens."""
    total, count = 0.0, 0
    for exercise in found:
        logits = model(input_ids=torch.tensor([exercise.ids])).logits[0, exercise.answer_start - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(exercise.answer_ids), reduction="sum").item()
        count += len(exercise.answer_ids)
    return total / max(count, 1)


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
