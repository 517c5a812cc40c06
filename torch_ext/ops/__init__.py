"""Dispatcher operators that stand on their own."""

from torch_ext.ops.eggroll import (
    EggrollNoise,
    eggroll_conv2d,
    eggroll_embedding,
    eggroll_linear,
    eggroll_noise,
    eggroll_perturb_,
    eggroll_update,
    eggroll_vector,
    seeded_noise_add_,
)
from torch_ext.ops.local_lipschitz import LipschitzBounds, local_lipschitz
from torch_ext.ops.philox4x32 import philox4x32
from torch_ext.ops.rademacher import rademacher_
from torch_ext.ops.sinkhorn_newton import SinkhornResult, sinkhorn_newton
from torch_ext.ops.snell import snell_linear, snell_merge

__all__ = [
    "EggrollNoise",
    "LipschitzBounds",
    "SinkhornResult",
    "eggroll_conv2d",
    "eggroll_embedding",
    "eggroll_linear",
    "eggroll_noise",
    "eggroll_perturb_",
    "eggroll_update",
    "eggroll_vector",
    "local_lipschitz",
    "philox4x32",
    "rademacher_",
    "seeded_noise_add_",
    "sinkhorn_newton",
    "snell_linear",
    "snell_merge",
]
