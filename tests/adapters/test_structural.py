"""Models that no adapter knows: by declaration, by shape, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geohooks_structural
from geohooks.errors import AdapterError


class Attention(nn.Module):
    """Attention from nobody's library: returns a tuple, and mixes positions by a running mean."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, rows):
        steps = torch.arange(1, rows.shape[1] + 1)[:, None]
        return self.mix(rows.cumsum(1) / steps), None


class Block(nn.Module):
    """A pre-norm block of tuples."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = Attention(width)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, rows):
        rows = rows + self.attend(self.first(rows))[0]
        return (rows + self.think(self.second(rows)),)


class Words(nn.Module):
    """A language model from nobody's library."""

    def __init__(self, width=12, depth=3, words=20):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.stem = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)])
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.closing_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, words)

    def forward(self, ids):
        rows = self.embedding(ids)
        for part in self.stem:
            rows = part(rows)
        for block in self.blocks:
            (rows,) = block(rows)
        return self.out(self.closing_norm(rows))


def anatomy(model):
    return geohooks_structural.adapt(model).anatomy(model)


def test_a_foreign_model_is_read_by_shape():
    model = Words()
    found = anatomy(model)
    assert [(stack.name, len(stack.blocks), stack.width) for stack in found.stacks] == [("decoder", 3, 12)]
    assert (found.logits, found.outputs) == ("vocabulary", 20)
    block = found.main.blocks[1]
    assert block.module is model.blocks[1]
    assert block.mlp is model.blocks[1].think
    assert block.attention is None, "it does not use transformers' attention interface"
    assert {site.kind for site in block.sites()} == {"input", "attention", "mlp", "output"}
    assert found.main.final_norm.module is model.closing_norm
    assert found.main.module is model


def test_its_sites_are_what_it_uses(heard):
    torch.manual_seed(0)
    model = Words().eval()
    found = anatomy(model)
    ids = torch.randint(20, (2, 5))
    taps = {site: found.tap(site) for site in found.sites if site.stack}
    with torch.no_grad(), heard(taps) as values:
        plain = model(ids)
    by_name = {str(site): value for site, value in values.items()}
    for layer in range(3):
        parts = [by_name[f"decoder.{layer}.{kind}"] for kind in ("input", "attention", "mlp")]
        torch.testing.assert_close(sum(parts), by_name[f"decoder.{layer}.output"])
    for site, tap in taps.items():
        with torch.no_grad(), heard({site: tap}, lambda _, value: value + torch.randn_like(value)):
            assert not torch.allclose(model(ids), plain), site


def test_a_stack_of_torchs_own_layers_is_read():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    found = anatomy(model)
    assert [(stack.name, len(stack.blocks), stack.width) for stack in found.stacks] == [("encoder", 3, 16)]
    block = found.main.blocks[0]
    assert block.taps["attention"].module is model.layers[0].self_attn
    assert block.taps["mlp"].module is model.layers[0].linear2
    assert found.adapter.weight(block, "up") is model.layers[0].linear1.weight
    assert found.logits is None


def test_named_stacks_are_all_taken():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList([Block(8) for _ in range(3)])
            self.decoder = nn.ModuleList([Block(8) for _ in range(2)])

    found = anatomy(Translator())
    assert [(stack.name, len(stack.blocks)) for stack in found.stacks] == [("encoder", 3), ("decoder", 2)]


def test_the_longest_of_unnamed_lists_is_taken():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.early = nn.Sequential(*[Block(8) for _ in range(2)])
            self.late = nn.Sequential(*[Block(8) for _ in range(4)])

    model = Stages()
    found = anatomy(model)
    assert found.main.module is model.late
    assert len(found.stacks) == 1


def test_equal_lists_without_names_are_refused():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.ModuleList([Block(8) for _ in range(3)])
            self.right = nn.ModuleList([Block(8) for _ in range(3)])

    with pytest.raises(AdapterError, match=r"Twins has several lists of 3 like blocks \(left, right\).*adapter="):
        anatomy(Twins())


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(3)]),
        nn.ModuleList(),
    ],
)
def test_a_model_without_blocks_is_refused(model):
    with pytest.raises(AdapterError) as refused:
        anatomy(model)
    text = str(refused.value)
    assert text.startswith(f"{type(model).__name__} has no blocks: looked for")
    assert "adapter=" in text
    assert "\n" not in text


def test_experts_in_a_list_are_parts_of_their_block():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = Attention(8)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(6)])

    model = nn.ModuleDict({"blocks": nn.ModuleList([Mixture(), Mixture()])})
    assert [block.module for block in anatomy(model).main.blocks] == list(model["blocks"])


@pytest.mark.parametrize(
    ("name", "attention", "mlp", "norm"),
    [
        ("gpt2", "attn", "mlp", "transformer.ln_f"),
        ("bert", "attention.output.dense", "output.dense", None),
        ("opt", "self_attn", "fc2", "model.decoder.final_layer_norm"),
        ("falcon", "self_attention", "mlp", "transformer.ln_f"),
        ("bloom", "self_attention", "mlp", "transformer.ln_f"),
    ],
)
def test_families_without_an_adapter_are_read_at_the_right_modules(subject, name, attention, mlp, norm):
    found = subject(name)
    block, stack = found.block(), found.anatomy.main
    assert block.taps["attention"].module is block.module.get_submodule(attention)
    assert block.taps["mlp"].module is block.module.get_submodule(mlp)
    assert (stack.final_norm and stack.final_norm.module) is (norm and found.model.get_submodule(norm))
    assert stack.name == ("encoder" if name == "bert" else "decoder")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_parts_that_are_added_raw_sum_to_the_block(subject, heard, name):
    found = subject(name)
    with heard(found.taps()) as values:
        found.run()
    by_name = {str(site): value for site, value in values.items()}
    for layer in range(2):
        entered, attention, mlp, left = (
            by_name[f"decoder.{layer}.{kind}"] for kind in ("input", "attention", "mlp", "output")
        )
        torch.testing.assert_close(entered + attention + mlp.reshape(entered.shape), left)
