"""What a router event says is what the router decided, and edits of it re-route."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import logits_of, same

import geohooks
from geohooks import Plugin, Site, hookimpl, zoo

FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"]
CHOSEN = {"deepseek_v3": 3}


@cache
def subject(family):
    model = zoo.untrained(family)
    return model, zoo.example_inputs(model)


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


class Routes(Plugin):
    """Looks at every router event with `look`."""

    name = "routes"

    def __init__(self, look, sites="*.*.router"):
        self.look = look
        self.wanted = sites
        self.seen = {}

    @hookimpl
    def sites(self):
        return self.wanted

    @hookimpl
    def on_router(self, event):
        self.seen[str(event.site)] = self.look(event)


def decisions(family):
    """What the modules themselves return, and what the experts are called with, by layer."""
    model, inputs = subject(family)
    anatomy = geohooks.instrument(model).anatomy
    outputs, handles = {}, []
    for block in anatomy.main.blocks:
        if block.experts is not None:
            site = f"decoder.{block.layer}.router"
            handles += [
                block.experts.router.register_forward_hook(
                    lambda module, args, output, site=site: outputs.setdefault(site, {}).update(router=output)
                ),
                block.experts.module.register_forward_pre_hook(
                    lambda module, args, kwargs, site=site: outputs.setdefault(site, {}).update(
                        experts=(*args, *kwargs.values())
                    ),
                    with_kwargs=True,
                ),
            ]
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_an_event_says_what_the_experts_are_given(family):
    model, inputs = subject(family)
    own = decisions(family)
    routes = Routes(lambda e: (e.value, e.indices, e.weights, e.scores, e.probabilities, e.positions))
    bare = run(model, inputs)
    with geohooks.instrument(model, [routes]):
        assert same(run(model, inputs), bare)
    assert routes.seen.keys() == own.keys()
    chosen = CHOSEN.get(family, 2)
    for site, (value, indices, weights, scores, probabilities, positions) in routes.seen.items():
        _, used, given = own[site]["experts"]
        assert value.shape == scores.shape == probabilities.shape == (2, 8, 8)
        assert torch.equal(indices.flatten(0, 1), used)
        assert torch.equal(weights.flatten(0, 1), given.to(weights.dtype))
        assert indices.shape == weights.shape == (2, 8, chosen)
        assert same(value.flatten(0, 1), own[site]["router"][0].reshape(16, 8))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 8))
        assert torch.equal(scores.topk(chosen, -1).indices.sort(-1).values, indices.sort(-1).values)
        assert positions.tolist() == [list(range(8))] * 2


def test_groups_that_were_not_chosen_have_no_score():
    model, inputs = subject("deepseek_v3")
    routes = Routes(lambda event: event.scores)
    with geohooks.instrument(model, [routes]):
        run(model, inputs)
    for scores in routes.seen.values():
        # Two of four groups of two experts are eligible.
        assert (scores.isinf().sum(-1) == 4).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_an_event_follows_an_edit(family):
    model, inputs = subject(family)
    site = Site("decoder", 1, "router")
    expert = 6

    def favour(event):
        before = event.indices
        event.value = event.value.index_fill(-1, torch.tensor([expert]), 50.0)
        return before, event.indices, event.weights, event.probabilities, event.scores

    routes = Routes(favour, [site])
    with geohooks.instrument(model, [routes]):
        edited = run(model, inputs)
    assert not same(edited, run(model, inputs))
    before, indices, weights, probabilities, scores = routes.seen[str(site)]
    assert not (before == expert).any(-1).all()
    assert (indices == expert).any(-1).all()
    assert weights.isfinite().all()
    assert scores[..., expert].isfinite().all()
    assert (probabilities.argmax(-1) == expert).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_permuted_logits_choose_permuted_experts(data):
    family = data.draw(st.sampled_from(["qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss"]))
    order = torch.tensor(data.draw(st.permutations(range(8))))
    model, inputs = subject(family)

    def permute(event):
        before = event.indices, event.weights
        event.value = event.value[..., order]
        return *before, event.indices, event.weights

    routes = Routes(permute, ["decoder.0.router"])
    with geohooks.instrument(model, [routes]):
        run(model, inputs)
    indices, weights, after, new_weights = routes.seen["decoder.0.router"]
    torch.testing.assert_close(order[after].sort(-1).values, indices.sort(-1).values)
    torch.testing.assert_close(new_weights.sort(-1).values, weights.sort(-1).values)


def test_two_edits_follow_each_other():
    model, inputs = subject("qwen3_moe")

    def plus(event):
        event.value = event.value + torch.arange(8.0)

    def minus(event):
        event.value = event.value - torch.arange(8.0)

    first, second, once = (Routes(change) for change in (plus, minus, lambda event: event.indices))
    first.name, second.name, once.name = "first", "second", "once"
    with geohooks.instrument(model, [first, second, once]):
        there_and_back = run(model, inputs)
    torch.testing.assert_close(there_and_back, run(model, inputs), rtol=1e-4, atol=1e-4)


def test_only_layers_with_experts_are_heard():
    model = zoo.untrained("qwen3_moe", mlp_only_layers=[0])
    routes = Routes(lambda event: event.site.layer)
    with geohooks.instrument(model, [routes]):
        run(model, zoo.example_inputs(model))
    assert routes.seen == {"decoder.1.router": 1}


def test_a_router_in_half_precision_can_be_edited():
    model = zoo.untrained("qwen3_moe").to(torch.bfloat16)
    inputs = zoo.example_inputs(model)

    def flip(event):
        event.value = -event.value
        return event.indices

    with geohooks.instrument(model, [Routes(flip)]):
        assert run(model, inputs).isfinite().all()


def test_one_token_and_one_row():
    model, _ = subject("qwen3_moe")
    routes = Routes(lambda event: (event.value.shape, event.indices.shape))
    with geohooks.instrument(model, [routes]):
        run(model, {"input_ids": torch.tensor([[5]])})
    assert routes.seen["decoder.0.router"] == ((1, 1, 8), (1, 1, 2))
