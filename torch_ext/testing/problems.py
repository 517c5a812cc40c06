"""Small fixed problems that Python and C++ rebuild without a random generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _formula(function: Callable[[Tensor], Tensor], offset: int, shape: tuple[int, ...]) -> Tensor:
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return function(index + offset).reshape(shape)


def tanh_layer() -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """The problem "tanh_layer" of ``tests/optim_db.json``: 52 float64 parameters and the function of their loss.

    With ``e`` the row-major index of an element::

        weight [4, 6]        sin(e + 1) / 2         x [8, 6]     cos(e)
        kernel [2, 3, 2, 2]  sin(e + 31) / 2        t [8, 4]     cos(e + 100) / 2
        bias [4]             sin(e + 61) / 2

        y    = tanh(x @ weight.t() + bias)
        q    = kernel * kernel - 0.3
        loss = mean((y - t)^2) + mean(weight * weight) * 0.2 + mean(bias * bias) * 0.2
             + mean(q * q) * 0.5 + sum(kernel)^2 * 0.01

    Only +, *, mean, sum and tanh of ATen, so both languages get the same bits on the same machine.
    """
    params = {
        "weight": (_formula(torch.sin, 1, (4, 6)) / 2).requires_grad_(),
        "kernel": (_formula(torch.sin, 31, (2, 3, 2, 2)) / 2).requires_grad_(),
        "bias": (_formula(torch.sin, 61, (4,)) / 2).requires_grad_(),
    }
    x, t = _formula(torch.cos, 0, (8, 6)), _formula(torch.cos, 100, (8, 4)) / 2

    def loss() -> Tensor:
        weight, kernel, bias = params["weight"], params["kernel"], params["bias"]
        error = torch.tanh(torch.matmul(x, weight.t()) + bias) - t
        q = kernel * kernel - 0.3
        total = kernel.sum()
        fit = (error * error).mean() + (weight * weight).mean() * 0.2 + (bias * bias).mean() * 0.2
        return fit + (q * q).mean() * 0.5 + total * total * 0.01

    return params, loss


class ExpertScores:
    """The loss of the problem "expert_scores": called it is the dual value; ``ids`` are the selected experts."""

    def __init__(self, biases: list[Tensor]) -> None:
        self.biases = biases
        self.scores, self.top_k = [], [2, 1, 8]
        for bias in biases:
            experts = bias.numel()
            offset = _formula(torch.cos, 1, (experts,)) * 0.1
            self.scores.append(_formula(torch.sin, 1, (64, experts)) * 0.4 + offset + 0.5)

    def keys(self) -> list[Tensor]:
        return [s + p.detach().double() for s, p in zip(self.scores, self.biases, strict=True)]

    def ids(self) -> list[Tensor]:
        """``[64, K]`` of each layer."""
        return [torch.topk(key, k).indices for key, k in zip(self.keys(), self.top_k, strict=True)]

    def __call__(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for key, p, k in zip(self.keys(), self.biases, self.top_k, strict=True):
            total = total + torch.topk(key, k).values.sum(1).mean() - p.detach().double().sum() * (k / p.numel())
        return total


def expert_scores() -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """The problem "expert_scores" of ``tests/optim_db.json``: three layers of experts with fixed scores.

    With ``e`` the row-major index of an element, the biases (float32) are ``sin(e + 1) / 10`` of 8, 5 and 37 experts,
    the scores of 64 tokens (float64) ``sin(j + 1) * 0.4 + cos(e + 1) * 0.1 + 0.5``, j the index in [64, E] and e the
    expert; 2, 1 and 8 experts are selected. The loss is the sum over the layers of D(p) / T: the mean over the tokens
    of the sum of the K largest score + bias, minus K / E times the sum of the bias. It is least where loads are equal.
    """
    params = {f"bias{i}": (_formula(torch.sin, 1, (e,)) / 10).float() for i, e in enumerate((8, 5, 37))}
    return params, ExpertScores(list(params.values()))
