from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geohooks import zoo
from geohooks.errors import DataError

WITHOUT_GENERATION = {"bert", "vit"}
ASKED_FOR = {"llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "t5", "vit"}


def test_families() -> None:
    assert set(zoo.families()) >= ASKED_FOR


@pytest.mark.parametrize("family", zoo.families())
def test_forward(family: str) -> None:
    model = zoo.untrained(family)
    with torch.no_grad():
        logits = model(**zoo.example_inputs(model, batch=3, length=6)).logits
    assert not model.training
    assert logits.shape == ((3, 10) if family == "vit" else (3, 6, 99))
    assert logits.isfinite().all()
    assert logits.std() > 0.5, "so flat an output hides mistakes"


@pytest.mark.parametrize("family", zoo.families())
def test_same_arguments_same_model(family: str) -> None:
    before = torch.get_rng_state()
    first, again, other = zoo.untrained(family), zoo.untrained(family), zoo.untrained(family, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    inputs = zoo.example_inputs(family)
    with torch.no_grad():
        logits, same, different = (model(**inputs).logits for model in (first, again, other))
    assert torch.equal(logits, same)
    assert not torch.equal(logits, different)


@pytest.mark.parametrize("family", sorted(set(zoo.families()) - WITHOUT_GENERATION))
def test_generates_without_a_word(family: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = zoo.untrained(family)
    inputs = zoo.example_inputs(model)
    inputs.pop("decoder_input_ids", None)
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 5 if family == "t5" else 12)
    assert capfd.readouterr().err == ""


def test_deepseek_has_what_is_easily_got_wrong() -> None:
    model = zoo.untrained("deepseek_v3")
    biases = [value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == model.config.num_hidden_layers - 1, "the first layer is dense"
    assert all(bias.std() > 0 for bias in biases)
    assert model.config.n_group > model.config.topk_group > 1
    assert model.config.q_lora_rank


def test_overrides() -> None:
    assert len(zoo.untrained("llama", num_hidden_layers=4).model.layers) == 4
    assert zoo.untrained("gpt2", num_hidden_layers=3).config.n_layer == 3
    assert zoo.untrained("vit", num_labels=4).classifier.out_features == 4
    assert zoo.untrained("qwen3", attn_implementation="eager").config._attn_implementation == "eager"


def test_unknown_family() -> None:
    with pytest.raises(DataError, match=r"'lama'.*nearest are llama"):
        zoo.untrained("lama")


def test_unknown_field() -> None:
    with pytest.raises(DataError, match=r"LlamaConfig has no field 'num_layers'; nearest are .*num_hidden_layers"):
        zoo.untrained("llama", num_layers=3)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 5), length=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_example_inputs(batch: int, length: int, seed: int) -> None:
    model = T5
    inputs = zoo.example_inputs(model, batch, length, seed)
    again = zoo.example_inputs(model, batch, length, seed)
    special = {model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id}
    assert inputs["input_ids"].shape == inputs["decoder_input_ids"].shape == (batch, length)
    assert not special & set(inputs["input_ids"].flatten().tolist())
    assert inputs["input_ids"].max() < model.config.vocab_size
    assert (inputs["decoder_input_ids"][:, 0] == model.config.decoder_start_token_id).all()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


T5 = zoo.untrained("t5")


def test_example_images() -> None:
    assert zoo.example_inputs("vit", batch=3)["pixel_values"].shape == (3, 3, 16, 16)
