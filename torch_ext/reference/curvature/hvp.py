"""Hessian-vector products: ``(H v)_i = d( sum_j <dL/dp_j, v_j> ) / dp_i`` for all parameters at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LossFn = Callable[[], Tensor]


def gradients(loss: Tensor, params: Sequence[Tensor], *, create_graph: bool) -> list[Tensor | None]:
    """``dL/dp_i``, None where the loss does not depend on ``p_i``."""
    if not loss.requires_grad:
        return [None for _ in params]
    return list(
        torch.autograd.grad(loss, list(params), create_graph=create_graph, retain_graph=create_graph, allow_unused=True)
    )


def hvp_of_gradients(
    grads: Sequence[Tensor | None], params: Sequence[Tensor], v: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor]:
    """``H v`` from gradients that carry a graph (double backward).

    A gradient that depends on no parameter (the loss is linear in it) carries no graph and is left out: the autograd
    engine refuses it. Whatever comes back undefined is exactly zero.
    """
    kept = [(g, vec) for g, vec in zip(grads, v, strict=True) if g is not None and g.requires_grad]
    if not kept:
        return [torch.zeros_like(p) for p in params]
    products = torch.autograd.grad(
        [g for g, _ in kept],
        list(params),
        grad_outputs=[vec.to(g.dtype) for g, vec in kept],
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return [torch.zeros_like(p) if h is None else h.detach() for h, p in zip(products, params, strict=True)]


def finite_difference_step(params: Sequence[Tensor]) -> float:
    """``h = rho * max(|theta|_2 / sqrt(d), 1e-3)`` over all ``d`` parameters; at ``theta = 0`` it must not vanish.

    ``rho`` is 1e-4 when every parameter is float64, else 1e-2.
    """
    rho = 1e-4 if all(p.dtype == torch.float64 for p in params) else 1e-2
    squares, d = 0.0, 0
    for p in params:
        squares += float(p.detach().double().square().sum())
        d += p.numel()
    return rho * max(math.sqrt(squares) / math.sqrt(max(d, 1)), 1e-3)


def _hvp_by_differences(closure: LossFn, params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """``(g(theta + h v) - g(theta - h v)) / (2 h)``; the parameters are put back to the bit."""
    h = finite_difference_step(params)
    theta = [p.detach().clone() for p in params]

    def gradient_at(sign: float) -> list[Tensor | None]:
        with torch.no_grad():
            for p, base, vec in zip(params, theta, v, strict=True):
                p.copy_(base + vec.to(p.dtype) * (sign * h))
        with torch.enable_grad():
            return gradients(closure(), params, create_graph=False)

    try:
        plus, minus = gradient_at(+1.0), gradient_at(-1.0)
    finally:
        with torch.no_grad():
            for p, base in zip(params, theta, strict=True):
                p.copy_(base)
    products = []
    for p, gp, gm in zip(params, plus, minus, strict=True):
        opmath = torch.float64 if p.dtype == torch.float64 else torch.float32
        zero = torch.zeros_like(p)
        a, b = (zero if g is None else g for g in (gp, gm))
        products.append(((a.to(opmath) - b.to(opmath)) / (2 * h)).to(p.dtype))
    return products


def hvp(
    loss: Tensor | LossFn, params: Sequence[Tensor], v: Sequence[Tensor], *, mode: str = "double_backward"
) -> list[Tensor]:
    """``H v``, one tensor like each parameter.

    Args:
        loss: a scalar with a graph, or a function returning one (required by ``"finite_difference"``, which calls it
            twice at moved parameters: it must be deterministic).
        params: leaves, shapes ``p_i``.
        v: vectors, shapes of ``p_i``.
        mode: ``"double_backward"`` (exact) or ``"finite_difference"`` (central; the model needs no second derivatives).
    """
    params, v = list(params), list(v)
    if mode == "finite_difference":
        if isinstance(loss, Tensor):
            raise TypeError("hvp: mode='finite_difference' needs a function that returns the loss, got a Tensor")
        return _hvp_by_differences(loss, params, v)
    if mode != "double_backward":
        raise ValueError(f"hvp: mode must be 'double_backward' or 'finite_difference', got {mode!r}")
    with torch.enable_grad():
        value = loss if isinstance(loss, Tensor) else loss()
        grads = gradients(value, params, create_graph=True)
    return hvp_of_gradients(grads, params, v)
