"""Algorithms with their own loop and result."""

from torch_ext.solvers.lipschitz_bab import LipschitzBabResult, lipschitz_bab
from torch_ext.solvers.monotonicity import monotonicity

__all__ = ["LipschitzBabResult", "lipschitz_bab", "monotonicity"]
