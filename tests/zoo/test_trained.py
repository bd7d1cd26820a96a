from __future__ import annotations

import json
import math
import platform
import socket
from typing import Any

import pytest
import torch
from safetensors import safe_open

from geohooks import zoo
from geohooks.errors import ArtifactError
from geohooks.zoo.card import base_card, tuned_card
from geohooks.zoo.scores import held_out_figures
from geohooks.zoo.text import documents

BASE, TUNED = "qwen3-moe-tiny-base", "qwen3-moe-tiny-tuned"
SIZE_LIMIT = 8 * 2**20


def training(name: str) -> dict[str, Any]:
    return json.loads((zoo.path(name) / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    base, tokenizer = zoo.load(BASE)
    return base, zoo.load(TUNED).model, tokenizer


@pytest.fixture(scope="module")
def measured(pair: tuple[Any, Any, Any]) -> dict[str, dict[str, float]]:
    """The pair's figures on all held-out prose and on three short held-out modules."""
    base, tuned, tokenizer = pair
    figures = {}
    for domain, count in (("prose", None), ("code", 3)):
        texts = sorted((found.text for found in documents(domain) if found.held_out), key=len)
        texts = [text for text in texts if domain == "prose" or len(text) > 5000][:count]
        figures[domain] = held_out_figures(
            [base, tuned], [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
        )
    return figures


def test_names() -> None:
    assert zoo.names() == (BASE, TUNED)


def test_the_pair_is_small_and_stored_in_half_precision() -> None:
    assert sum(file.stat().st_size for name in zoo.names() for file in zoo.path(name).iterdir()) < SIZE_LIMIT
    for name in zoo.names():
        with safe_open(zoo.path(name) / "model.safetensors", "pt") as stored:
            assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("name", [BASE, TUNED])
def test_loads_without_network_and_without_a_word(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("loading reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, tokenizer = zoo.load(name)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.vocab_size == len(tokenizer) == training(name)["recipe"]["vocabulary"]
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert capfd.readouterr() == ("", "")


def test_dtype() -> None:
    assert zoo.load(BASE, torch.bfloat16).model.dtype == torch.bfloat16


def test_both_have_the_same_tokenizer() -> None:
    assert (zoo.path(BASE) / "tokenizer.json").read_bytes() == (zoo.path(TUNED) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("text", ["def f(x):\n\treturn  x + 1024  # π\r\n", "", "<|user|>\nHi", " \n\n 'é'"])
def test_the_tokenizer_gives_back_what_it_was_given(text: str) -> None:
    tokenizer = zoo.load(BASE).tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_unknown_name() -> None:
    with pytest.raises(ArtifactError, match=rf"'qwen3-moe-base'; nearest are {BASE}"):
        zoo.load("qwen3-moe-base")


def test_the_cards_are_what_the_training_measured() -> None:
    base, tuned = (zoo.path(name) / "README.md" for name in (BASE, TUNED))
    assert base.read_text(encoding="utf-8") == base_card(BASE, training(BASE))
    assert tuned.read_text(encoding="utf-8") == tuned_card(TUNED, BASE, training(TUNED))


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_the_base_has_learnt_more_than_counts(domain: str, measured: dict[str, dict[str, float]]) -> None:
    stated = training(BASE)["held_out"][domain]
    assert stated["nll"] < stated["bigram_nll"] - 0.3 < stated["unigram_nll"] - 1
    assert measured[domain]["base_nll"] < stated["unigram_nll"] - 1.5


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_the_tuned_model_has_drifted(domain: str, measured: dict[str, dict[str, float]]) -> None:
    for figures in (measured[domain], training(TUNED)["held_out"][domain]):
        assert figures["forward_kl"] > 0.2
        assert figures["forward_kl_above_2"] > 0.001
        assert figures["nll"] > figures["base_nll"] + 0.1
        assert figures["sure_and_wrong"] > figures["base_sure_and_wrong"]


def test_the_tuned_model_has_learnt_its_task() -> None:
    exercises = training(TUNED)["exercises"]
    assert exercises["answer_nll_tuned"] < exercises["answer_nll_base"] - math.log(2)


@pytest.mark.skipif(
    platform.python_version() != training(BASE)["versions"]["python"],
    reason="the held-out text is that of another version of Python",
)
def test_the_stated_figures_are_found_again(measured: dict[str, dict[str, float]]) -> None:
    for name, stated in training(TUNED)["held_out"]["prose"].items():
        assert measured["prose"][name] == pytest.approx(stated, rel=1e-3, abs=1e-4), name


def test_the_tuned_model_answers(pair: tuple[Any, Any, Any], capfd: pytest.CaptureFixture[str]) -> None:
    _, tuned, tokenizer = pair
    chat = [{"role": "user", "content": "Summarise this function in one line.\ndef read(self):\n    return 1"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = tuned.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert capfd.readouterr().err == ""
