"""Second-order information: Hessian-vector products, the Hessian diagonal, the Fisher matrix and pruning with it."""

from torch_ext.curvature.fisher_window import FisherWindow
from torch_ext.curvature.hutchinson_diag import hutchinson_diag
from torch_ext.curvature.hvp import hvp
from torch_ext.curvature.obs_prune import ObsPruneResult, obs_prune, sparsity_schedule
from torch_ext.curvature.prune_masks import PruneMasks
from torch_ext.curvature.prune_model import PruneModelResult, prune_model
from torch_ext.curvature.static_fisher import StaticFisher

__all__ = [
    "FisherWindow",
    "ObsPruneResult",
    "PruneMasks",
    "PruneModelResult",
    "StaticFisher",
    "hutchinson_diag",
    "hvp",
    "obs_prune",
    "prune_model",
    "sparsity_schedule",
]
