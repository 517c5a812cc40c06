"""Entropic optimal transport by a sparse Newton method, differentiable to any order."""

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_ext import _C


class SinkhornResult(NamedTuple):
    """What :func:`sinkhorn_newton` returns."""

    value: Tensor  #: ``[...]``
    plan: Tensor  #: ``[..., n, m]``
    f: Tensor  #: ``[..., n]``
    g: Tensor  #: ``[..., m]``
    info: Tensor  #: ``[..., 4]`` float64: error, Newton steps, passes, converged (1 or 0)


def sinkhorn_newton(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    *,
    tol: float | None = None,
    max_iter: int = 100,
    mode: Literal["auto", "sns", "ssns", "sinkhorn"] = "auto",
    f0: Tensor | None = None,
) -> SinkhornResult:
    """Transport of the masses ``a`` to the masses ``b`` at the cost ``C`` with entropic regularisation::

        V = min <C, P> + eps sum P (log P - 1)   over P >= 0 with row sums a and column sums b
          = max a.f + b.g - eps sum exp((f_i + g_j - C_ij) / eps),   P_ij = exp((f_i + g_j - C_ij) / eps)

    The first derivatives are dV = P.dC + f.da + g.db, for changes with sum da = sum db; those of ``plan``, ``f`` and
    ``g`` follow from the implicit function theorem on the full plan. All are differentiable again, and in forward
    mode. Where the solution has not converged they are off by the order of the error.

    Args:
        C: ``[..., n, m]``, float64, float32, bfloat16 or float16; +infinity forbids a pair.
        a: ``[..., n]``, masses >= 0; float64 for a float64 cost, else float32. Where it is 0, ``f`` is -infinity.
        b: ``[..., m]``, of the same sum as ``a``. Leading dimensions of ``C``, ``a`` and ``b`` broadcast.
        eps: > 0, in units of ``C``; nothing is rescaled behind it.
        tol: L1 error of the marginals relative to their mass; 1e-9 for float64, 1e-5 for float32.
        max_iter: Newton steps at the final ``eps`` (sweeps with ``"sinkhorn"``).
        mode: ``"auto"`` is Newton on the semi-dual, on the entries that carry the mass, reached through larger eps;
            ``"sns"`` is Tang et al. 2024 (arXiv:2401.12253): 20 sweeps, then Newton on the 2 m largest entries;
            ``"ssns"`` the safeguarded variant of Tang and Qiu (NeurIPS 2024); ``"sinkhorn"`` alternating sweeps.
        f0: ``[..., n]``, a start such as ``f`` of the training step before; if its error is below 0.5 the larger eps
            are skipped.

    Returns:
        value, plan, f and g in the dtype of ``a``, the potentials shifted so that a.f = b.g, and info in float64. A
        problem that did not converge is reported there and by a warning (under ``torch.compile`` only there).

    Raises:
        ValueError: shapes; eps, tol, max_iter or mode; negative or non-finite masses, unequal sums; NaN or -infinity
            in ``C``; a row or column with mass but without a finite cost.
        TypeError: dtypes.
    """
    result = SinkhornResult(*torch.ops.torch_ext.sinkhorn_newton(C, a, b, eps, tol, max_iter, mode, f0))
    warn_unconverged("sinkhorn_newton", result.info)
    return result


def warn_unconverged(op: str, info: Tensor) -> None:
    """Warns if a problem of ``info`` ``[..., 4]`` did not converge. Not while a graph is traced: there is no data."""
    if torch.compiler.is_compiling():
        return
    text = _C.sinkhorn_unconverged(op, info)
    if text:
        warnings.warn(text, stacklevel=3)
