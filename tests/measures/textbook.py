"""The formulas as a textbook prints them, on whole tensors with plain autograd: the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def statistics(logits: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    surprise = -log_p.masked_fill(p == 0, 0)
    entropy = (p * surprise).sum(-1)
    varentropy = (p * (surprise - entropy[..., None]) ** 2).sum(-1)
    renyi2 = -(p * p).sum(-1).log()
    top = p.topk(2, -1).values
    found = {
        "entropy": entropy,
        "renyi2": renyi2,
        "varentropy": varentropy,
        "residual": renyi2 - entropy + varentropy / 2,
        "top1_probability": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
    }
    if targets is not None:
        nll = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none").view(
            targets.shape
        )
        found |= {"nll": nll, "calibration_gap": nll - entropy, "calibration_z": (nll - entropy) / varentropy.sqrt()}
    return found


def divergences(tuned: Tensor, base: Tensor) -> dict[str, Tensor]:
    log_q, log_p = tuned.log_softmax(-1), base.log_softmax(-1)
    mixture = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0, dtype=log_q.dtype))

    def divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    return {
        "forward_kl": divergence(log_p, log_q),
        "reverse_kl": divergence(log_q, log_p),
        "jensen_shannon": (divergence(log_p, mixture) + divergence(log_q, mixture)) / 2,
    }
