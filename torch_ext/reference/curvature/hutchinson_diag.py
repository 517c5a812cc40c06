"""Hutchinson's estimate of the Hessian diagonal, ``diag(H) ~ (1/S) sum_s z_s * (H z_s)`` with Rademacher ``z_s``.

Unbiased; with ``D`` the estimate, ``E[D_i^2] = H_ii^2 + (1/S) sum_{j != i} H_ij^2``: the square
sees the rest of row i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_ext.reference.curvature.hvp import LossFn, gradients, hvp_of_gradients
from torch_ext.reference.ops.rademacher import rademacher


def hutchinson_diag(
    loss: Tensor | LossFn, params: Sequence[Tensor], *, n_samples: int = 1, seed: int = 0
) -> list[Tensor]:
    """The estimate, one tensor like each parameter (signed, not averaged over blocks).

    Sample ``s`` uses the signs of stream ``s``, ordinal = position in ``params``, epoch 0.
    """
    if n_samples < 1:
        raise ValueError(f"hutchinson_diag: n_samples must be at least 1, got {n_samples}")
    params = list(params)
    with torch.enable_grad():
        value = loss if isinstance(loss, Tensor) else loss()
        grads = gradients(value, params, create_graph=True)
    opmath = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
    total = [torch.zeros(p.shape, dtype=t) for p, t in zip(params, opmath, strict=True)]
    for s in range(n_samples):
        z = [rademacher(p.shape, seed=seed, stream=s, ordinal=i, dtype=p.dtype) for i, p in enumerate(params)]
        products = hvp_of_gradients(grads, params, z, retain_graph=s < n_samples - 1)
        for i, (t, h) in enumerate(zip(opmath, products, strict=True)):
            total[i] = total[i] + z[i].to(t) * h.to(t) * (1 / n_samples)
    return [d.to(p.dtype) for d, p in zip(total, params, strict=True)]
