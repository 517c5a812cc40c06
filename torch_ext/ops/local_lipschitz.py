"""Certified bounds of the Jacobian of a network over boxes, and with them of its local Lipschitz constant."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torch_ext.ops._lipschitz_layers import encode


class LipschitzBounds(NamedTuple):
    """What :func:`local_lipschitz` returns."""

    L: Tensor  #: ``[boxes, outputs]``
    J_lo: Tensor  #: ``[boxes, outputs, features]``
    J_hi: Tensor  #: ``[boxes, outputs, features]``


def local_lipschitz(
    model: nn.Module,
    x: Tensor,
    eps: float | Tensor,
    *,
    outputs: Sequence[int] | None = None,
    forward: Literal["crown", "ibp"] = "crown",
    backward: Literal["tight", "recurjac", "ibp"] = "tight",
    alpha_iters: int = 0,
    safe: bool = False,
    detach_intermediate: bool = False,
) -> LipschitzBounds:
    """Bounds over the box ``[x - eps, x + eps]`` of the Jacobian ``J`` and of its l1 norms (arXiv:2210.07394)::

        L_i >= sup sum_j |J_ij|  >=  sup |f_i(y) - f_i(z)| / ||y - z||_inf

    ``J`` is the set that the chain rule gives with Clarke's slopes: [0, 1] for a ReLU at 0. Its rows are the gradients
    of the outputs, whose products with the slopes of an activation are relaxed to the lines through the corners of
    their box; every entry is propagated back to constants. Batched over boxes and outputs.

    Args:
        model: ``nn.Sequential``, :class:`torch_ext.nn.Residual`, or a module whose ``forward`` ``torch.fx`` can trace,
            made of Linear, Conv2d, BatchNorm1d and 2d in eval mode, ReLU, LeakyReLU, Tanh, Sigmoid, Softplus, GELU,
            SiLU, Flatten, Dropout (as in eval mode), Identity and sums of branches.
        x: ``[boxes, ...]``, float64 (recommended) or float32, as the parameters.
        eps: >= 0; a number, or a tensor that broadcasts over ``x``.
        outputs: rows of ``J``; all if not given.
        forward: ``"crown"`` bounds what enters the activations by linear functions of the input, intersected with
            interval arithmetic; ``"ibp"`` is interval arithmetic alone.
        backward: ``"tight"`` is the above; ``"recurjac"`` takes constants where the sign of a gradient is open
            (arXiv:1810.11783); ``"ibp"`` is interval arithmetic. Never tighter from left to right, up to rounding.
        alpha_iters: steps of Adam on the lower slopes of open ReLUs in the forward bounds (20 in the published code).
        safe: round outward: every sum of k terms is enlarged by k u / (1 - k u) of the sum of magnitudes.
        detach_intermediate: take the bounds within for constants when differentiating. The bound stays valid, at half
            the memory and time, but the gradient is not that of the bound.

    Returns:
        ``L``, ``J_lo``, ``J_hi``. Differentiable once in ``x``, ``eps`` and the parameters, piecewise smooth; with
        ReLUs alone piecewise constant in ``x``, ``eps`` and the biases, which then get no gradient. Bounds that
        overflow are infinite, never NaN. At ``eps=0`` ``L`` is the norm of ``J(x)`` where no activation is at a kink.

    Raises:
        TypeError: a layer without a bound, named by its path; a dtype.
        ValueError: options, shapes, NaN, ``eps`` < 0, a BatchNorm in training mode, and float32 while TF32 or bfloat16
            products are on. Autocast is ignored.
    """
    lo, hi = torch.ops.torch_ext.lipschitz_box(x, torch.as_tensor(eps, dtype=x.dtype, device=x.device), safe)
    return LipschitzBounds(
        *torch.ops.torch_ext.local_lipschitz(
            *encode(model),
            lo,
            hi,
            None if outputs is None else list(outputs),
            forward=forward,
            backward=backward,
            alpha_iters=alpha_iters,
            safe=safe,
            detach_intermediate=detach_intermediate,
        )
    )
