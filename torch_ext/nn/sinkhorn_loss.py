"""Entropic optimal transport between point clouds as a loss."""

import torch
from torch import Tensor

from torch_ext.ops.sinkhorn_newton import warn_unconverged


class SinkhornLoss(torch.nn.Module):
    """V(x, y) of :func:`torch_ext.ops.sinkhorn_newton` for the cost C_ij = |x_i - y_j|^2 / 2.

    With ``debias=True`` the Sinkhorn divergence V(x, y) - V(x, x) / 2 - V(y, y) / 2 (Feydy et al., AISTATS 2019,
    arXiv:1810.08278), which is >= 0 and 0 for equal clouds; for weights of sum 1 the entropic constants cancel in it.

    The cost is recomputed in every pass and never stored: memory O((n + m) d). Differentiable once; for second
    derivatives call :func:`torch_ext.ops.sinkhorn_newton` on the cost matrix.

    Args:
        eps: > 0, in units of the cost (a squared length).
        debias: subtract the two self-terms.

    Shapes:
        x ``[..., n, d]`` and y ``[..., m, d]``, float32 or float64; a ``[..., n]`` and b ``[..., m]`` of equal sum,
        1/n and 1/m if not given. Returns ``[...]``.

    Raises:
        ValueError: eps, shapes, masses.
        TypeError: dtypes.
    """

    def __init__(self, eps: float, *, debias: bool = False) -> None:
        super().__init__()
        torch.ops.torch_ext.sinkhorn_loss_check(eps)
        self.eps = eps
        self.debias = debias

    def forward(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        loss: Tensor
        loss, info = torch.ops.torch_ext.sinkhorn_loss(x, y, a, b, self.eps, self.debias)
        warn_unconverged("SinkhornLoss", info)
        return loss

    def extra_repr(self) -> str:
        return f"eps={self.eps}, debias={self.debias}"
