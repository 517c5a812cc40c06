"""Reference versions of ``torch_ext.ops``."""

from torch_ext.reference.ops.eggroll import eggroll_linear, eggroll_noise, eggroll_update, seeded_noise_add_
from torch_ext.reference.ops.local_lipschitz import exact_1d, local_lipschitz
from torch_ext.reference.ops.philox4x32 import philox4x32
from torch_ext.reference.ops.rademacher import rademacher, rademacher_
from torch_ext.reference.ops.sinkhorn_newton import sinkhorn_newton
from torch_ext.reference.ops.snell import snell_linear, snell_merge

__all__ = [
    "eggroll_linear",
    "eggroll_noise",
    "eggroll_update",
    "exact_1d",
    "local_lipschitz",
    "philox4x32",
    "rademacher",
    "rademacher_",
    "seeded_noise_add_",
    "sinkhorn_newton",
    "snell_linear",
    "snell_merge",
]
