"""Certificates of monotonicity of a ReLU network on one box."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ext.reference.ops.local_lipschitz import local_lipschitz


def monotonicity(weights: list[Tensor], biases: list[Tensor], lo: Tensor, hi: Tensor) -> Tensor:
    """int8 ``[outputs, features]``: 1 where the Jacobian is >= 0, -1 where it is <= 0, else 0."""
    _, low, high = local_lipschitz(weights, biases, lo, hi)
    return torch.where(low >= 0, 1, torch.where(high <= 0, -1, 0)).to(torch.int8)
