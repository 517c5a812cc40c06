"""Certificates of monotonicity."""

import torch
from torch import Tensor, nn

from torch_ext.ops._lipschitz_layers import encode


def monotonicity(model: nn.Module, lo: Tensor, hi: Tensor, *, safe: bool = False) -> Tensor:
    """In which direction each output provably moves as one feature grows within a box.

    Args:
        model: as in :func:`torch_ext.ops.local_lipschitz`, whose bounds of the Jacobian decide.
        lo, hi: ``[boxes, ...]``.
        safe: round outward; exact zeros then stay undecided.

    Returns:
        int8 ``[boxes, outputs, features]``: 1 where the output never falls (the lower bound of J is >= 0, so also where
        it does not depend on the feature), -1 where it never rises (the upper bound is <= 0), else 0: not decided.

    Raises:
        ValueError, TypeError: as ``local_lipschitz``.
    """
    signs: Tensor = torch.ops.torch_ext.monotonicity(*encode(model), lo, hi, safe)
    return signs
