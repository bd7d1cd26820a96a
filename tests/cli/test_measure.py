from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from geohooks import pipeline
from geohooks.cli import main
from geohooks.documents import windows
from geohooks.run import Run
from geohooks.zoo import untrained

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
CONTEXT = ("--context", "16", "--stride", "6")


def tokenizer(letters: list[str], template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def save(folder: Path, model: Any, letters: list[str] = LETTERS, template: str | None = TEMPLATE) -> Path:
    model.save_pretrained(folder)
    tokenizer(letters, template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = [save(folder / f"m{seed}", untrained("qwen3_moe", seed=seed, vocab_size=256)) for seed in (0, 1)]
    return made[0], made[1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "prose"
    folder.mkdir()
    for number, length in enumerate([40, 1, 0, 25, 7, 90, 33, 16, 17]):
        text = "".join(chr(97 + (number * 7 + place * place) % 26) for place in range(length))
        (folder / f"{number}.txt").write_text(text)
    (folder / "8.txt").write_text("späße — ünïcode 漢字 \U0001f980!\n\n  end")
    return folder


def command(pair: tuple[Path, Path], out: Path, *more: object) -> list[str]:
    given = ["measure", "--model", pair[0], "--base", pair[1], "--out", out, *CONTEXT, "--part-size", 30, *more]
    return [str(argument) for argument in given]


def measure(pair: tuple[Path, Path], data: object, out: Path, *more: object) -> Run:
    main_ok([*command(pair, out, *more), str(data)])
    return Run.open(out)


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def same_rows(one: Run, other: Run) -> bool:
    """Bit-identical tables."""
    return all(
        mine.equals(theirs) for mine, theirs in zip(map(plain, one.parts()), map(plain, other.parts()), strict=True)
    )


def plain(part: Any) -> pa.Table:
    columns = []
    for column in part.positions.combine_chunks().columns:
        array = column.chunk(0)
        columns.append(array.view(pa.int32()) if pa.types.is_float32(array.type) else array)
    return pa.table(columns, names=part.positions.column_names)


def test_every_row_is_the_model_after_its_window(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    run = measure(pair, data, tmp_path / "run")
    model = untrained("qwen3_moe", seed=0, vocab_size=256)
    base = untrained("qwen3_moe", seed=1, vocab_size=256)
    table = run.positions().to_pylist()
    encoder = tokenizer(LETTERS)
    expected = []
    for document in run.documents().to_pylist():
        ids = encoder(document["text"])["input_ids"]
        assert document["tokens"] == len(ids)
        for window in windows(len(ids), 16, 6):
            inputs = torch.tensor([ids[window.start : window.stop]])
            with torch.no_grad():
                q, p = (one(inputs).logits[0].double().log_softmax(-1) for one in (model, base))
            for row in range(window.first, window.last):
                mine, theirs = q[row - window.start], p[row - window.start]
                nll = -float(mine[ids[row + 1]]) if row + 1 < len(ids) else None
                entropy, kl = -(mine.exp() * mine).sum(), (theirs.exp() * (theirs - mine)).sum()
                expected.append((document["document"], row, ids[row], float(entropy), float(kl), nll))
    assert [(row["document"], row["position"], row["token_id"]) for row in table] == [row[:3] for row in expected]
    for row, wanted in zip(table, expected, strict=True):
        assert row["entropy"] == pytest.approx(wanted[3], abs=1e-4)
        assert row["forward_kl"] == pytest.approx(wanted[4], abs=1e-4)
        assert row["nll"] == (None if wanted[5] is None else pytest.approx(wanted[5], abs=1e-4))


def test_the_tokens_texts_are_the_documents_text(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    run = measure(pair, data, tmp_path / "run")
    rows = run.positions(["document", "token"]).to_pylist()
    for document in run.documents().to_pylist():
        pieces = [row["token"] for row in rows if row["document"] == document["document"]]
        assert "".join(pieces) == document["text"] == (data / document["name"]).read_text()


def test_empty_documents_are_counted_and_one_token_has_no_nll(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = measure(pair, data, tmp_path / "run")
    said = capsys.readouterr().out
    assert "of 8 documents" in said
    assert "1 empty document was skipped" in said
    assert run.manifest.totals is not None
    assert run.manifest.totals.empty_documents == 1
    lone = [row for row in run.positions().to_pylist() if row["document"] == 1]
    assert [(row["position"], row["nll"], row["entropy"] > 0) for row in lone] == [(0, None, True)]
    assert {row["domain"] for row in run.documents().to_pylist()} == {"prose"}


def test_a_killed_run_ends_with_the_rows_of_an_unbroken_one(
    pair: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    whole = measure(pair, data, tmp_path / "whole")
    assert len(whole.part_numbers()) >= 4
    script = (
        "import os, signal, sys, pyarrow.parquet as pq\n"
        "from geohooks.cli import main\n"
        "write, written = pq.write_table, []\n"
        "def dying(table, path, **options):\n"
        "    written.append(path)\n"
        "    if len(written) == 6:\n"
        "        path.write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(table, path, **options)\n"
        "pq.write_table = dying\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [*command(pair, tmp_path / "broken"), str(data)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    half = Run.open(tmp_path / "broken")
    assert half.part_numbers() == (0, 1)
    assert half.manifest.totals is None
    main_ok(arguments)
    again = Run.open(tmp_path / "broken")
    assert same_rows(whole, again)
    assert again.manifest.totals == whole.manifest.totals
    assert not list((tmp_path / "broken").rglob("*.tmp"))


def test_two_processes_share_the_parts_and_nothing_is_done_twice(
    pair: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    whole = measure(pair, data, tmp_path / "whole")
    script = (
        "import os, sys, geohooks.run as run\n"
        "from geohooks.cli import main\n"
        "write = run.Run.write_part\n"
        "def told(self, part, totals):\n"
        "    print('part', part.number)\n"
        "    write(self, part, totals)\n"
        "run.Run.write_part = told\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [*command(pair, tmp_path / "shared"), str(data)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    done = [[int(number) for number in re.findall(r"part (\d+)", words)] for words in said]
    count = len(whole.part_numbers())
    assert done == [list(range(0, count, 2)), list(range(1, count, 2))]
    shared = Run.open(tmp_path / "shared")
    assert same_rows(whole, shared)
    assert shared.manifest.totals == whole.manifest.totals


def test_a_full_disk_is_one_line_and_the_run_goes_on_after_it(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = measure(pair, data, tmp_path / "whole")
    (data / "9.txt").write_text("full of words " * 400)
    arguments = [*command(pair, tmp_path / "run"), str(data)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(file.stat().st_size for file in (tmp_path / "whole").rglob("*.parquet"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 4096, limits[1]))
    try:
        said = error_of(arguments, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "can't be written: File too large; what was written before is intact" in said
    half = Run.open(tmp_path / "run")
    assert half.part_numbers() == whole.part_numbers()
    main_ok(arguments)
    assert Run.open(tmp_path / "run").manifest.finished


def test_another_command_and_other_data_are_refused(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = measure(pair, data, tmp_path / "run")
    measure(pair, data, tmp_path / "run")
    said = error_of([*command(pair, tmp_path / "run", "--batch-tokens", 64), str(data)], capsys)
    assert "its batch_tokens is 4096, not 64" in said
    swapped = error_of([*command((pair[1], pair[0]), tmp_path / "run"), str(data)], capsys)
    assert "provenance.model.name" in swapped
    (run.path / "run.json").write_text((run.path / "run.json").read_text().replace('"totals": {', '"total": {'))
    assert "extra fields found (total)" in error_of([*command(pair, tmp_path / "run"), str(data)], capsys)


def test_data_that_changed_under_an_unfinished_run_are_refused(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "5.txt").write_bytes(b"half \xff")
    arguments = [*command(pair, tmp_path / "run"), str(data)]
    assert "5.txt' is not UTF-8 text: byte 0xff at offset 5" in error_of(arguments, capsys)
    assert Run.open(tmp_path / "run").part_numbers() == (0, 1)
    (data / "5.txt").write_text("whole")
    (data / "0.txt").write_text("other")
    assert "part 0 have changed since" in error_of(arguments, capsys)


def test_no_text_keeps_text_out_of_every_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    secret = tmp_path / "s.txt"
    secret.write_text("xyzzyplugh")
    run = measure(pair, secret, tmp_path / "run", "--no-text")
    assert "token" not in run.positions().column_names
    assert "text" not in run.documents().column_names
    assert run.documents()["sha256"].to_pylist() == [hashlib.sha256(b"xyzzyplugh").hexdigest()]
    assert [column.name for column in run.manifest.columns] == run.positions().column_names


def test_chat_goes_through_the_template(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    run = measure(pair, f"talk={talk}", tmp_path / "run", "--chat")
    assert run.documents()["text"].to_pylist() == ["<|user|>hi"]
    assert "read it with --chat" in error_of([*command(pair, tmp_path / "other"), str(talk)], capsys)


def test_work_that_is_worth_compiling_is_measured_eagerly_without_a_compiler(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "compiler_available", lambda device: False)
    assert not measure(pair, data, tmp_path / "small").manifest.compiled
    assert "compile" not in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "_WORTH_COMPILING", 0)
    assert not measure(pair, data, tmp_path / "large").manifest.compiled
    assert "note: no C++ compiler was found" in capsys.readouterr().err


def test_logits_that_are_nan_are_counted(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = untrained("llama", vocab_size=256)
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    model = save(tmp_path / "nan", broken)
    said = error_of(["measure", str(data), "--model", str(model), "--out", str(tmp_path / "run"), *CONTEXT], capsys)
    table = Run.open(tmp_path / "run").positions()
    assert np.isnan(table["entropy"].to_numpy()).all()
    assert f"at {table.num_rows} of {table.num_rows} positions the logits had NaN" in said


def test_parts_of_empty_documents_alone_hold_no_row(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    (folder / "1.txt").write_text("a full first part of thirty characters and more")
    (folder / "2.txt").write_text("")
    run = measure(pair, folder, tmp_path / "run", "--part-size", 10)
    assert len(run.part_numbers()) == 2
    assert set(run.positions()["document"].to_pylist()) == {0}
    said = error_of([*command(pair, tmp_path / "none"), str(folder / "2.txt")], capsys)
    assert "hold no text" in said


def test_a_finished_run_notices_that_the_data_changed(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the first text")
    measure(pair, file, tmp_path / "run")
    main_ok([*command(pair, tmp_path / "run"), str(file)])
    assert "already finished" in capsys.readouterr().err
    file.write_text("quite another text")
    assert "changed" in error_of([*command(pair, tmp_path / "run"), str(file)], capsys)


def test_a_run_notices_that_the_model_was_trained_on(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = untrained("llama", vocab_size=256, hidden_size=256, num_hidden_layers=6)
    folder = save(tmp_path / "model", model)
    arguments = ["measure", str(data), "--model", str(folder), "--out", str(tmp_path / "run"), *CONTEXT]
    main_ok(arguments)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0] *= -3
    save(folder, model)
    assert "another" in error_of(arguments, capsys)


def test_a_torn_part_is_measured_again(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    whole = measure(pair, data, tmp_path / "run")
    again = measure(pair, data, tmp_path / "again")
    manifest = tmp_path / "again" / "run.json"
    torn = tmp_path / "again" / "positions" / "part-00001.parquet"
    torn.write_bytes(torn.read_bytes()[:500])
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"totals": None}))
    again = measure(pair, data, tmp_path / "again")
    assert same_rows(whole, again)


def test_more_tokens_than_embeddings_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "small", untrained("llama", vocab_size=200))
    said = error_of(["measure", str(data), "--model", str(model), "--out", str(tmp_path / "run"), *CONTEXT], capsys)
    assert "embeddings for 200 tokens" in said


def test_vocabularies_that_differ_by_padding_are_compared_on_the_shared_ids(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = save(tmp_path / "wide", untrained("qwen3_moe", seed=1, vocab_size=300))
    run = measure((pair[0], wider), data, tmp_path / "run")
    assert run.manifest.shared_ids == 256
    assert "compared on the first 256 ids" in capsys.readouterr().err
    assert not np.isnan(run.positions()["forward_kl"].to_numpy()).any()


@pytest.mark.parametrize(
    ("letters", "complaint"),
    [
        (LETTERS[::-1], "token 0 is"),
        (LETTERS[1:], "token 0 is"),
    ],
)
def test_other_tokenizers_are_refused(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, letters: list[str], complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = save(tmp_path / "other", untrained("qwen3_moe", seed=1, vocab_size=256), letters)
    said = error_of([*command((pair[0], other), tmp_path / "run"), str(data)], capsys)
    assert "the tokenizers of model and base differ" in said
    assert complaint in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda given: given.update({"--model": "/none/such"}), "model '/none/such' can't be loaded: there is no such"),
        (lambda given: given.update({"--model": "zoo:qwen"}), "the zoo has no model 'qwen'"),
        (lambda given: given.update({"--dtype": "int8"}), "dtype 'int8' is not known"),
        (lambda given: given.update({"--context": "999"}), "a context of 999 is more than the 128 positions"),
        (lambda given: given.update({"--stride": "16"}), "a stride of 16 with a context of 16"),
        (lambda given: given.update({"data": "./nothing.txt"}), "'./nothing.txt' does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, change: Callable[[dict[str, str]], None], complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = {"data": str(data), "--model": str(pair[0]), "--out": str(tmp_path / "run"), "--context": "16"}
    change(given)
    place = given.pop("data")
    arguments = ["measure", place, *(word for option in given.items() for word in option)]
    assert complaint in error_of(arguments, capsys)


def test_a_broken_weight_file_is_one_line(
    tmp_path: Path, pair: tuple[Path, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save(tmp_path / "broken", untrained("llama", vocab_size=256))
    (broken / "model.safetensors").write_bytes(b"not weights")
    said = error_of(["measure", str(data), "--model", str(broken), "--out", str(tmp_path / "run")], capsys)
    assert f"model '{broken}' can't be loaded" in said


def test_traceback_may_stand_anywhere(tmp_path: Path) -> None:
    from geohooks.errors import DataError

    with pytest.raises(DataError, match="does not exist"):
        main(["measure", "./none.txt", "--model", "m", "--out", str(tmp_path), "--traceback"])
