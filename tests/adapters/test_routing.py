"""Routers give back their own choice, and other logits are lasting by the family's own rule."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import geohooks_structural
from geohooks.errors import AdapterError

MIXTURES = (
    "qwen3_moe",
    "qwen3_moe_unnormalised",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "qwen2_moe",
)


def hidden_states(seed, tokens=7, width=32):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def chosen_sets(indices):
    return [set(row) for row in indices.tolist()]


@pytest.mark.parametrize("name", MIXTURES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 5))
def test_scores_give_back_the_routers_own_choice(lasting, name, seed, scale):
    found = lasting(name)
    block = found.block()
    decision = found.adapter.routing(block, block.experts.router(scale * hidden_states(seed)))
    scores = found.adapter.scores(block, decision.logits)
    top = scores.topk(block.experts.chosen)
    assert scores.dtype == torch.float32
    assert top.values.isfinite().all()
    assert chosen_sets(top.indices) == chosen_sets(decision.indices)


@pytest.mark.parametrize("name", MIXTURES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_routing_the_routers_own_logits_changes_no_bit(lasting, name, seed):
    found = lasting(name)
    block = found.block()
    hidden = hidden_states(seed)
    own = block.experts.router(hidden)
    again = found.adapter.route(block, hidden, own[0])
    assert all(torch.equal(one, other) for one, other in zip(own, again, strict=True))


@pytest.mark.parametrize("name", MIXTURES)
def test_routing_in_half_precision_keeps_bits_and_dtypes(subject, name):
    found = subject(name)
    found.model.bfloat16()
    block = found.block()
    hidden = hidden_states(3).bfloat16()
    own = block.experts.router(hidden)
    again = found.adapter.route(block, hidden, own[0])
    assert [item.dtype for item in own] == [item.dtype for item in again]
    assert all(torch.equal(one, other) for one, other in zip(own, again, strict=True))


@pytest.mark.parametrize("name", MIXTURES)
def test_rerouting_is_what_another_router_would_have_done(subject, heard, name):
    """Other logits through the same router, against a router whose own weights give these logits."""
    found = subject(name)
    other = copy.deepcopy(found)
    block = found.block()
    twin = other.model.get_submodule(
        next(path for path, module in found.model.named_modules() if module is block.experts.router)
    )
    with torch.no_grad():
        twin.weight.copy_(torch.randn(twin.weight.shape, generator=torch.Generator().manual_seed(5)))
    expected = other.run()
    taps = {"hidden": type(block.taps["router"])(block.experts.router, "input")}
    with heard(taps) as before:
        plain = found.run()
    logits = found.adapter.routing(other.block(), twin(before["hidden"])).logits

    def reroute(site, output):
        return found.adapter.route(block, before["hidden"], logits)

    site = next(site for site in block.sites() if site.kind == "router")
    with heard({site: block.taps["router"]}, reroute):
        rerouted = found.run()
    assert not torch.allclose(rerouted, plain)
    torch.testing.assert_close(rerouted, expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_weights_carry_gradients_to_the_logits(lasting, name):
    found = lasting(name)
    block = found.block()
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    decision = found.adapter.routing(block, found.adapter.route(block, hidden_states(0, 5), logits))
    slopes = torch.arange(1.0, 1 + decision.weights.shape[-1])
    (gradient,) = torch.autograd.grad((decision.weights * slopes).sum(), logits)
    assert (gradient.abs().amax(-1) > 0).all()


def test_routing_calls_no_hook_and_leaves_logits_alone(lasting):
    found = lasting("deepseek_v3")
    block = found.block()
    called = []
    handle = block.experts.router.register_forward_hook(lambda *_: called.append(1))
    logits = torch.randn(5, 8)
    before = logits.clone()
    found.adapter.route(block, hidden_states(0, 5), logits)
    found.adapter.scores(block, logits)
    found.adapter.probabilities(block, logits)
    handle.remove()
    assert not called
    assert torch.equal(logits, before)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_deepseek_v3_chooses_as_by_hand(lasting, seed):
    """Group-limited choice in plain Python: the two best of each group vote, the best groups' experts compete."""
    found = lasting("deepseek_v3")
    block = found.block()
    router = block.experts.router
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    decision = found.adapter.routing(block, found.adapter.route(block, hidden_states(0, 4), logits))
    scores = found.adapter.scores(block, logits)
    for row, bias in ((row, router.e_score_correction_bias.tolist()) for row in range(4)):
        affinity = logits[row].sigmoid().tolist()
        corrected = [a + b for a, b in zip(affinity, bias, strict=True)]
        groups = [range(start, start + 2) for start in range(0, 8, 2)]
        ranked = sorted(groups, key=lambda group: -sum(corrected[expert] for expert in group))
        eligible = sorted(expert for group in ranked[:2] for expert in group)
        best = sorted(eligible, key=lambda expert: -corrected[expert])[:3]
        assert set(decision.indices[row].tolist()) == set(best)
        assert [expert for expert in range(8) if scores[row, expert].isfinite()] == eligible
        total = sum(affinity[expert] for expert in best)
        for expert, weight in zip(decision.indices[row].tolist(), decision.weights[row].tolist(), strict=True):
            assert weight == pytest.approx(affinity[expert] / total * router.routed_scaling_factor, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("qwen3_moe", torch.softmax),
        ("mixtral", torch.softmax),
        ("gpt_oss", torch.softmax),
        ("deepseek_v2", torch.softmax),
        ("deepseek_v3", lambda logits, _: logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)),
        ("glm4_moe", lambda logits, _: logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)),
    ],
)
def test_probabilities_are_the_gates_and_sum_to_one(lasting, name, gate):
    found = lasting(name)
    logits = 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    probabilities = found.adapter.probabilities(found.block(), logits)
    torch.testing.assert_close(probabilities, gate(logits, -1))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5))


def test_masked_experts_are_never_eligible(lasting):
    """DeepSeek V2 masks with 0, which an eligible expert's softmax may underflow to."""
    found = lasting("deepseek_v2")
    logits = torch.full((1, 8), -300.0)
    logits[0, 0] = 300
    scores = found.adapter.scores(found.block(), logits)
    assert scores.isinf().sum() == 4
    assert scores[0, :2].tolist() == [1, 0]


def test_what_is_no_router_is_refused_by_name(lasting):
    dense = lasting("qwen3_moe_unnormalised")
    with pytest.raises(AdapterError, match=r"decoder\.0 .*no experts"):
        dense.adapter.routing(dense.block(0), ())
    found = lasting("qwen3_moe")
    with pytest.raises(AdapterError, match=r"TopKRouter returned torch.float32 \[2, 8\]; looked for"):
        found.adapter.routing(found.block(), torch.zeros(2, 8))


def test_a_router_without_a_linear_product_is_refused_by_name(subject):
    found = subject("mixtral")

    class Hashed(MixtralTopKRouter):
        def __init__(self):
            super().__init__(found.model.config)

        def forward(self, hidden):
            return hidden[:, :8], hidden[:, :2], torch.zeros(len(hidden), 2, dtype=torch.long)

    found.model.model.layers[-1].mlp.gate = Hashed()
    anatomy = geohooks_structural.Structural().anatomy(found.model)
    with pytest.raises(AdapterError, match="Hashed makes no linear product"):
        anatomy.adapter.scores(anatomy.main.blocks[-1], torch.zeros(2, 8))


@pytest.mark.parametrize("name", MIXTURES)
def test_routing_under_autocast_changes_no_bit(lasting, name):
    found = lasting(name)
    block = found.block()
    with torch.autocast("cpu", torch.bfloat16):
        own = block.experts.router(hidden_states(4))
        again = found.adapter.route(block, hidden_states(4), own[0])
    assert [item.dtype for item in own] == [item.dtype for item in again]
    assert all(torch.equal(one, other) for one, other in zip(own, again, strict=True))


def test_rerouting_is_compiled_without_a_break(subject):
    found = subject("deepseek_v3")
    block = found.block()
    scores = []

    def turn_round(router, args, output):
        scores.append(found.adapter.scores(block, output[0]))
        return found.adapter.route(block, args[0], -output[0])

    block.experts.router.register_forward_hook(turn_round)
    eager = found.run()
    with torch.no_grad():
        compiled = torch.compile(found.model, backend="eager", fullgraph=True)(**found.inputs).logits
    assert torch.equal(eager, compiled)
    assert torch.equal(*scores)


def test_a_router_that_changes_its_logits_in_place_leaves_the_callers_alone(subject):
    class Sharpened(MixtralTopKRouter):
        def forward(self, hidden):
            logits = torch.nn.functional.linear(hidden, self.weight).mul_(3)
            weights, indices = logits.softmax(-1).topk(self.top_k)
            return logits, weights, indices

    found = subject("mixtral")
    found.model.model.layers[-1].mlp.gate = Sharpened(found.model.config)
    block = found.adapter.anatomy(found.model).main.blocks[-1]
    logits = torch.randn(3, 8, requires_grad=True)
    before = logits.detach().clone()
    output = found.adapter.route(block, hidden_states(0, 3), logits)
    torch.testing.assert_close(output[0], 3 * before)
    assert torch.equal(logits, before)
    (gradient,) = torch.autograd.grad(output[0].sum(), logits)
    assert torch.equal(gradient, torch.full_like(gradient, 3))
