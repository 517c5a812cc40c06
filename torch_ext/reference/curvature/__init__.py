"""Reference versions of ``torch_ext.curvature``."""

from torch_ext.reference.curvature.fisher_window import FisherWindowReference, dense_fisher, mfac_recursion
from torch_ext.reference.curvature.hutchinson_diag import hutchinson_diag
from torch_ext.reference.curvature.hvp import hvp
from torch_ext.reference.curvature.obs_prune import obs_prune, sparsity_schedule

__all__ = [
    "FisherWindowReference",
    "dense_fisher",
    "hutchinson_diag",
    "hvp",
    "mfac_recursion",
    "obs_prune",
    "sparsity_schedule",
]
