"""Local Lipschitz bounds of a network of Linear layers and one activation, box by box and output by output.

What :func:`torch_ext.ops.local_lipschitz` computes, in plain torch and in the order of the paper (arXiv:2210.07394):
matrices instead of layers, one box, one row of the Jacobian at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Interval = tuple[Tensor, Tensor]
Lines = tuple[Tensor, Tensor, Tensor, Tensor]  # au, iu, al, il


def interval(weight: Tensor, bias: Tensor, lo: Tensor, hi: Tensor) -> Interval:
    """``W x + b`` for x in [lo, hi] by the signs of W."""
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    return up @ lo + down @ hi + bias, up @ hi + down @ lo + bias


def relu_lines(lower: Tensor, upper: Tensor) -> Lines:
    """The chord above; below the line through 0 of slope 0 or 1, whichever leaves the smaller area."""
    is_open = (lower < 0) & (upper > 0)
    chord = upper / torch.where(is_open, upper - lower, 1)
    active = (lower >= 0).to(lower)
    au = torch.where(is_open, chord, active)
    iu = torch.where(is_open, -chord * lower, 0)
    return au, iu, torch.where(is_open, (upper > -lower).to(lower), active), torch.zeros_like(au)


def product_lines(gl: Tensor, gu: Tensor, sl: Tensor, su: Tensor, constant: bool) -> Lines:
    """Lines around g s: the function itself where g has one sign, else chords, or constants if ``constant``."""
    positive, negative = gl >= 0, gu <= 0
    width = torch.where(positive | negative, 1, gu - gl)
    zero = torch.zeros_like(gl)
    if constant:
        open_au, open_al = torch.where(sl == su, sl, 0), torch.where(sl == su, sl, 0)
        open_iu = torch.where(sl == su, 0, torch.maximum(gl * sl, gu * su))
        open_il = torch.where(sl == su, 0, torch.minimum(gl * su, gu * sl))
    else:
        open_au, open_al = (gu * su - gl * sl) / width, (gu * sl - gl * su) / width
        open_iu = gl * gu * (sl - su) / width
        open_il = -open_iu
    au = torch.where(positive, su, torch.where(negative, sl, open_au))
    al = torch.where(positive, sl, torch.where(negative, su, open_al))
    one_sign = positive | negative
    return au, torch.where(one_sign, zero, open_iu), al, torch.where(one_sign, zero, open_il)


def _substitute(a: Tensor, lines: Lines) -> tuple[Tensor, Tensor]:
    """Rows ``a`` of coefficients, bounded from above: coefficients and constants behind the lines."""
    au, iu, al, il = lines
    up, down = a.clamp(min=0), a.clamp(max=0)
    return up * au + down * al, (up * iu + down * il).sum(1)


def pre_activations(
    weights: list[Tensor], biases: list[Tensor], lo: Tensor, hi: Tensor, forward: str
) -> list[Interval]:
    """Bounds of what enters each ReLU: interval arithmetic, and with "crown" linear bounds by the input."""
    bounds: list[Interval] = []
    h = (lo, hi)
    for k in range(len(weights) - 1):
        z = interval(weights[k], biases[k], *h)
        if forward == "crown" and k > 0:
            ends = []
            for sign in (-1, 1):
                a, c = sign * weights[k], sign * biases[k]
                for q in range(k - 1, -1, -1):
                    a, more = _substitute(a, relu_lines(*bounds[q]))
                    c = c + more + a @ biases[q]
                    a = a @ weights[q]
                ends.append(sign * (c + a.clamp(min=0) @ hi + a.clamp(max=0) @ lo))
            z = torch.maximum(z[0], ends[0]), torch.minimum(z[1], ends[1])
        bounds.append(z)
        h = z[0].relu(), z[1].relu()
    return bounds


def relu_slopes(z: Interval) -> Interval:
    """Clarke's slopes: [0, 1] wherever 0 may be reached."""
    return (z[0] > 0).to(z[0]), 1 - (z[1] < 0).to(z[0])


def jacobian_row(weights: list[Tensor], slopes: list[Interval], output: int, backward: str) -> tuple[Interval, Tensor]:
    """Bounds of one row of the Jacobian, and of its l1 norm."""
    last = weights[-1][output]
    gradients: list[Interval] = [(last, last)]  # of layer n, n - 1, ...; inserted at the front
    if backward == "ibp":
        for k in range(len(weights) - 2, -1, -1):
            corners = torch.stack([g * s for g in gradients[0] for s in slopes[k]])
            zero = torch.zeros(weights[k].size(1), dtype=last.dtype)
            gradients.insert(0, interval(weights[k].t(), zero, corners.amin(0), corners.amax(0)))
        row = gradients[0]
        return row, torch.maximum(row[0].abs(), row[1].abs()).sum()

    def lines(q: int, known: list[Interval]) -> Lines:
        """Of the activation behind layer q; ``known[0]`` is the gradient behind the first activation of the tail."""
        gl, gu = known[q - (len(weights) - len(known))]
        return product_lines(gl, gu, *slopes[q - 1], backward == "recurjac")

    def upper(a: Tensor, k: int) -> Tensor:
        """Of rows ``a`` on the gradient of layer k's input."""
        c = torch.zeros(len(a), dtype=last.dtype)
        for q in range(k, len(weights) - 1):
            a, more = _substitute(a @ weights[q].t(), lines(q + 1, gradients))
            c = c + more
        return c + a @ last

    for k in range(len(weights) - 2, -1, -1):
        identity = torch.eye(weights[k].size(1), dtype=last.dtype)
        gradients.insert(0, (-upper(-identity, k), upper(identity, k)))
    lo, hi = gradients[0]
    is_open = (lo < 0) & (hi > 0)
    width = torch.where(is_open, hi - lo, 1)
    slope = torch.where(is_open, (hi + lo) / width, torch.where(lo >= 0, 1.0, -1.0).to(lo))
    intercept = torch.where(is_open, -2 * hi * lo / width, 0)
    return (lo, hi), upper(slope[None], 0)[0] + intercept.sum()


def local_lipschitz(
    weights: list[Tensor],
    biases: list[Tensor],
    lo: Tensor,
    hi: Tensor,
    *,
    forward: str = "crown",
    backward: str = "tight",
    slopes: Callable[[Interval], Interval] = relu_slopes,
) -> tuple[Tensor, Tensor, Tensor]:
    """One box [features] -> L [outputs] and bounds [outputs, features] of the Jacobian of a ReLU network."""
    ranges = [slopes(z) for z in pre_activations(weights, biases, lo, hi, forward)]
    rows = [jacobian_row(weights, ranges, i, backward) for i in range(len(weights[-1]))]
    return torch.stack([r[1] for r in rows]), torch.stack([r[0][0] for r in rows]), torch.stack([r[0][1] for r in rows])


def exact_1d(weights: list[Tensor], biases: list[Tensor], lo: float, hi: float) -> float:
    """The largest |slope| of any output over [lo, hi] for one input feature: kinks layer by layer, slopes between."""

    def affine(x: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """Value and slope by x of what enters layer number ``layers``, right of kinks; x [points]."""
        value, slope = x[:, None], torch.ones(len(x), 1, dtype=x.dtype)
        for k in range(layers + 1):
            value, slope = value @ weights[k].t() + biases[k], slope @ weights[k].t()
            if k < layers:
                active = (value > 0).to(x)
                value, slope = value * active, slope * active
        return value, slope

    points = torch.tensor([lo, hi], dtype=weights[0].dtype)
    for k in range(len(weights) - 1):
        middle = (points[1:] + points[:-1]) / 2
        value, slope = affine(middle, k)
        root = middle[:, None] - value / torch.where(slope == 0, torch.nan, slope)
        inside = (root > points[:-1, None]) & (root < points[1:, None])
        points = torch.cat([points, root[inside]]).sort().values
    middle = (points[1:] + points[:-1]) / 2
    return float(affine(middle, len(weights) - 1)[1].abs().max())
