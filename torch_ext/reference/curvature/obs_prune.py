"""Optimal-Brain-Surgeon pruning from a dense Fisher matrix (arXiv:2107.03356, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def obs_prune(
    w: Tensor, fisher: Tensor, sparsity: float, *, mask: Tensor | None = None, update: str = "joint"
) -> tuple[Tensor, Tensor, Tensor]:
    """(w, mask, predicted loss increase) for one flat weight [d] and a dense ``F`` [d, d].

    ``F^-1`` is that of F restricted to the weights which ``mask`` (True = kept) keeps. Several layers are one flat
    weight with a block-diagonal F.
    """
    w, f = w.double().clone(), fisher.double()
    d = w.numel()
    before = torch.ones(d, dtype=torch.bool) if mask is None else mask
    w[~before] = 0
    alive = before.nonzero().flatten()
    inverse = torch.linalg.inv(f[alive][:, alive])
    scores = w[alive] ** 2 / (2 * inverse.diagonal())
    count = round(sparsity * d) - int((~before).sum())
    order = torch.argsort(scores, stable=True)[:count]  # positions among the alive

    delta = torch.zeros(d, dtype=torch.float64)
    w_s = w[alive][order]
    if update == "joint":
        delta[alive] = -inverse[:, order] @ torch.linalg.solve(inverse[order][:, order], w_s)
    else:
        delta[alive] = -inverse[:, order] @ (w_s / inverse.diagonal()[order])
    after = before.clone()
    after[alive[order]] = False
    delta[alive[order]] = -w_s
    pruned = w + delta
    pruned[~after] = 0
    return pruned, after, 0.5 * delta @ f @ delta


def sparsity_schedule(sparsity: float, recomputations: int, *, initial: float = 0.0) -> list[float]:
    """``1 - kept_j`` with ``kept_j = (1 - s0) ((1 - s) / (1 - s0))^(j / n)``, j = 1 ... n."""
    kept = 1 - initial
    return [1 - kept * ((1 - sparsity) / kept) ** (j / recomputations) for j in range(1, recomputations + 1)]
