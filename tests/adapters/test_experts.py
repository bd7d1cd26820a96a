"""What single experts answer, and that their weighted sum is the mixture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geohooks.errors import AdapterError

MIXTURES = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MIXTURES)
def test_weighted_experts_and_the_shared_one_are_the_mixture(subject, name, implementation):
    found = subject(name)
    found.model.set_experts_implementation(implementation)
    block = found.block()
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    decision = found.adapter.routing(block, block.experts.router(hidden))
    answers = found.adapter.expert_outputs(block, hidden, decision.indices)
    mixture = (decision.weights[..., None] * answers).sum(1)
    if block.experts.shared is not None:
        gate = 1 if block.experts.shared_gate is None else block.experts.shared_gate(hidden).sigmoid()
        mixture = mixture + gate * block.experts.shared(hidden)
    output = block.mlp(hidden[None])
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(mixture, output[0] if output.dim() == 3 else output)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral", "qwen2_moe"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 8))
def test_any_expert_answers_as_its_weights_say(lasting, name, seed, count):
    found = lasting(name)
    block = found.block()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 32, generator=generator)
    experts = torch.randint(8, (4, count), generator=generator)
    answers = found.adapter.expert_outputs(block, hidden, experts)
    assert answers.shape == (4, count, 32)
    for token in range(4):
        for slot, expert in enumerate(experts[token].tolist()):
            gate, up, down = (found.adapter.expert_weight(block, expert, role) for role in ("gate", "up", "down"))
            inner = torch.nn.functional.silu(gate @ hidden[token]) * (up @ hidden[token])
            torch.testing.assert_close(answers[token, slot], down @ inner)


def test_transposed_and_interleaved_experts_are_taken_apart(subject):
    """gpt_oss stores its matrices [in, out], gate and up alternating, and adds biases."""
    found = subject("gpt_oss")
    block = found.block()
    module = block.experts.module
    hidden = torch.randn(32, generator=torch.Generator().manual_seed(0))
    gate, up = (found.adapter.expert_weight(block, 3, role) @ hidden for role in ("gate", "up"))
    fused = hidden @ module.gate_up_proj[3]
    torch.testing.assert_close(torch.stack([gate, up], -1).flatten(), fused)
    down = found.adapter.expert_weight(block, 3, "down")
    torch.testing.assert_close(down @ gate, gate @ module.down_proj[3])


@pytest.mark.parametrize("experts", [[[8]], [[-1]], [[0, 8]]])
def test_an_expert_that_does_not_exist_is_refused(subject, experts):
    found = subject("qwen3_moe")
    with pytest.raises(AdapterError, match=r"decoder\.1 has 0 to 7"):
        found.adapter.expert_outputs(found.block(), torch.zeros(1, 32), torch.tensor(experts))
    with pytest.raises(AdapterError, match="experts 0 to 7, not 8"):
        found.adapter.expert_weight(found.block(), 8, "up")


def test_expert_weights_have_no_other_roles(subject):
    found = subject("qwen3_moe")
    with pytest.raises(AdapterError, match="no weight 'q'; they have gate, up and down"):
        found.adapter.expert_weight(found.block(), 0, "q")


def test_no_tokens_are_no_answers(subject):
    found = subject("qwen3_moe")
    nothing = torch.empty(0, 2, dtype=torch.long)
    assert found.adapter.expert_outputs(found.block(), torch.empty(0, 32), nothing).shape == (0, 2, 32)
