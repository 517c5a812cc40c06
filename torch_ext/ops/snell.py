"""SNELL: sparse tuning of a frozen linear layer through an update that is generated when it is needed."""

from typing import Literal

import torch
from torch import Tensor

Sparsifier = Literal["code", "paper", "hard", "soft", "none"]


def snell_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    sparsity: float,
    *,
    sparsifier: Sparsifier = "code",
    grad: Literal["detached", "exact"] = "detached",
) -> tuple[Tensor, Tensor]:
    """``x @ phi(W)`` with ``W[i, j] = scale (||A[0, i] - B[0, j]|| - ||A[1, i] - B[1, j]||)`` (arXiv:2411.01800).

    ``W`` ``[in_features, out_features]`` is made tile by tile, forward and backward, and never stored. ``phi`` prunes
    the entries with ``|w| <= t``:

    ============  =====================================================  ====================
    sparsifier    threshold t                                            phi(w) above it
    ============  =====================================================  ====================
    ``"code"``    linear-interpolated ``sparsity``-quantile of ``|W|``   ``w |w|``
    ``"paper"``   the ``ceil(sparsity * entries)``-th smallest, else 0   ``w (|w| - t)``
    ``"hard"``    as ``"paper"``                                         ``w``
    ``"soft"``    as ``"paper"``                                         ``sign(w) (|w| - t)``
    ``"none"``    0                                                      ``w``, everywhere
    ============  =====================================================  ====================

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16; float64 if ``A`` and ``B`` are.
        A: ``[2, in_features, rank / 2]``.
        B: ``[2, out_features, rank / 2]``.
        scale: 0.1 in the paper.
        sparsity: in [0, 1), the share of entries that is pruned.
        sparsifier: ``"code"`` is what the published code computes, ``"paper"`` is Eq. 5.
        grad: ``"detached"`` takes the factor next to ``w`` and the threshold for constants, as the published code does;
            ``"exact"`` differentiates both. A distance of 0 has gradient 0.

    Returns:
        ``y`` ``[..., out_features]`` of the branch alone, in ``x``'s dtype, and ``t``, a scalar without gradient. ``y``
        is differentiable twice in ``x``, ``A`` and ``B``.

    Raises:
        ValueError: shapes, devices, ``sparsity``, ``scale``, unknown words, or (on the CPU) NaN or infinity in ``A`` or
            ``B``.
        TypeError: integer or complex tensors, float64 beside another type.
    """
    result: tuple[Tensor, Tensor] = torch.ops.torch_ext.snell_linear(
        x, A, B, scale, sparsity, sparsifier=sparsifier, grad=grad
    )
    return result


def snell_merge(A: Tensor, B: Tensor, scale: float, sparsity: float, *, sparsifier: Sparsifier = "code") -> Tensor:
    """``phi(W)`` ``[in_features, out_features]`` of :func:`snell_linear` in ``A``'s dtype, without gradient.

    The merged layer's weight, in torch's layout, is ``weight + snell_merge(...).t()``. Raises as ``snell_linear``.
    """
    merged: Tensor = torch.ops.torch_ext.snell_merge(A, B, scale, sparsity, sparsifier=sparsifier)
    return merged
