"""A penalty on the certified local Lipschitz constant, for training."""

from typing import Any

import torch
from torch import Tensor

from torch_ext.ops.local_lipschitz import local_lipschitz


class LipschitzPenalty(torch.nn.Module):
    """The mean over the rows of ``x`` of max_i L_i over the box [x - eps, x + eps]; see :func:`local_lipschitz`.

    Add a multiple of it to the loss. The model is the one that is trained: its parameters are used, not owned, and do
    not appear among those of this module.

    Args:
        model: as in :func:`torch_ext.ops.local_lipschitz`.
        eps: half the width of the boxes, >= 0.
        options: ``outputs``, ``forward``, ``backward``, ``alpha_iters``, ``safe``, ``detach_intermediate`` of
            :func:`torch_ext.ops.local_lipschitz`.

    Shapes:
        x ``[rows, ...]``; returns a scalar.

    Raises:
        ValueError: ``eps``; in ``forward`` what ``local_lipschitz`` raises.
        TypeError: a layer without a bound, named by its path.
    """

    def __init__(self, model: torch.nn.Module, eps: float, **options: Any) -> None:
        super().__init__()
        torch.ops.torch_ext.lipschitz_penalty_check(eps)
        self.eps = eps
        self.options = options
        self._model = (model,)  # in a tuple: not a submodule

    @property
    def model(self) -> torch.nn.Module:
        return self._model[0]

    def forward(self, x: Tensor) -> Tensor:
        bounds = local_lipschitz(self.model, x, self.eps, **self.options)
        penalty: Tensor = torch.ops.torch_ext.lipschitz_penalty(bounds.L)
        return penalty

    def extra_repr(self) -> str:
        return ", ".join([f"eps={self.eps}", *(f"{name}={value!r}" for name, value in self.options.items())])
