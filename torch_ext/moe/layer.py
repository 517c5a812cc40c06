"""A mixture-of-experts layer: router, SwiGLU experts over the permuted tokens, shared experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.moe.router import MoERouter

_SQRT5 = 2.23606797749979  # as torch.nn.Linear initialises its weight: uniform in +-1 / sqrt(fan_in)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """One product per segment: rows ``offsets[e]`` to ``offsets[e + 1] - 1`` of ``x`` times ``weight[e].T``.

    ``x`` ``[S, D]``, ``weight`` ``[E, N, D]``, ``offsets`` ``[E + 1]`` int32 -> ``[S, N]``; rows past ``offsets[E]``
    are zeros. Differentiable to any order; in the narrow type under autocast. On CUDA it reads ``offsets`` back.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, offsets that do not rise.
    """
    y: Tensor = torch.ops.torch_ext.moe_grouped_mm(x, weight, offsets)
    return y


class MoELayer(nn.Module):
    """``y[t] = sum_k gates[t, k] * F_ids[t, k](x[t]) + F_shared(x[t])``, ``F(x) = down(silu(gate(x)) * up(x))``.

    Args:
        dim: size of a token.
        hidden: inner size of one expert.
        num_experts: E.
        shared_experts: experts that every token takes with gate 1; 1 in DeepSeek-V3.
        device, dtype: of the parameters.
        router: options of :class:`torch_ext.moe.MoERouter`, such as ``top_k``.

    Attributes:
        router: the :class:`~torch_ext.moe.MoERouter`; ``router.load`` and ``router.expert_bias`` are what
            :class:`torch_ext.optim.ALFLB` works on.
        gate_proj, up_proj: ``[num_experts, hidden, dim]``; down_proj: ``[num_experts, dim, hidden]``.
        shared_gate_proj, shared_up_proj: ``[shared_experts * hidden, dim]``; shared_down_proj: ``[dim, shared_experts *
            hidden]``; None without shared experts.

    Raises:
        ValueError: sizes, and what the router refuses.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        shared_experts: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router: Any,
    ) -> None:
        super().__init__()
        shared = int(torch.ops.torch_ext.moe_shared_hidden(dim, hidden, shared_experts))
        self.dim, self.hidden, self.num_experts, self.shared_experts = dim, hidden, num_experts, shared_experts
        self.router = MoERouter(dim, num_experts, device=device, dtype=dtype, **router)

        def weight(*sizes: int) -> nn.Parameter:
            values = torch.empty(sizes, device=device, dtype=dtype)
            for matrix in values if values.dim() == 3 else [values]:
                nn.init.kaiming_uniform_(matrix, a=_SQRT5)
            return nn.Parameter(values)

        self.gate_proj = weight(num_experts, hidden, dim)
        self.up_proj = weight(num_experts, hidden, dim)
        self.down_proj = weight(num_experts, dim, hidden)
        self.shared_gate_proj = weight(shared, dim) if shared else None
        self.shared_up_proj = weight(shared, dim) if shared else None
        self.shared_down_proj = weight(dim, shared) if shared else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``x`` ``[..., dim]`` -> the same shape. ``valid`` bool ``[...]``: tokens that are not go to no expert."""
        routed = self.router(x, valid)
        y: Tensor = torch.ops.torch_ext.moe_experts(
            x,
            routed.gates,
            routed.ids,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            self.shared_gate_proj,
            self.shared_up_proj,
            self.shared_down_proj,
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, num_experts={self.num_experts}, "
            f"shared_experts={self.shared_experts}"
        )
