"""Mixtures of experts: routing, movement of tokens, layers, and balance."""

from torch_ext.moe.dispatch_plan import DispatchPlan, combine, dispatch_plan, permute, to_dense
from torch_ext.moe.layer import MoELayer, grouped_mm
from torch_ext.moe.losses import balance_loss, sequence_loss, z_loss
from torch_ext.moe.route import RouteResult, route
from torch_ext.moe.router import MoERouter
from torch_ext.moe.stochastic_balance import (
    BalanceResult,
    OnlineAssigner,
    fluid_lp_equal_p,
    stochastic_balance,
    stochastic_balance_exact,
    stochastic_optimum,
)

__all__ = [
    "BalanceResult",
    "DispatchPlan",
    "MoELayer",
    "MoERouter",
    "OnlineAssigner",
    "RouteResult",
    "balance_loss",
    "combine",
    "dispatch_plan",
    "fluid_lp_equal_p",
    "grouped_mm",
    "permute",
    "route",
    "sequence_loss",
    "stochastic_balance",
    "stochastic_balance_exact",
    "stochastic_optimum",
    "to_dense",
    "z_loss",
]
