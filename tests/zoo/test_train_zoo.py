from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from geohooks import zoo
from geohooks.zoo.exercises import Exercise

SCRIPT = Path(__file__).parents[2] / "examples" / "train_zoo.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_zoo", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zoo")
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--smoke"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_smoke_makes_a_pair_that_loads(made: Path) -> None:
    assert tuple(sorted(folder.name for folder in made.iterdir())) == zoo.names()
    for name in zoo.names():
        assert {file.name for file in (made / name).iterdir()} == {file.name for file in zoo.path(name).iterdir()}
        model = AutoModelForCausalLM.from_pretrained(made / name, local_files_only=True)
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(made / name))


def test_the_shipped_models_were_made_by_this_recipe(script: ModuleType) -> None:
    recipe = script.attrs.asdict(script.Recipe())
    for name in zoo.names():
        assert json.loads((zoo.path(name) / "training.json").read_text(encoding="utf-8"))["recipe"] == recipe


def test_a_seed_means_the_same_weights(script: ModuleType) -> None:
    tokenizer = zoo.load(zoo.names()[0]).tokenizer
    streams = {"prose": torch.arange(900) % 60, "code": torch.arange(900) % 77}

    def train(seed: int) -> torch.Tensor:
        recipe = script.attrs.evolve(script.SMOKE, seed=seed, batch_tokens=256, base_steps=3)
        model = script.new_model(recipe, tokenizer)
        script.fit(model, script.packed(streams, recipe), 3, 1e-2, 1, balanced=True)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = train(0)
    assert torch.equal(first, train(0))
    assert not torch.equal(first, train(1))


def test_rows_are_cut_from_the_streams_at_their_shares(script: ModuleType) -> None:
    streams = {"prose": torch.arange(2000), "code": 10_000 + torch.arange(2000)}
    recipe = script.Recipe(context=64, batch_tokens=4096, base_steps=10)
    batches = [ids for ids, _ in script.packed(streams, recipe)]
    assert [ids.shape for ids in batches] == [(128, 32)] * 7 + [(64, 64)] * 3
    assert all((ids.diff(dim=1) == 1).all() for ids in batches)
    prose = torch.cat([ids[:, 0] < 10_000 for ids in batches]).double().mean()
    assert abs(prose - recipe.prose_share) < 4 * (0.25 * 0.75 / (7 * 128 + 3 * 64)) ** 0.5


def test_only_answers_are_learnt(script: ModuleType) -> None:
    chats = [Exercise(tuple(range(10, 10 + length)), length - 3) for length in (9, 5, 7)]
    recipe = script.Recipe(context=8, batch_tokens=12, tuned_steps=1)
    ids, labels = next(script.padded(chats, recipe, pad=1))
    assert [row[row != 1].tolist() for row in ids] == [list(range(10, 10 + length)) for length in (5, 7, 9)]
    learnt = [row[row != -100].tolist() for row in labels]
    assert learnt == [list(range(7 + length, 10 + length)) for length in (5, 7, 9)]


def test_balance(script: ModuleType) -> None:
    config = zoo.untrained("qwen3_moe").config
    even = torch.eye(8).repeat_interleave(3, 0) * 1e3 + torch.eye(8).roll(1, 1).repeat_interleave(3, 0) * 1e3
    assert script.balance([even], config).item() == pytest.approx(1)
    one_pair = torch.zeros(5, 8)
    one_pair[:, :2] = 1e3
    assert script.balance([one_pair], config).item() == pytest.approx(4)
    assert script.balance([even, one_pair], config).item() == pytest.approx(2.5)
