"""Modules around the operators."""

from torch_ext.nn.eggroll import (
    EggrollConv2d,
    EggrollEmbedding,
    EggrollLayerNorm,
    EggrollLinear,
    eggroll_convert,
    eggroll_revert,
)
from torch_ext.nn.lipschitz_penalty import LipschitzPenalty
from torch_ext.nn.residual import Residual
from torch_ext.nn.sinkhorn_loss import SinkhornLoss
from torch_ext.nn.snell_linear import SnellBudget, SnellLinear, apply_snell, snell_state_dict

__all__ = [
    "EggrollConv2d",
    "EggrollEmbedding",
    "EggrollLayerNorm",
    "EggrollLinear",
    "LipschitzPenalty",
    "Residual",
    "SinkhornLoss",
    "SnellBudget",
    "SnellLinear",
    "apply_snell",
    "eggroll_convert",
    "eggroll_revert",
    "snell_state_dict",
]
