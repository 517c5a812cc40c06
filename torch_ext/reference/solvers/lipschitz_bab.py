"""Branch and bound by halving the box, one box at a time, and what splitting by activations converges to."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from torch_ext.reference.ops.local_lipschitz import local_lipschitz, pre_activations, relu_slopes


def norm_at(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> float:
    """The largest l1 norm of a row of the Jacobian at a point."""
    jacobian = torch.eye(len(x), dtype=x.dtype)
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x, jacobian = weight @ x + bias, weight @ jacobian
        if k < len(weights) - 1:
            jacobian = jacobian * (x > 0)[:, None]
            x = x.relu()
    return float(jacobian.abs().sum(1).max())


def lipschitz_bab(
    weights: list[Tensor], biases: list[Tensor], lo: Tensor, hi: Tensor, max_nodes: int = 200, tol: float = 1e-6
) -> tuple[float, float, int]:
    """Best first: halves the box along the widest feature times |J|. Upper bound, lower bound, boxes bounded."""

    def bound(low: Tensor, high: Tensor, parent: float) -> tuple[float, Tensor, Tensor, int]:
        norms, j_lo, j_hi = local_lipschitz(weights, biases, low, high)
        score = (high - low) * torch.maximum(j_lo.abs(), j_hi.abs()).amax(0)
        return min(parent, float(norms.max())), low, high, int(score.argmax())

    parts = [bound(lo, hi, float("inf"))]
    lower, nodes = norm_at(weights, biases, (lo + hi) / 2), 1
    while nodes + 2 <= max_nodes and parts[0][0] - lower > tol * parts[0][0]:
        upper, low, high, feature = parts.pop(0)
        middle = (low + high) / 2
        for side in (0, 1):
            ends = [low.clone(), high.clone()]
            ends[1 - side][feature] = middle[feature]
            parts.append(bound(ends[0], ends[1], upper))
            lower = max(lower, norm_at(weights, biases, (ends[0] + ends[1]) / 2))
            nodes += 1
        parts.sort(key=lambda part: -part[0])
    return max(lower, parts[0][0]), lower, nodes


def pattern_maximum(weights: list[Tensor], biases: list[Tensor], lo: Tensor, hi: Tensor) -> float:
    """The largest l1 norm of a row over all patterns of the ReLUs that are open on the box, occurring or not."""
    slopes = [relu_slopes(z) for z in pre_activations(weights, biases, lo, hi, "crown")]
    choices = [sorted({float(a), float(b)}) for low, high in slopes for a, b in zip(low, high, strict=True)]
    largest = 0.0
    for pattern in itertools.product(*choices):
        left = torch.tensor(pattern, dtype=lo.dtype)
        jacobian = weights[0]
        for k, weight in enumerate(weights[1:]):
            chosen, left = left[: len(weights[k])], left[len(weights[k]) :]
            jacobian = weight @ (chosen[:, None] * jacobian)
        largest = max(largest, float(jacobian.abs().sum(1).max()))
    return largest
