"""Routing of a mixture of experts (arXiv:2408.15664, arXiv:2412.19437), one full sort per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """As ``torch_ext.moe.RouteResult``, and the scores and keys of all experts."""

    gates: Tensor
    ids: Tensor
    counts: Tensor
    cutoff: Tensor
    scores: Tensor
    keys: Tensor


def scores_of(logits: Tensor, score: str) -> Tensor:
    if score == "sigmoid":
        return torch.sigmoid(logits)
    if score == "softmax":
        return torch.softmax(logits, -1)
    if score == "sqrtsoftplus":
        return torch.sqrt(torch.clamp(logits, min=0) + torch.log1p(torch.exp(-logits.abs())))
    return logits  # "none", "post_softmax"


def group_scores(keys: Tensor, num_groups: int, group_score_k: int) -> Tensor:
    """``[T, G]``: the sum of the largest keys of each block of experts."""
    blocks = keys.view(len(keys), num_groups, -1)
    return blocks.sort(-1, descending=True).values[..., :group_score_k].sum(-1)


def ordered(keys: Tensor) -> Tensor:
    """Indices from the largest key on; equal keys by index, NaN as minus infinity."""
    return torch.where(keys.isnan(), -torch.inf, keys).sort(stable=True, dim=-1, descending=True).indices


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int = 2,
    score: str = "sigmoid",
    normalize: bool = True,
    route_scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score_k: int = 2,
    nan_policy: str = "propagate",
    valid: Tensor | None = None,
) -> Routed:
    """Differentiable in ``logits`` by autograd, in the dtype of the logits."""
    tokens, experts = logits.shape
    scores = scores_of(logits, score)
    keys = scores.detach() if bias is None else scores.detach() + bias.to(scores.dtype)
    order = ordered(keys)
    if num_groups > 1:
        best = ordered(group_scores(torch.where(keys.isnan(), -torch.inf, keys), num_groups, group_score_k))
        keep = torch.zeros(tokens, num_groups, dtype=torch.bool).scatter(1, best[:, :top_groups], True)
        kept = keep.repeat_interleave(experts // num_groups, 1)
        # Stable: the kept experts first, each part in its order. Minus infinity would let an expert of another group
        # in beside a NaN.
        order = order.gather(1, kept.gather(1, order).long().sort(stable=True, dim=1, descending=True).indices)
    ids = order[:, :top_k]
    selected = scores.gather(1, ids)
    softmax_of_selected = score == "post_softmax" or (score == "softmax" and normalize and top_k > 1)
    if softmax_of_selected:
        selected = logits.gather(1, ids)
        gates = torch.softmax(selected, -1)
    elif normalize and top_k > 1:
        gates = selected / (selected.sum(-1, keepdim=True) + 1e-20)
    else:
        gates = selected
    infinite = selected.max(-1).values.isinf() if softmax_of_selected else selected.isinf().any(-1)
    bad = (scores.isnan().any(-1) | infinite).unsqueeze(-1)
    gates = torch.where(bad, 0.0 if nan_policy == "zero" else torch.nan, route_scale * gates)
    real = torch.ones(tokens, dtype=torch.bool) if valid is None else valid
    counts = torch.bincount(ids[real].flatten(), minlength=experts).int()
    cutoff = keys.gather(1, order[:, top_k : top_k + 1]).squeeze(1)
    gates = torch.where(real.unsqueeze(-1), gates, 0)
    return Routed(gates, torch.where(real.unsqueeze(-1), ids, -1).int(), counts, cutoff, scores, keys)
