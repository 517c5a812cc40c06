"""ALFLB: the rules that move the selection bias of a mixture of experts by its loads.

Wang et al., arXiv:2408.15664; Han and Zhong, arXiv:2512.03915. One layer has E experts, of which each of T tokens
selects K: those with the largest key = score + bias. With A the loads, L = K T / E, v = (L - A) / L::

    u_n = lr / n^lr_power                                                  n = 1, 2, ... updates
    sign          p += u_n sign(L - A)
    proportional  p += u_n (L - A) / T    (norm "tokens")   or   p += u_n v    (norm "load")
    momentum      d = u_n tanh(kappa v);  m = momentum m + (1 - momentum) (d - mean d);  p += m
    quantile      p_e = K/E quantile over t of  cutoff_t - score[t, e],  cutoff = (K+1)-th largest key
    center        p -= mean(p)

The bias is float32, everything on the way float64; a sum over the experts has the shape of the compiled one. A layer
without loads is left alone. The assignment problem behind it, for fixed scores: max sum score x over x in {0, 1} with K
experts per token and L tokens per expert; its Lagrangian dual is ``dual_value``, which the rules lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LANES, SEGMENT = 32, 1024


@dataclass(frozen=True)
class ALFLBReferenceOptions:
    """The options of all layers."""

    lr: float = 1e-3
    lr_power: float = 0.0
    rule: str = "sign"
    norm: str = "tokens"
    center: bool = True
    ema: float = 0.0
    momentum: float = 0.5
    kappa: float = 2.0
    qb_bins: int = 1000


def fixed_sum(values: Tensor) -> float:
    """The sum of float64 values in one shape: 32 lanes that fold as a tree per 1024; fewer than 32 one by one."""
    numbers = values.tolist()
    if len(numbers) < LANES:
        return float(sum(numbers))
    total = 0.0
    for begin in range(0, len(numbers), SEGMENT):
        lane = [0.0] * LANES
        for i, x in enumerate(numbers[begin : begin + SEGMENT]):
            lane[i % LANES] += x
        for half in (16, 8, 4, 2, 1):
            lane = [lane[i] + lane[i + half] for i in range(half)]
        total += lane[0]
    return total


def select(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """``[T, K]``: the experts with the largest keys, equal ones by the lower number."""
    return torch.sort(scores + bias, dim=1, descending=True, stable=True).indices[:, :top_k]


def loads_of(ids: Tensor, experts: int) -> Tensor:
    """``[E]`` int64."""
    return torch.bincount(ids.reshape(-1), minlength=experts)


def dual_value(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """D(p) = sum over tokens of the sum of the K largest keys, minus L sum p; convex, unchanged by p + constant."""
    target = top_k * scores.size(0) / scores.size(1)
    return torch.topk(scores + bias, top_k).values.sum() - target * bias.sum()


def lagrangian(scores: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    """sum (score + p) x - L sum p for the assignment x that ``ids`` says."""
    target = ids.numel() / scores.size(1)
    return (scores + bias).gather(1, ids).sum() - target * bias.sum()


def quantile_bias(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """The quantile rule without a histogram: K/E quantiles with linear interpolation."""
    cutoff = torch.topk(scores + bias, top_k + 1).values[:, -1:]
    return torch.quantile(cutoff - scores, top_k / scores.size(1), dim=0)


def quantile_histogram(scores: Tensor, bias: Tensor, top_k: int, bounds: Tensor, bins: int) -> Tensor:
    """``[E, bins]`` int64: counts of cutoff - score in equal bins on ``bounds``, the rest in the outer ones."""
    cutoff = torch.topk(scores + bias, top_k + 1).values[:, -1:]
    low, high = bounds.tolist()
    index = ((cutoff - scores - low) * (bins / (high - low))).floor().clamp(0, bins - 1).long()
    histogram = torch.zeros(scores.size(1), bins, dtype=torch.int64)
    return histogram.scatter_add_(1, index.t(), torch.ones_like(index.t()))


def quantiles_of(histogram: Tensor, bounds: Tensor, top_k: int) -> Tensor:
    """K/E quantile of each row, linear inside its bin."""
    experts, bins = histogram.shape
    low, high = bounds.tolist()
    values = torch.zeros(experts, dtype=torch.float64)
    for e, row in enumerate(histogram.tolist()):
        rows, below, b = sum(row), 0, 0
        while b + 1 < bins and (below + row[b]) * experts < top_k * rows:
            below, b = below + row[b], b + 1
        part = (top_k * rows - below * experts) / (experts * row[b]) if row[b] else 0.0
        values[e] = low + (b + part) * ((high - low) / bins)
    return values


class ALFLBReference:
    """The balancer in plain torch on the CPU, the oracle of the compiled one.

    ``biases`` are float32 ``[E]`` tensors, which ``step`` moves in place; ``step_closure`` takes a loss with ``ids()``,
    the selected experts of each layer.
    """

    def __init__(self, biases: Sequence[Tensor], **options: Any) -> None:
        self.options = ALFLBReferenceOptions(**options)
        self.biases = list(biases)
        self.updates = [0 for _ in self.biases]
        self.momenta = [torch.zeros_like(p) for p in self.biases]

    def step(self, loads: Sequence[Tensor], top_k: Sequence[int], histograms: Sequence[Any] | None = None) -> None:
        """``histograms``: for the quantile rule ``(counts, bounds)`` of each layer."""
        for i, load in enumerate(loads):
            if int(load.sum()) == 0:
                continue
            self.updates[i] += 1
            self._move(i, load, top_k[i], None if histograms is None else histograms[i])

    def _move(self, i: int, load: Tensor, top_k: int, histogram: Any) -> None:
        o, bias = self.options, self.biases[i]
        experts, total = bias.numel(), int(load.sum())
        rate = o.lr / self.updates[i] ** o.lr_power
        if rate == 0 and o.rule != "quantile":
            return
        shortage = total - experts * load.to(torch.int64)
        violation = shortage.double() / total
        p = bias.double()
        if o.rule == "sign":
            p = p + rate * shortage.sign().double()
        elif o.rule == "proportional":
            share = top_k / experts if o.norm == "tokens" else 1.0
            p = p + rate * (share * violation)
        elif o.rule == "momentum":
            d = rate * torch.tanh(o.kappa * violation)
            d = d - fixed_sum(d) / experts
            self.momenta[i] = (o.momentum * self.momenta[i].double() + (1 - o.momentum) * d).float()
            p = p + self.momenta[i].double()
        else:
            counts, bounds = histogram
            p = o.ema * p + (1 - o.ema) * quantiles_of(counts, bounds, top_k)
        bias.copy_(p.float())
        if o.center:
            bias.copy_((bias.double() - fixed_sum(bias.double()) / experts).float())

    def step_closure(self, loss: Any) -> Tensor:
        value: Tensor = loss()
        ids = loss.ids()
        self.step(
            [loads_of(chosen, p.numel()) for chosen, p in zip(ids, self.biases, strict=True)],
            [chosen.size(1) for chosen in ids],
        )
        return value
