"""Entropic optimal transport: the semi-dual Newton method with dense matrices, and derivatives by dense solves.

    V = min <C, P> + eps sum P (log P - 1)   over P >= 0 with row sums a and column sums b
      = max a.f + b.g - eps sum_ij exp((f_i + g_j - C_ij) / eps),   P_ij = exp((f_i + g_j - C_ij) / eps)

With g eliminated, g(f) = eps (log b - LSE_i((f_i - C_ij) / eps)), the concave h(f) = a.f + b.g(f) has the gradient
a - p, p the row sums of P, and the Hessian -(diag(p) - P diag(1/b) P^T) / eps. Newton's iteration on it is started at a
large eps, which is then lowered fourfold at a time. The compiled version drops the entries of P that carry no mass
(arXiv:2401.12253 drops all but a fixed number); here nothing is dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinkhorn_newton(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    *,
    tol: float = 1e-12,
    max_iter: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value, plan, f, g, info) of one problem with positive marginals, in float64; info = (error, Newton steps)."""
    if C.dim() != 2 or bool((a <= 0).any()) or bool((b <= 0).any()):
        raise ValueError("one problem with positive marginals")
    cost, row, column = C.double(), a.double(), b.double()
    mass = float(row.sum())
    row, column = row / mass, column / column.sum()
    f = torch.zeros_like(row)
    steps, e = 0, max(eps, float(cost.max() - cost.min()) / 4)
    while True:
        last = e <= eps
        f, error, used = _newton(cost, row, column, f, e, tol if last else 5e-2, max_iter if last else 10)
        steps += used
        if last:
            break
        e = max(eps, e / 4)
    g = _other(cost, column, f, eps)
    plan = mass * torch.exp((f[:, None] + g[None, :] - cost) / eps)
    gain = eps * math.log(mass)
    shift = float(column @ g + gain - row @ f) / 2  # so that a.f = b.g
    f, g = f + shift, g + (gain - shift)
    value = mass * (row @ f + column @ g - eps)
    return value, plan, f, g, torch.tensor([error, float(steps)], dtype=torch.float64)


def _other(cost: Tensor, column: Tensor, f: Tensor, eps: float) -> Tensor:
    return eps * (column.log() - torch.logsumexp((f[:, None] - cost) / eps, dim=0))


def _newton(
    cost: Tensor, row: Tensor, column: Tensor, f: Tensor, eps: float, tol: float, max_iter: int
) -> tuple[Tensor, float, int]:
    for step in range(max_iter + 1):
        g = _other(cost, column, f, eps)
        # A Sinkhorn update first: from rows with p_i << a_i Newton diverges.
        f = eps * (row.log() - torch.logsumexp((g[None, :] - cost) / eps, dim=1))
        g = _other(cost, column, f, eps)
        plan = torch.exp((f[:, None] + g[None, :] - cost) / eps)
        p = plan.sum(1)
        residual = row - p
        residual = residual - row * residual.sum()
        error = float(residual.abs().sum())
        if error <= tol or step == max_iter:
            return f, error, step
        shift = min(1e-2, 0.1 * error) + 1e-13
        matrix = torch.diag(p * (1 + shift)) - (plan / column) @ plan.T
        dx = torch.linalg.solve(matrix, residual)
        dx = dx - row @ dx
        df = eps * dx * min(1.0, 10 / float(dx.abs().max()))
        before, slope, t = float(row @ f + column @ g), float(residual @ df), 1.0
        while t > 1e-3:
            trial = f + t * df
            if float(row @ trial + column @ _other(cost, column, trial, eps)) >= (
                before + 1e-4 * t * slope - 1e-14 * abs(before)
            ):
                f = trial
                break
            t /= 2
    raise AssertionError("unreachable")


def hess_solve(plan: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of [[diag p, P], [P^T, diag q]] z = (u, v) with p.alpha = q.beta, by a dense pseudo-inverse.

    (u, v) is first projected to sum u = sum v along (p, -q), as the matrix has the null vector (1, -1).
    """
    p, q = plan.sum(1), plan.sum(0)
    matrix = torch.cat([torch.cat([torch.diag(p), plan], 1), torch.cat([plan.T, torch.diag(q)], 1)])
    w, ones = torch.cat([p, -q]), torch.cat([torch.ones_like(p), -torch.ones_like(q)])
    y = torch.cat([u, v])
    y = y - w * (ones @ y) / (w @ ones)
    z = torch.linalg.pinv(matrix, rcond=1e-14, hermitian=True) @ y
    z = z - ones * (w @ z) / (w @ ones)
    return z[: len(p)], z[len(p) :]


def vjp(
    plan: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float, by_plan: Tensor, by_f: Tensor, by_g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to C, a and b for the cotangents of plan, f and g (centred so that a.f = b.g)."""
    u = by_f + (plan * by_plan).sum(1) / eps
    v = by_g + (plan * by_plan).sum(0) / eps
    alpha, beta = hess_solve(plan, u, v)
    moved = (u.sum() - v.sum()) / (a.sum() + b.sum())
    grad_c = plan * (alpha[:, None] + beta[None, :]) - plan * by_plan / eps
    return grad_c, eps * alpha - moved * f, eps * beta + moved * g


def two_by_two(C: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    """The plan of a 2 x 2 problem of mass 1 in closed form.

    p = P_11 is the root in [max(0, a1 + b1 - 1), min(a1, b1)] of
    (1 - K) p^2 + (1 - a1 - b1 + K (a1 + b1)) p - K a1 b1 = 0 with K = exp(-(C11 + C22 - C12 - C21) / eps).
    """
    k = math.exp(-float(C[0, 0] + C[1, 1] - C[0, 1] - C[1, 0]) / eps)
    a1, b1 = float(a[0]), float(b[0])
    s, linear = 1 - k, 1 - a1 - b1 + k * (a1 + b1)
    if s == 0:
        p = a1 * b1
    else:
        root = math.sqrt(linear * linear + 4 * s * k * a1 * b1)
        candidates = [(-linear + root) / (2 * s), (-linear - root) / (2 * s)]
        low, high = max(0.0, a1 + b1 - 1), min(a1, b1)
        p = min(candidates, key=lambda x: max(low - x, x - high))
    return torch.tensor([[p, a1 - p], [b1 - p, 1 - a1 - b1 + p]], dtype=torch.float64)
