"""The experts of a mixture, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    parts = [x[a:b] @ w.T for a, b, w in zip(bounds, bounds[1:], weight, strict=False)]
    return torch.cat([*parts, x.new_zeros(x.size(0) - bounds[-1], weight.size(1))])


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x: Tensor, gates: Tensor, ids: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """``x`` ``[T, dim]`` -> the sum over k of ``gates[t, k] * F_ids[t, k](x[t])``."""
    rows = []
    for t, token in enumerate(x):
        chosen = [(g, e) for g, e in zip(gates[t], ids[t].tolist(), strict=True) if e >= 0]
        parts = [g * swiglu(token, gate_proj[e], up_proj[e], down_proj[e]) for g, e in chosen]
        rows.append(sum(parts, torch.zeros_like(token)))
    return torch.stack(rows)
