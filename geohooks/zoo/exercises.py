"""What the tuned model of the zoo was tuned on: functions to summarise and topics to name."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from geohooks.zoo.text import Document

__all__ = ["Exercise", "exercises"]

_SUMMARISE = "Summarise this function in one line.\n"
_NAME_TOPIC = "Name the topic of this text.\n"
_LEAST_TEXT = 32


@attrs.frozen
class Exercise:
    """A chat of one question and its answer, as token ids; the answer runs from `answer_start` to the end."""

    ids: tuple[int, ...]
    answer_start: int

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The ids that the tuned model learns to give, the end of the text with them."""
        return self.ids[self.answer_start :]


def exercises(tokenizer: Any, documents: Iterable[Document], limit: int) -> list[Exercise]:
    """The exercises in the documents, with longer texts cut at their end so that an exercise has `limit` tokens.

    A token or two more may come of it, where the ends of the text merge differently with what surrounds them.

    In code, every function that has a docstring, without it; the answer is the docstring's first line. In
    prose, every paragraph of more than 200 characters; the answer is the topic's title.
    """
    made = [
        _exercise(tokenizer, question, text, answer, limit)
        for document in documents
        for question, text, answer in (_functions(document) if document.domain == "code" else _topics(document))
    ]
    return [exercise for exercise in made if exercise is not None]


def _functions(document: Document) -> Iterator[tuple[str, str, str]]:
    lines = document.text.splitlines()
    for node in ast.walk(ast.parse(document.text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
        if summary:
            docstring = node.body[0]
            code = [
                *lines[node.lineno - 1 : docstring.lineno - 1],
                *lines[docstring.end_lineno : node.end_lineno],
            ]
            yield _SUMMARISE, textwrap.dedent("\n".join(code)), summary


def _topics(document: Document) -> Iterator[tuple[str, str, str]]:
    title, _, body = document.text.partition("\n")
    for paragraph in body.split("\n\n"):
        if len(paragraph) > 200:
            yield _NAME_TOPIC, paragraph.strip(), title


def _exercise(tokenizer: Any, question: str, text: str, answer: str, limit: int) -> Exercise | None:
    """None where the answer leaves too little room for the text."""

    def prompt(content: str) -> list[int]:
        chat = [{"role": "user", "content": question + content}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    answer_ids = tokenizer(f"{answer}\n{tokenizer.eos_token}")["input_ids"]
    room = limit - len(prompt("")) - len(answer_ids)
    if room < _LEAST_TEXT:
        return None
    kept = tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][:room])
    ids = prompt(kept)
    return Exercise((*ids, *answer_ids), len(ids))
