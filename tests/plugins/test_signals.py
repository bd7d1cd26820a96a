from __future__ import annotations

import functools
import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import geohooks
from geohooks.zoo import example_inputs, untrained
from geohooks_signals import Signals

SETTINGS = settings(deadline=None, max_examples=8)
KEYS = ["document", "position", "token_id", "domain"]


@functools.cache
def model(family: str = "qwen3_moe", seed: int = 0, **overrides: object) -> torch.nn.Module:
    return untrained(family, seed=seed, **overrides)


def texts(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def recorded(*calls: dict[str, object], reference: bool = True, of: torch.nn.Module | None = None) -> pa.Table:
    signals = Signals()
    tuned = of or model()
    with geohooks.instrument(tuned, [signals], reference=model(seed=1) if reference else None), torch.no_grad():
        for call in calls:
            tuned(**call)
    return signals.table()


def separately(rows: list[torch.Tensor]) -> pa.Table:
    return recorded(*({"input_ids": row[None]} for row in rows))


def assert_same(found: pa.Table, wanted: pa.Table, tolerance: float = 1e-4) -> None:
    assert found.schema == wanted.schema
    assert found.num_rows == wanted.num_rows
    for name in found.column_names:
        mine, theirs = found[name].combine_chunks(), wanted[name].combine_chunks()
        assert mine.is_null().equals(theirs.is_null()), name
        if pa.types.is_floating(mine.type):
            np.testing.assert_allclose(
                mine.to_numpy(zero_copy_only=False), theirs.to_numpy(zero_copy_only=False), rtol=0, atol=tolerance,
                err_msg=name,
            )  # fmt: skip
        else:
            assert mine.to_pylist() == theirs.to_pylist(), name


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@SETTINGS
@given(lengths, st.integers(0, 99), st.sampled_from(["left", "right"]))
def test_padding_on_either_side_changes_no_row(sizes: tuple[int, ...], seed: int, side: str) -> None:
    rows = texts(sizes, seed)
    assert_same(recorded(padded(rows, side)), separately(rows))


@SETTINGS
@given(lengths, st.integers(0, 99), st.integers(0, 4))
def test_any_split_into_batches_gives_the_same_rows(sizes: tuple[int, ...], seed: int, cut: int) -> None:
    rows = texts(sizes, seed)
    groups = [group for group in (rows[:cut], rows[cut:]) if group]
    assert_same(recorded(*(padded(group, "right") for group in groups)), separately(rows))


@SETTINGS
@given(lengths, st.integers(0, 99))
def test_packed_documents_are_the_documents_apart(sizes: tuple[int, ...], seed: int) -> None:
    rows = texts(sizes, seed)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = {"input_ids": torch.cat(rows)[None], "position_ids": positions, "use_cache": False}
    assert_same(recorded(packed), separately(rows))


@SETTINGS
@given(st.integers(2, 9), st.lists(st.integers(1, 8), max_size=3), st.integers(0, 99))
def test_chunks_through_a_cache_are_one_document(length: int, cuts: list[int], seed: int) -> None:
    rows = torch.stack(texts((length, length), seed))
    edges = [0, *sorted({cut for cut in cuts if cut < length}), length]
    cache = DynamicCache(config=model().config)
    calls = [
        {"input_ids": rows[:, start:stop], "past_key_values": cache, "use_cache": True}
        for start, stop in itertools.pairwise(edges)
    ]
    assert_same(recorded(*calls), recorded({"input_ids": rows}))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_generation_continues_the_documents_of_its_rows(options: dict[str, object]) -> None:
    signals, tuned = Signals(), model()
    prompt = padded(texts((6, 4)), "left")
    prompt.pop("position_ids")
    with geohooks.instrument(tuned, [signals], reference=model(seed=1)):
        out = tuned.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, **options)
        table = signals.table()
    whole = separately([out[0, :-1], out[1, 2:-1]])
    of = {(row["document"], row["position"]): row for row in whole.to_pylist()}
    rows = table.to_pylist()
    assert {(row["document"], row["position"]) for row in rows} >= {(0, place) for place in range(5, 10)}
    for row in rows:
        other = of[row["document"], row["position"]]
        assert row == {name: pytest.approx(value, abs=1e-4) for name, value in other.items()}


def test_a_static_cache_gives_the_rows_of_a_growing_one() -> None:
    tuned, prompt = model(), padded(texts((6, 4)), "left")
    prompt.pop("position_ids")
    found = []
    for options in ({}, {"cache_implementation": "static"}):
        signals = Signals()
        with geohooks.instrument(tuned, [signals]):
            tuned.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)
        found.append(signals.table())
    assert_same(*found)


def test_a_second_generation_is_new_documents() -> None:
    signals, tuned = Signals(), model()
    with geohooks.instrument(tuned, [signals]):
        for _ in range(2):
            tuned.generate(texts((4,))[0][None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    table = signals.table()
    assert table["document"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert table["position"].to_pylist() == [3, 4, 5, 3, 4, 5]
    assert table["entropy"].to_pylist()[:3] == table["entropy"].to_pylist()[3:]


def test_rejected_drafts_leave_no_rows() -> None:
    signals, tuned = Signals(), model()
    prompt = texts((6,))[0].repeat(2)[None]
    with geohooks.instrument(tuned, [signals]):
        out = tuned.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=3)
    table = signals.table()
    places = table["position"].to_pylist()
    assert places == sorted(set(places))
    assert table["token_id"].to_pylist() == [out[0, place].item() for place in places]
    whole = recorded({"input_ids": out}, reference=False)
    wanted = [whole["entropy"][place].as_py() for place in places]
    assert table["entropy"].to_pylist() == pytest.approx(wanted, abs=1e-4)


@SETTINGS
@given(st.integers(1, 6), st.integers(0, 99))
def test_only_the_positions_that_were_computed_are_rows(kept: int, seed: int) -> None:
    rows = texts((6, 6), seed)
    table = recorded({"input_ids": torch.stack(rows), "logits_to_keep": kept})
    whole = separately(rows)
    assert_same(table, whole.filter(pa.compute.greater_equal(whole["position"], 6 - kept)))


def test_rows_are_the_textbook_formulas() -> None:
    tuned, base, (ids,) = model(), model(seed=1), texts((9,))
    table = recorded({"input_ids": ids[None]})
    with torch.no_grad():
        q, p = (one(ids[None]).logits[0].double().log_softmax(-1).numpy() for one in (tuned, base))
    expected = {**described(q, ids), **{f"base_{name}": value for name, value in described(p, ids).items()}}
    mixture = np.log((np.exp(p) + np.exp(q)) / 2)
    expected |= {
        "forward_kl": (np.exp(p) * (p - q)).sum(1),
        "reverse_kl": (np.exp(q) * (q - p)).sum(1),
        "jensen_shannon": ((np.exp(p) * (p - mixture)).sum(1) + (np.exp(q) * (q - mixture)).sum(1)) / 2,
        "top1_agreement": (p.argmax(1) == q.argmax(1)).astype(float),
        "nll_increase": expected["nll"] - expected["base_nll"],
        **{
            f"{name}_change": expected[name] - expected[f"base_{name}"]
            for name in ("entropy", "renyi2", "varentropy", "residual")
        },
    }
    signals = [name for name in table.column_names if name not in KEYS and "router" not in name]
    assert len(signals) == 22
    for name in signals:
        found = table[name].to_numpy()
        np.testing.assert_allclose(found, expected[name][: len(found)], atol=1e-4, err_msg=name)
    assert table["nll"].null_count == 1


def described(logp: np.ndarray, ids: torch.Tensor) -> dict[str, np.ndarray]:
    p = np.exp(logp)
    entropy = -(p * logp).sum(1)
    varentropy = (p * logp**2).sum(1) - entropy**2
    top = np.sort(p, axis=1)
    nll = np.append(-logp[np.arange(len(ids) - 1), ids[1:]], np.nan)
    renyi2 = -np.log((p**2).sum(1))
    return {
        "entropy": entropy,
        "renyi2": renyi2,
        "varentropy": varentropy,
        "residual": renyi2 - entropy + varentropy / 2,
        "top1_probability": top[:, -1],
        "margin": top[:, -1] - top[:, -2],
        "nll": nll,
        "calibration_gap": nll - entropy,
        "calibration_z": (nll - entropy) / np.sqrt(varentropy),
    }


def test_router_columns_are_what_the_routers_decided() -> None:
    tuned, base, (ids,) = model(), model(seed=1), texts((7,))
    table = recorded({"input_ids": ids[None]})
    decided = [[], []]
    for one, kept in zip((tuned, base), decided, strict=True):
        handles = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
            for layer in one.model.layers
        ]
        with torch.no_grad():
            one(ids[None])
        for handle in handles:
            handle.remove()
    drift = []
    for layer, (mine, theirs) in enumerate(zip(*decided, strict=True)):
        p = mine[0].double().softmax(-1)
        chosen = p.gather(1, mine[2])
        ranked = p.sort(-1, descending=True).values
        sets = [[set(row) for row in one[2].tolist()] for one in (mine, theirs)]
        drift.append([1 - len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)])
        found = {
            name: table[f"router.{layer}.{name}"].to_numpy() for name in ("entropy", "top_mass", "margin", "jaccard")
        }
        np.testing.assert_allclose(found["entropy"], -(p * p.log()).sum(1), atol=1e-5)
        np.testing.assert_allclose(found["top_mass"], chosen.sum(1), atol=1e-5)
        np.testing.assert_allclose(found["margin"], ranked[:, 1] - ranked[:, 2], atol=1e-5)
        np.testing.assert_allclose(found["jaccard"], drift[-1], atol=1e-6)
    np.testing.assert_allclose(table["router_drift"].to_numpy(), np.mean(drift, axis=0), atol=1e-6)


def test_a_dense_model_without_a_base_has_neither_router_nor_base_columns() -> None:
    table = recorded({"input_ids": texts((5,))[0][None]}, reference=False, of=model("llama"))
    assert table.column_names == [
        *KEYS, "entropy", "renyi2", "varentropy", "residual", "top1_probability", "margin", "nll", "calibration_gap",
        "calibration_z",
    ]  # fmt: skip


def test_an_encoder_decoder_is_recorded_over_its_decoder() -> None:
    pair, inputs = model("t5"), example_inputs("t5", batch=2, length=6)
    table = recorded(inputs, reference=False, of=pair)
    assert table["token_id"].to_pylist() == inputs["decoder_input_ids"].flatten().tolist()
    labels = {"input_ids": inputs["input_ids"], "labels": inputs["decoder_input_ids"]}
    shifted = recorded(labels, reference=False, of=pair)
    assert shifted["token_id"].to_pylist()[1:6] == labels["labels"][0, :-1].tolist()
    assert shifted["nll"].null_count == 0


@pytest.mark.parametrize(("family", "what"), [("vit", "ViTForImageClassification"), ("bert", "BertForMaskedLM")])
def test_a_model_without_next_token_logits_is_refused(family: str, what: str) -> None:
    with pytest.raises(geohooks.PluginError, match=f"'signals' needs next-token logits, but {what} predicts"):
        geohooks.instrument(model(family), ["signals"])


def test_labels_say_where_rows_belong() -> None:
    signals, tuned = Signals(), model()
    rows = torch.stack(texts((5, 5)))
    where = {
        "document": torch.tensor([[7] * 5, [3] * 5]),
        "position": torch.arange(10).reshape(2, 5),
        "counted": torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool(),
        "domain": ["code", "prose"],
    }
    with geohooks.instrument(tuned, [signals]), torch.no_grad(), signals.labelled(**where):
        tuned(rows)
    table = signals.table()
    assert table.select(KEYS).to_pydict() == {
        "document": [3, 3, 7, 7],
        "position": [8, 9, 0, 1],
        "token_id": [*rows[1, 3:].tolist(), *rows[0, :2].tolist()],
        "domain": ["prose", "prose", "code", "code"],
    }


def test_logits_that_are_not_numbers_are_nan_rows_and_not_null() -> None:
    tuned = untrained("llama")
    with torch.no_grad():
        tuned.lm_head.weight[5] = torch.nan
    table = recorded({"input_ids": texts((4,))[0][None]}, reference=False, of=tuned)
    assert table["entropy"].null_count == 0
    assert np.isnan(table["entropy"].to_numpy()).all()
    assert table["nll"].is_null().to_pylist() == [False, False, False, True]


def test_every_column_has_a_unit_and_a_description() -> None:
    for field in recorded({"input_ids": texts((3,))[0][None]}).schema:
        assert set(field.metadata) == {b"unit", b"description"}
        assert field.metadata[b"unit"] in {b"1", b"nats", b"nats^2"}


def test_summary_is_mean_and_spread_by_domain() -> None:
    signals, tuned = Signals(), model("llama")
    rows = torch.stack(texts((5, 5)))
    everything = torch.ones(2, 5)
    with (
        geohooks.instrument(tuned, [signals]) as host,
        torch.no_grad(),
        signals.labelled(
            document=everything.cumsum(0).long(),
            position=everything.cumsum(1).long(),
            counted=everything.bool(),
            domain=["code", "prose"],
        ),  # fmt: skip
    ):
        tuned(rows)
        assert [str(header.header) for header in host.report()["signals"].columns][:3] == ["domain", "signal", "unit"]
    table, summary = signals.table(), signals.summary().to_pylist()
    for row in summary:
        values = table.filter(pa.compute.equal(table["domain"].cast(pa.string()), row["domain"]))[row["signal"]]
        counted = values.drop_null().to_numpy()
        assert row["positions"] == len(counted)
        assert row["mean"] == pytest.approx(counted.mean(), abs=1e-5)
        assert row["spread"] == pytest.approx(counted.std(), abs=1e-5)
    assert {(row["domain"], row["signal"]) for row in summary} >= {("code", "nll"), ("prose", "entropy")}


def test_clear_forgets_and_recording_holds_no_graph() -> None:
    signals, tuned = Signals(), model("llama")
    with geohooks.instrument(tuned, [signals]):
        tuned(texts((4,))[0][None])
        assert not any(value.requires_grad for one in signals._passes for value in one.signals.values())
        signals.clear()
        assert signals.table().num_rows == 0
        tuned(texts((4,))[0][None])
    assert signals.table()["document"].to_pylist() == [0] * 4


def test_labels_that_are_ignored_leave_the_nll_out() -> None:
    ids = texts((5,))[0][None]
    labels = ids.clone()
    labels[:, :3] = -100
    table = recorded({"input_ids": ids, "labels": labels}, reference=False)
    assert table["nll"].is_null().to_pylist() == [True, True, False, False, True]


def test_logits_of_chosen_places_are_refused() -> None:
    with pytest.raises(geohooks.PluginError, match="logits_to_keep"):
        recorded({"input_ids": texts((5,))[0][None], "logits_to_keep": torch.tensor([0, 2])}, reference=False)
