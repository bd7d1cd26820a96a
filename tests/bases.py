"""Pairs of base and tuned models, adapted models, and a plugin that asks for the base's answer."""

from __future__ import annotations

from functools import cache

import peft
import torch
from recorders import logits_of

from geohooks import Plugin, hookimpl, zoo


@cache
def pair(family):
    """A base and another model of the family that stands for the tuned one."""
    base, tuned = zoo.untrained(family), zoo.untrained(family, seed=1)
    for model in (base, tuned):
        if hasattr(model, "generation_config"):
            model.generation_config.eos_token_id = None
    return base, tuned, zoo.example_inputs(base)


def adapted(family="llama", **options):
    """A PEFT model whose adapter says something."""
    base = zoo.untrained(family)
    if family != "vit":
        base.generation_config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = {"t5": ["q", "v"], "vit": ["q_proj"]}.get(family, ["q_proj", "v_proj"])
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
        return peft.get_peft_model(base, config).eval()


class Asks(Plugin):
    """Asks for the base's logits in every call."""

    name = "asks"

    def __init__(self):
        self.tuned = []
        self.base = []
        self.positions = []

    @hookimpl
    def on_logits(self, event):
        self.tuned.append(event.value.detach().clone())
        self.base.append(event.call.reference)
        self.positions.append(event.positions)


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))
