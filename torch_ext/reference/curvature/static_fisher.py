"""The damped empirical Fisher matrix of m gradients and its inverse, dense, and by the published recursion.

``F = damping I + (1/m) sum_i g_i g_i^T`` in diagonal blocks of consecutive columns (M-FAC, arXiv:2107.03356, section
3.1). Everything in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fisher(gradients: Tensor, damping: float, block: int | None = None) -> Tensor:
    """``F`` [d, d] with zeros outside the diagonal blocks."""
    g = gradients.double()
    m, d = g.shape
    full = g.T @ g / m + damping * torch.eye(d, dtype=torch.float64)
    if block is None:
        return full
    number = torch.arange(d) // block
    return torch.where(number[:, None] == number[None, :], full, 0.0)


def inverse(gradients: Tensor, damping: float, block: int | None = None) -> Tensor:
    """``F^-1`` [d, d]."""
    inverse: Tensor = torch.linalg.inv(fisher(gradients, damping, block))
    return inverse


def recursion(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The published recursion for one block: ``(h [m, d], n [m])`` with ``F^-1 = I / damping - sum_i h_i h_i^T / n_i``.

    ``h_i = F_{i-1}^-1 g_i`` for the Fisher matrix of the first i - 1 gradients, ``n_i = m + g_i . h_i``.
    """
    g = gradients.double()
    m = g.shape[0]
    h, n = torch.zeros_like(g), torch.zeros(m, dtype=torch.float64)
    for i in range(m):  # all m of them; the authors' program stops before the last
        h[i] = g[i] / damping - ((h[:i] @ g[i]) / n[:i]) @ h[:i]
        n[i] = m + g[i] @ h[i]
    return h, n


def whitened_rows(gradients: Tensor, damping: float) -> Tensor:
    """``W = L^-1 G`` for one block, with ``L L^T = m damping I + G G^T``; then ``F^-1 = (I - W^T W) / damping``."""
    g = gradients.double()
    m = g.shape[0]
    factor = torch.linalg.cholesky(g @ g.T + m * damping * torch.eye(m, dtype=torch.float64))
    rows: Tensor = torch.linalg.solve_triangular(factor, g, upper=False)
    return rows
