"""Token ids and losses are those of the model itself."""

from __future__ import annotations

import pytest
import torch
import transformers


def labelled(found, ignored=True):
    labels = found.inputs["input_ids"].clone()
    if ignored:
        labels[0, :3] = -100
    return labels


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3", "opt", "bert"])
def test_the_loss_is_the_models_own(subject, name):
    found = subject(name)
    labels = labelled(found)
    output = found.model(**found.inputs, labels=labels)
    inputs = {**found.inputs, "labels": labels}
    assert torch.equal(found.adapter.loss(found.model, output.logits, inputs), output.loss)


def test_the_loss_has_no_auxiliary_terms(subject):
    found = subject("qwen3_moe")
    labels = labelled(found)
    plain = found.model(**found.inputs, labels=labels)
    whole = found.model(**found.inputs, labels=labels, output_router_logits=True)
    loss = found.adapter.loss(found.model, whole.logits, {**found.inputs, "labels": labels})
    assert torch.equal(loss, plain.loss)
    assert not torch.equal(loss, whole.loss)


def test_the_loss_is_divided_as_the_trainer_asks(subject):
    found = subject("llama")
    labels, items = labelled(found), torch.tensor(100)
    output = found.model(**found.inputs, labels=labels, num_items_in_batch=items)
    inputs = {**found.inputs, "labels": labels, "num_items_in_batch": items}
    assert torch.equal(found.adapter.loss(found.model, output.logits, inputs), output.loss)


def test_a_seq2seq_loss_is_not_shifted(subject):
    found = subject("t5")
    labels = labelled(found)
    output = found.model(input_ids=found.inputs["input_ids"], labels=labels)
    inputs = {"input_ids": found.inputs["input_ids"], "labels": labels}
    assert torch.equal(found.adapter.loss(found.model, output.logits, inputs), output.loss)


def test_a_classification_loss_is_the_models_own(subject, subject_of):
    config = subject("qwen2").model.config
    config.num_labels = 3
    text = subject_of(transformers.Qwen2ForSequenceClassification(config).eval())
    image = subject("vit")
    for found in (text, image):
        labels = torch.tensor([1, 2])
        output = found.model(**found.inputs, labels=labels)
        inputs = {**found.inputs, "labels": labels}
        assert torch.equal(found.adapter.loss(found.model, output.logits, inputs), output.loss)


def test_no_labels_or_no_known_loss_is_none(subject):
    found = subject("llama")
    assert found.adapter.loss(found.model, found.run(), found.inputs) is None
    base = found.model.model
    assert found.adapter.loss(base, found.run(), {"labels": labelled(found)}) is None


def test_tokens_are_those_of_the_main_stack(subject, subject_of):
    text, seq2seq, image = subject("llama"), subject("t5"), subject("vit")
    assert text.adapter.tokens(text.inputs) is text.inputs["input_ids"]
    assert seq2seq.adapter.tokens(seq2seq.inputs) is seq2seq.inputs["decoder_input_ids"]
    assert image.adapter.tokens(image.inputs) is None
    encoder = subject_of(transformers.T5EncoderModel(seq2seq.model.config).eval())
    assert encoder.adapter.tokens(seq2seq.inputs) is seq2seq.inputs["input_ids"]


def test_tokens_of_a_seq2seq_model_come_from_its_labels(subject):
    found = subject("t5")
    labels = labelled(found)
    heard = []
    embedding = found.anatomy.stack("decoder").embedding.module
    embedding.register_forward_hook(lambda _, args, __: heard.append(args[0]))
    found.model(input_ids=found.inputs["input_ids"], labels=labels)
    assert torch.equal(found.adapter.tokens({"labels": labels}), heard[0])
    assert found.adapter.tokens({"input_ids": labels}) is None


def test_a_foreign_models_tokens_are_found_under_any_name():
    from geohooks_structural import Structural

    ids, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.int64)
    assert Structural().tokens({"attention_mask": mask, "ids": ids}) is ids
    assert Structural().tokens({"input_ids": mask, "decoder_input_ids": ids}) is ids
    assert Structural().tokens({"inputs_embeds": torch.zeros(1, 3, 4), "token_type_ids": ids}) is None
    assert Structural().tokens({"attention_mask": mask, "labels": ids}) is None
