"""Names of places, and selectors over them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geohooks import SelectorError, Site
from geohooks.sites import BLOCK_KINDS, STACK_KINDS, select

STACKS = ("decoder", "encoder", "vision", "text")


def sites_of(depths):
    found = []
    for stack, depth in depths.items():
        found.append(Site(stack, None, "embedding"))
        found += [Site(stack, layer, kind) for layer in range(depth) for kind in BLOCK_KINDS]
        found.append(Site(stack, None, "final_norm"))
    return (*found, Site(None, None, "logits"))


MODELS = st.dictionaries(st.sampled_from(STACKS), st.integers(1, 6), min_size=1, max_size=3)
BOUND = st.one_of(st.none(), st.integers(-8, 8))


def text(bound):
    return "" if bound is None else str(bound)


@settings(deadline=None, max_examples=40)
@given(MODELS, st.data())
def test_a_name_is_read_back(depths, data):
    for site in data.draw(st.lists(st.sampled_from(sites_of(depths)), min_size=1, max_size=5)):
        assert Site.parse(str(site)) == site
        assert select(str(site), sites_of(depths)) == (site,)
        assert select(site, sites_of(depths)) == (site,)


@settings(deadline=None, max_examples=40)
@given(MODELS, st.data())
def test_a_slice_is_the_slice_of_a_list(depths, data):
    stack = data.draw(st.sampled_from(sorted(depths)))
    start, stop = data.draw(BOUND), data.draw(BOUND)
    step = data.draw(st.one_of(st.none(), st.sampled_from([-3, -1, 1, 2, 5])))
    selector = f"{stack}.[{text(start)}:{text(stop)}" + ("" if step is None else f":{step}") + "].output"
    wanted = sorted(range(depths[stack])[start:stop:step])
    if wanted:
        assert [site.layer for site in select(selector, sites_of(depths))] == wanted
    else:
        with pytest.raises(SelectorError, match="matches no site"):
            select(selector, sites_of(depths))


@settings(deadline=None, max_examples=40)
@given(MODELS, st.data())
def test_a_negative_layer_counts_from_the_end(depths, data):
    stack = data.draw(st.sampled_from(sorted(depths)))
    layer = data.draw(st.integers(-depths[stack], -1))
    assert select(f"{stack}.{layer}.mlp", sites_of(depths)) == (Site(stack, range(depths[stack])[layer], "mlp"),)


@settings(deadline=None, max_examples=40)
@given(MODELS)
def test_stars(depths):
    every = sites_of(depths)
    assert select("*", every) == every
    assert select("*.*.*", every) == tuple(site for site in every if site.layer is not None)
    assert select("*.*", every) == tuple(site for site in every if site.kind in STACK_KINDS)
    assert select("*.*.router", every) == tuple(site for site in every if site.kind == "router")


@settings(deadline=None, max_examples=40)
@given(MODELS, st.data())
def test_selectors_are_a_union_in_the_order_of_the_model(depths, data):
    every = sites_of(depths)
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=8))
    mixed = [data.draw(st.sampled_from([site, str(site)])) for site in chosen]
    assert select(mixed, every) == tuple(site for site in every if site in chosen)
    assert select(iter(mixed), every) == select(mixed, every)
    assert select([], every) == ()


@pytest.mark.parametrize(
    "selector",
    ["", "decoder", "decoder.9.output", "decoder.-3.output", "decoder.0", "encoder.0.output", "decoder.0.output.x",
     "decoder..output", "decoder.[0].output", "decoder.[a:b].output", "decoder.1.5.output", "Decoder.0.output",
     "decoder.0.embedding", "decoder.embedding.0", " decoder.0.output", "**", "decoder.[0:0].mlp"],
)  # fmt: skip
def test_what_matches_nothing_names_what_there_is(selector):
    with pytest.raises(SelectorError) as caught:
        select(selector, sites_of({"decoder": 2}))
    message = str(caught.value)
    assert f"'{selector}' matches no site" in message
    assert "decoder (2 layers)" in message
    assert any(str(site) in message for site in sites_of({"decoder": 2}))


def test_the_nearest_is_named():
    with pytest.raises(SelectorError, match=r"nearest are decoder\.1\.output"):
        select("decoder.1.outptu", sites_of({"decoder": 2}))


def test_one_wrong_selector_among_right_ones_is_an_error():
    with pytest.raises(SelectorError, match=r"'decoder\.5\.output'"):
        select(["decoder.0.output", "decoder.5.output"], sites_of({"decoder": 2}))


@pytest.mark.parametrize("selector", [3, None, b"logits", ["logits"]])
def test_what_is_no_selector_is_an_error(selector):
    with pytest.raises(SelectorError, match="is not a selector"):
        select([selector], sites_of({"decoder": 2}))


def test_a_step_of_nothing_is_an_error():
    with pytest.raises(SelectorError, match="step of 0"):
        select("decoder.[::0].output", sites_of({"decoder": 2}))


@pytest.mark.parametrize(
    "name", ["", "decoder.*.output", "decoder.-1.output", "decoder.output", "a.b.c.d", "decoder.[0:1].mlp", "two words"]
)
def test_a_selector_is_no_name(name):
    with pytest.raises(SelectorError, match="not the name of one site"):
        Site.parse(name)


def test_a_model_without_stacks_says_so():
    with pytest.raises(SelectorError, match="nearest are none; its stacks are none"):
        select("decoder.0.output", ())
