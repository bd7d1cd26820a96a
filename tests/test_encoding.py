from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from geohooks.documents import Document
from geohooks.encoding import Encoder
from geohooks.errors import DataError, ReferenceMismatch

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(
    letters: list[str] = LETTERS, *, merges: tuple[tuple[str, str], ...] = (), begin: bool = False, **more: Any
) -> PreTrainedTokenizerFast:
    tokens = [*letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **more)
    if begin:
        made.add_special_tokens({"bos_token": "<s>"})
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
        made.backend_tokenizer.post_processor = template
    return made


def encode(encoder: Encoder, *texts: str) -> list[Any]:
    return encoder.encode([Document(str(number), "d", text) for number, text in enumerate(texts)], texts)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=3))
def test_the_pieces_are_the_text_though_a_letter_be_several_tokens(texts: list[str]) -> None:
    encoder = Encoder(tokenizer(merges=(("a", "b"),)))
    for text, found in zip(texts, encode(encoder, *texts), strict=True):
        assert "".join(found.pieces) == found.text == text
        assert len(found.pieces) == len(found.token_ids)


def test_special_tokens_are_their_own_text() -> None:
    (found,) = encode(Encoder(tokenizer(begin=True)), "hi")
    assert found.pieces == ("<s>", "h", "i")


def test_a_conversation_gets_its_special_tokens_from_the_template_only() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    encoder = Encoder(tokenizer(begin=True, chat_template=template))
    talk = Document("t", "d", "", ({"role": "user", "content": "hi"},))
    text = encoder.text(talk)
    assert text == "<s>hi"
    assert encoder.encode([talk], [text])[0].pieces == ("<s>", "h", "i")


def test_a_conversation_that_can_not_be_rendered_is_named() -> None:
    talk = Document("t:3", "d", "", ({"role": "user", "content": "hi"},))
    with pytest.raises(DataError, match="has no chat template; leave out --chat"):
        Encoder(tokenizer()).text(talk)
    refusing = tokenizer(chat_template="{{ raise_exception('no users here') }}")
    with pytest.raises(DataError, match="'t:3': the chat template refuses this conversation: no users here"):
        Encoder(refusing).text(talk)


def test_equal_tokenizers_have_one_fingerprint_and_others_another() -> None:
    assert Encoder(tokenizer()).fingerprint == Encoder(tokenizer(), tokenizer()).fingerprint
    assert Encoder(tokenizer()).fingerprint != Encoder(tokenizer(LETTERS[::-1])).fingerprint


def test_tokens_added_after_the_last_are_no_difference() -> None:
    longer = tokenizer()
    longer.add_tokens(["<extra>"])
    for pair in ((tokenizer(), longer), (longer, tokenizer())):
        assert encode(Encoder(*pair), "plain")[0].pieces == tuple("plain")


def test_the_same_vocabulary_that_encodes_otherwise_is_refused_at_the_first_document_that_shows_it() -> None:
    encoder = Encoder(tokenizer(merges=(("a", "b"),)), tokenizer([*LETTERS, "ab"]))
    encode(encoder, "plain")
    with pytest.raises(ReferenceMismatch, match="encode '1' differently, from token 1 on"):
        encode(encoder, "plain", "cab")


def test_a_token_that_an_added_one_replaces_is_a_difference() -> None:
    longer, other = tokenizer(), tokenizer()
    longer.add_tokens(["<extra>"])
    other.add_tokens(["<other>"])
    with pytest.raises(ReferenceMismatch, match="token 256 is '<extra>' in the model's and '<other>' in the base's"):
        Encoder(longer, other)
