"""Hessian-vector products."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor

from torch_ext import _C


def hvp(
    loss: Tensor | Callable[[], Tensor],
    params: Iterable[Tensor],
    v: Sequence[Tensor],
    *,
    mode: Literal["double_backward", "finite_difference"] = "double_backward",
) -> list[Tensor]:
    """H v for H the Hessian of ``loss`` with respect to all of ``params`` jointly.

    Args:
        loss: a scalar with a graph (which is kept), or a function that returns one; ``"finite_difference"`` needs the
            function.
        params: leaf tensors.
        v: one tensor per parameter, in its shape.
        mode: ``"double_backward"`` differentiates <grad, v> (Pearlmutter 1994). ``"finite_difference"`` is
            (g(p + h v) - g(p - h v)) / 2h with h = rho max(|p| / sqrt(d), 1e-3), rho = 1e-4 if all parameters are
            float64 and 1e-2 otherwise; the loss must be smooth and deterministic (generators are replayed).

    Returns:
        one tensor per parameter, without graph; zeros where a parameter does not enter the loss or enters linearly.

    Raises:
        ValueError: lengths, shapes or mode.
        TypeError: a tensor loss with ``"finite_difference"``, or half-precision parameters there.
        RuntimeError: the loss is no scalar with a graph, or an op has no second derivative.
    """
    params = list(params)
    if isinstance(loss, Tensor):
        if mode == "finite_difference":
            raise TypeError("hvp: finite_difference evaluates the loss at other points: pass a function, not a tensor")
        if mode == "double_backward":
            return _C.hvp_of_loss(loss, params, list(v))
        loss = _constant(loss)  # an unknown mode: let the C++ check name it
    return _C.hvp_of_function(loss, params, list(v), mode)


def _constant(loss: Tensor) -> Callable[[], Tensor]:
    return lambda: loss
