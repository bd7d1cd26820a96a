"""Documents as tokens: their ids, each token's own text, and whether two tokenizers mean the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import attrs
import jinja2
import numpy as np
from numpy.typing import NDArray

from geohooks.documents import Document
from geohooks.errors import DataError, ReferenceMismatch

__all__ = ["Encoded", "Encoder"]


@attrs.frozen(eq=False)
class Encoded:
    """A document's text, its token ids `[tokens]`, and the tokens' own texts, which together are the text."""

    text: str
    token_ids: NDArray[np.int64]
    pieces: tuple[str, ...]


class Encoder:
    """Encodes documents with the model's tokenizer, and makes sure that the base's does it alike.

    A `ReferenceMismatch`, here or at the first document that shows it, where the two differ in more than tokens that
    one of them has beyond the other's last.
    """

    def __init__(self, tokenizer: Any, base: Any = None) -> None:
        self._tokenizer = tokenizer
        self._base = None if base is None or _definition(base) == _definition(tokenizer) else base
        if self._base is not None:
            _check_vocabularies(tokenizer.get_vocab(), base.get_vocab())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what the tokenizer does."""
        return hashlib.sha256(_definition(self._tokenizer).encode()).hexdigest()

    def text(self, document: Document) -> str:
        """The document's text; a conversation's is what the tokenizer's chat template makes of it."""
        if document.messages is None:
            return document.text
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(f"the tokenizer {type(self._tokenizer).__name__} has no chat template; leave out --chat")
        try:
            return self._tokenizer.apply_chat_template(list(document.messages), tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"'{document.name}': the chat template refuses this conversation: {error}") from error

    def encode(self, documents: Sequence[Document], texts: Sequence[str]) -> list[Encoded]:
        """The documents, whose texts are `texts`, as tokens; plain text with the tokenizer's special ones."""
        if not documents:
            return []
        chat = documents[0].messages is not None
        found = self._tokenized(self._tokenizer, texts, chat=chat)
        if self._base is not None:
            theirs = self._tokenized(self._base, texts, chat=chat)["input_ids"]
            for document, mine, base in zip(documents, found["input_ids"], theirs, strict=True):
                if mine != base:
                    raise ReferenceMismatch(
                        f"the tokenizers of model and base encode '{document.name}' differently, from token "
                        f"{_first_difference(mine, base)} on; a base with the model's own tokenizer is needed"
                    )
        offsets = found.get("offset_mapping") or [None] * len(texts)
        return [
            Encoded(text, np.asarray(ids, dtype=np.int64), self._pieces(text, ids, spans))
            for text, ids, spans in zip(texts, found["input_ids"], offsets, strict=True)
        ]

    def _tokenized(self, tokenizer: Any, texts: Sequence[str], *, chat: bool) -> dict[str, Any]:
        # A template writes its special tokens itself.
        fast = bool(getattr(tokenizer, "is_fast", False))
        return dict(
            tokenizer(
                list(texts),
                add_special_tokens=not chat,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=fast,
                verbose=False,
            )
        )

    def _pieces(self, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]] | None) -> tuple[str, ...]:
        """Each token's own text: from the end of the one before, so that nothing of the text is lost or doubled."""
        if spans is None:
            return tuple(self._tokenizer.decode([one]) for one in ids)
        pieces, reached = [], 0
        for one, (start, stop) in zip(ids, spans, strict=True):
            added = start == stop
            pieces.append(self._tokenizer.convert_ids_to_tokens(one) if added else text[reached : max(reached, stop)])
            reached = max(reached, stop)
        return tuple(pieces)


def _definition(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "backend": None if backend is None else backend.to_str(),
        "template": getattr(tokenizer, "chat_template", None),
    }
    return json.dumps(settings, default=str)


def _check_vocabularies(tuned: dict[str, int], base: dict[str, int]) -> None:
    own, theirs = ({number: token for token, number in one.items()} for one in (tuned, base))
    for number in sorted(own.keys() & theirs.keys()):
        if own[number] != theirs[number]:
            raise ReferenceMismatch(
                f"the tokenizers of model and base differ: token {number} is {own[number]!r} in the model's and "
                f"{theirs[number]!r} in the base's; a base with the model's own tokenizer is needed"
            )
    shared = max(own.keys() & theirs.keys(), default=-1)
    for vocabulary, whose in ((own, "model"), (theirs, "base")):
        lone = next((number for number in sorted(own.keys() ^ theirs.keys()) if number in vocabulary), None)
        if lone is not None and lone < shared:
            raise ReferenceMismatch(
                f"the tokenizers of model and base differ: only the {whose}'s has token {lone}, {vocabulary[lone]!r}; "
                "a base with the model's own tokenizer is needed"
            )


def _first_difference(mine: Sequence[int], base: Sequence[int]) -> int:
    pairs = enumerate(zip(mine, base, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(mine), len(base)))
