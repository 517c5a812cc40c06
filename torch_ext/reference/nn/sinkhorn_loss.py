"""Entropic transport between point clouds, on the stored cost matrix."""

from __future__ import annotations

from torch import Tensor

from torch_ext.reference.ops.sinkhorn_newton import sinkhorn_newton


def sinkhorn_loss(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float, *, debias: bool = False) -> Tensor:
    """V(x, y) for C_ij = |x_i - y_j|^2 / 2; with debias V(x, y) - V(x, x) / 2 - V(y, y) / 2 (arXiv:1810.08278)."""

    def value(p: Tensor, q: Tensor, wp: Tensor, wq: Tensor) -> Tensor:
        cost = 0.5 * (p[:, None, :] - q[None, :, :]).square().sum(-1)
        return sinkhorn_newton(cost, wp, wq, eps)[0]

    across = value(x, y, a, b)
    return across - 0.5 * (value(x, x, a, a) + value(y, y, b, b)) if debias else across
