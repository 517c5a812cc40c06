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
