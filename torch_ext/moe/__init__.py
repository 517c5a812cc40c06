"""Mixtures of experts: routing, movement of tokens, layers, and balance."""

from torch_ext.moe.dispatch_plan import DispatchPlan, combine, dispatch_plan, permute, to_dense
from torch_ext.moe.layer import MoELayer, grouped_mm
from torch_ext.moe.losses import balance_loss, sequence_loss, z_loss
from torch_ext.moe.route import RouteResult, route
from torch_ext.moe.router import MoERouter

__all__ = [
    "DispatchPlan",
    "MoELayer",
    "MoERouter",
    "RouteResult",
    "balance_loss",
    "combine",
    "dispatch_plan",
    "grouped_mm",
    "permute",
    "route",
    "sequence_loss",
    "to_dense",
    "z_loss",
]
