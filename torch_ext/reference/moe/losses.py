"""Auxiliary losses of mixtures of experts, in loops over sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ext.reference.moe.route import scores_of


def balance_loss(logits: Tensor, counts: Tensor, coef: float, score: str, valid: Tensor | None = None) -> Tensor:
    """arXiv:2101.03961, Eq. 4, with ``f`` from any counts."""
    rows = logits if valid is None else logits[valid]
    scores = scores_of(rows, score)
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return coef * logits.size(1) * (counts.to(share.dtype) / counts.sum() * share).sum()


def sequence_loss(logits: Tensor, top_k: int, alpha: float, score: str, valid: Tensor | None = None) -> Tensor:
    """arXiv:2412.19437, Eq. 17 to 20."""
    losses = []
    for i, sequence in enumerate(logits):
        rows = sequence if valid is None else sequence[valid[i]]
        if len(rows) == 0:
            continue
        scores = scores_of(rows, score)
        picked = torch.zeros_like(scores).scatter(1, scores.topk(top_k, 1).indices, 1.0).detach()
        f = picked.sum(0) * logits.size(2) / (top_k * len(rows))
        losses.append((f * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum())
    return alpha * torch.stack(losses).mean()


def z_loss(logits: Tensor, coef: float, valid: Tensor | None = None) -> Tensor:
    """arXiv:2202.08906, Eq. 5."""
    rows = logits if valid is None else logits[valid]
    return coef * torch.logsumexp(rows, -1).square().mean()
