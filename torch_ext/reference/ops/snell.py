"""SNELL (arXiv:2411.01800) in plain torch, with every temporary that the kernels avoid.

``W[i, j] = scale (||A[0, i] - B[0, j]|| - ||A[1, i] - B[1, j]||)``, ``y = x @ phi(W)``. Squares are added coordinate by
coordinate and nothing is contracted, so ``W`` and the threshold have the kernels' bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Sqrt(torch.autograd.Function):
    """Correctly rounded, which Tensor.sqrt (through MKL) is not."""

    @staticmethod
    def forward(ctx: Any, square: Tensor) -> Tensor:
        root = torch.from_numpy(np.sqrt(square.detach().numpy()))
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        gradient: Tensor = grads[0] / (2 * root)
        return gradient


def snell_distance(a: Tensor, b: Tensor) -> Tensor:
    """``||a[i] - b[j]||``, with gradient 0 where it is 0."""
    square = torch.zeros(len(a), len(b), dtype=a.dtype)
    for k in range(a.size(-1)):
        difference = a[:, None, k] - b[None, :, k]
        square = square + difference * difference
    positive = square > 0
    root: Tensor = _Sqrt.apply(torch.where(positive, square, 1))  # type: ignore[no-untyped-call]
    return torch.where(positive, root, 0)


def snell_weight(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The update before sparsification, ``[in_features, out_features]`` (Eq. 4)."""
    return scale * (snell_distance(A[0], B[0]) - snell_distance(A[1], B[1]))


def snell_threshold(W: Tensor, sparsity: float, sparsifier: str = "code") -> Tensor:
    """``"code"``: the linear-interpolated quantile; ``"none"``: 0; else the ceil(sparsity * entries)-th smallest.

    torch.quantile computes the position in W's dtype; here it is a double, so that the number of pruned entries is
    exact for any size. For the same reason an interpolated value that rounds up to the upper neighbour is replaced by
    the lower one.
    """
    ordered = W.abs().flatten().sort().values
    if sparsifier == "code":
        position = sparsity * (len(ordered) - 1)
        low = math.floor(position)
        fraction = torch.tensor(position - low, dtype=W.dtype)
        if fraction == 0:
            return ordered[low]
        t = torch.lerp(ordered[low], ordered[low + 1], fraction)
        return t if t < ordered[low + 1] else ordered[low]
    rank = math.ceil(sparsity * len(ordered))
    return ordered[rank - 1] if sparsifier != "none" and rank > 0 else torch.zeros((), dtype=W.dtype)


def snell_sparsify(W: Tensor, t: Tensor, sparsifier: str = "code", grad: str = "exact") -> Tensor:
    """``phi(W)``; "detached" stops the gradient at the factor next to w and at the threshold."""
    magnitude = W.abs()
    above = magnitude > t
    if grad == "detached":
        t = t.detach()
        factor = magnitude.detach()
    else:
        factor = magnitude
    kept = {
        "code": W * factor,
        "paper": W * (factor - t),
        "hard": W,
        "soft": W.sign() * (magnitude - t),
        "none": W,
    }[sparsifier]
    return kept if sparsifier == "none" else torch.where(above, kept, 0)


def snell_merge(
    A: Tensor, B: Tensor, scale: float, sparsity: float, *, sparsifier: str = "code", grad: str = "detached"
) -> Tensor:
    W = snell_weight(A, B, scale)
    t = snell_threshold(W if grad == "exact" else W.detach(), sparsity, sparsifier)
    if sparsifier == "code":
        t = t.detach()  # it only moves the mask
    return snell_sparsify(W, t, sparsifier, grad)


def snell_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    sparsity: float,
    *,
    sparsifier: str = "code",
    grad: str = "detached",
) -> tuple[Tensor, Tensor]:
    t = snell_threshold(snell_weight(A, B, scale).detach(), sparsity, sparsifier)
    return x @ snell_merge(A, B, scale, sparsity, sparsifier=sparsifier, grad=grad), t
