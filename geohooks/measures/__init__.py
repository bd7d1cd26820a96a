"""Pure functions on tensors: no model, no hook, no state."""

from __future__ import annotations

from geohooks.measures.compiled_sums import compiler_available
from geohooks.measures.health import distribution_health, perplexity
from geohooks.measures.logits import LogitComparison, LogitStats, compare_logits, logit_stats
from geohooks.measures.routers import RouterDivergence, RouterStats, router_divergence, router_stats

__all__ = [
    "LogitComparison",
    "LogitStats",
    "RouterDivergence",
    "RouterStats",
    "compare_logits",
    "compiler_available",
    "distribution_health",
    "logit_stats",
    "perplexity",
    "router_divergence",
    "router_stats",
]
