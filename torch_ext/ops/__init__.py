"""Dispatcher operators that stand on their own."""

from torch_ext.ops.local_lipschitz import LipschitzBounds, local_lipschitz
from torch_ext.ops.philox4x32 import philox4x32
from torch_ext.ops.rademacher import rademacher_
from torch_ext.ops.sinkhorn_newton import SinkhornResult, sinkhorn_newton
from torch_ext.ops.snell import snell_linear, snell_merge

__all__ = [
    "LipschitzBounds",
    "SinkhornResult",
    "local_lipschitz",
    "philox4x32",
    "rademacher_",
    "sinkhorn_newton",
    "snell_linear",
    "snell_merge",
]
