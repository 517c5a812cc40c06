"""The sum of two branches, for models that :func:`torch_ext.ops.local_lipschitz` bounds."""

import torch
from torch import Tensor


class Residual(torch.nn.Module):
    """``body(x) + shortcut(x)``, with the identity where no shortcut is given.

    Parameters are saved under ``body`` and ``shortcut``, as C++'s ``torch_ext::nn::Residual`` saves them.

    Args:
        body: a module whose result has the shape of ``shortcut(x)``.
        shortcut: a module, or None.
    """

    def __init__(self, body: torch.nn.Module, shortcut: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        body: Tensor = self.body(x)
        return body + (x if self.shortcut is None else self.shortcut(x))
