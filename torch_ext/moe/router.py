"""The linear router of a mixture of experts, with the bias that ALFLB moves and the loads that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.moe.route import CountIn, NanPolicy, RouteResult, Score, check_route_options, route


class MoERouter(nn.Module):
    """``route(x @ weight.T, expert_bias)``: :func:`torch_ext.moe.route` has the formula and the options.

    Logits are computed in float32 (float64 for a float64 weight), also under autocast and for bfloat16 weights. While
    training, counts go into ``load`` when ``count_in`` says; in eval mode nothing is counted.

    Args:
        dim: size of a token.
        num_experts: E.
        device, dtype: of ``weight``.

    Attributes:
        weight: parameter ``[num_experts, dim]``, initialised as ``torch.nn.Linear``'s.
        expert_bias: buffer ``[num_experts]``, zeros at first, always float32: in bfloat16 a bias above 0.5 would not
            move by 1e-3. :class:`torch_ext.optim.ALFLB` moves it; it only selects, and has no gradient.
        load: int64 ``[num_experts]``, tokens since the balancer last read and cleared it. A plain attribute that moves
            with the module: a buffer would be overwritten by DistributedDataParallel with the counts of the first
            process. Not saved.
        quantile_histogram, quantile_bounds: None, or set by a balancer with the quantile rule: int64
            ``[num_experts, bins]`` and float32 ``[2]``; the router then counts as :func:`route` says.

    Raises:
        ValueError, TypeError: those of :func:`route`; options at once.
    """

    weight: nn.Parameter
    expert_bias: Tensor
    load: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        score: Score = "sigmoid",
        normalize: bool = True,
        route_scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score_k: int = 2,
        nan_policy: NanPolicy = "propagate",
        count_in: CountIn = "backward",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.options: dict[str, Any] = {
            "top_k": top_k,
            "score": score,
            "normalize": normalize,
            "route_scale": route_scale,
            "num_groups": num_groups,
            "top_groups": top_groups,
            "group_score_k": group_score_k,
            "nan_policy": nan_policy,
            "count_in": count_in,
        }
        check_route_options(num_experts, **self.options)
        self.weight = nn.Parameter(nn.Linear(dim, num_experts, bias=False, device=device, dtype=dtype).weight)
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32, device=device))
        self.load = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.quantile_histogram: Tensor | None = None
        self.quantile_bounds: Tensor | None = None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> RouteResult:
        """``x`` ``[..., dim]``, ``valid`` bool ``[...]`` (False: padding); T is the number of all tokens of ``x``."""
        logits = torch.ops.torch_ext.moe_router_logits(x, self.weight)
        counting = self.training
        return route(
            logits,
            self.expert_bias,
            **self.options,
            valid=None if valid is None else valid.reshape(-1),
            load=self.load if counting else None,
            histogram=self.quantile_histogram if counting else None,
            histogram_bounds=self.quantile_bounds if counting else None,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoERouter:
        bias = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.expert_bias
        if moved.dtype != torch.float32:
            moved = moved.float() if bias.is_meta else bias.to(moved.device)
        if moved is not bias and torch._has_compatible_shallow_copy_type(bias, moved):
            bias.data = moved  # the same tensor object: a balancer holds it
            moved = bias
        self.expert_bias = moved
        for name in ("load", "quantile_histogram", "quantile_bounds"):
            tensor = getattr(self, name)
            if tensor is not None:
                to_empty = tensor.is_meta and not moved.is_meta
                new = torch.zeros_like(tensor, device=moved.device) if to_empty else tensor.to(moved.device)
                setattr(self, name, new)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.expert_bias.dtype != torch.float32:  # load_state_dict(assign=True) takes what is in the file
            self.expert_bias = self.expert_bias.float()

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.options['top_k']}, "
            f"score={self.options['score']!r}"
        )
