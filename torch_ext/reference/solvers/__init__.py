"""Reference versions of ``torch_ext.solvers``."""

from torch_ext.reference.solvers.lipschitz_bab import lipschitz_bab, norm_at, pattern_maximum
from torch_ext.reference.solvers.monotonicity import monotonicity

__all__ = ["lipschitz_bab", "monotonicity", "norm_at", "pattern_maximum"]
