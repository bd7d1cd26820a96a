"""The columns of the signals table: names, units and descriptions."""

from __future__ import annotations

import re

import pyarrow as pa

__all__ = ["KEYS", "NEXT_TOKEN", "SIGNALS", "field"]

_KEYS = {
    "document": (pa.int64(), "the document's number, unique over the run"),
    "position": (pa.int32(), "the token's place in its document, from 0"),
    "token_id": (pa.int32(), "the token that was read here"),
    "domain": (pa.dictionary(pa.int32(), pa.string()), "the domain of the document"),
}

KEYS = pa.schema(
    pa.field(name, kind, metadata={"unit": "1", "description": description})
    for name, (kind, description) in _KEYS.items()
)

NEXT_TOKEN = frozenset({"nll", "calibration_gap", "calibration_z", "base_nll", "nll_increase"})
"""The signals that say how the token that came next was predicted: null where none is known."""

SIGNALS = {
    "entropy": ("nats", "Shannon entropy H of the next-token distribution"),
    "renyi2": ("nats", "Renyi entropy of order 2, H2 = -log sum p^2"),
    "varentropy": ("nats^2", "varentropy V, the variance of -log p"),
    "residual": ("nats", "R = H2 - (H - V/2)"),
    "top1_probability": ("1", "the largest probability"),
    "margin": ("1", "the largest probability minus the second largest"),
    "nll": ("nats", "-log p of the token that came next"),
    "calibration_gap": ("nats", "NLL minus entropy"),
    "calibration_z": ("1", "calibration gap over sqrt(V)"),
    "forward_kl": ("nats", "KL(base || tuned)"),
    "reverse_kl": ("nats", "KL(tuned || base)"),
    "jensen_shannon": ("nats", "Jensen-Shannon divergence of tuned and base"),
    "entropy_change": ("nats", "entropy, tuned minus base"),
    "renyi2_change": ("nats", "Renyi-2 entropy, tuned minus base"),
    "varentropy_change": ("nats^2", "varentropy, tuned minus base"),
    "residual_change": ("nats", "residual, tuned minus base"),
    "top1_agreement": ("1", "1 where tuned and base have the same likeliest token, else 0"),
    "base_entropy": ("nats", "Shannon entropy of the base's distribution"),
    "base_nll": ("nats", "-log p of the token that came next, under the base"),
    "base_varentropy": ("nats^2", "varentropy of the base's distribution"),
    "base_renyi2": ("nats", "Renyi-2 entropy of the base's distribution"),
    "nll_increase": ("nats", "NLL, tuned minus base"),
    "router_drift": ("1", "mean over layers of the Jaccard distance of the chosen experts, tuned to base"),
}

_ROUTER = {
    "entropy": ("nats", "Shannon entropy of the router's distribution in layer {}"),
    "top_mass": ("1", "probability on the chosen experts in layer {}"),
    "margin": ("1", "lowest chosen score minus highest eligible score not chosen in layer {}"),
    "jaccard": ("1", "Jaccard distance of the chosen experts, tuned to base, in layer {}"),
}


def field(name: str) -> pa.Field:
    """The field of the signal called `name`, with its unit and description."""
    if router := re.fullmatch(r"router\.(\d+)\.(\w+)", name):
        unit, description = _ROUTER[router[2]]
        description = description.format(router[1])
    else:
        unit, description = SIGNALS[name]
    return pa.field(name, pa.float32(), metadata={"unit": unit, "description": description})
