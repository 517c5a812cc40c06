"""Reference versions of ``torch_ext.nn``."""

from torch_ext.reference.nn.sinkhorn_loss import sinkhorn_loss
from torch_ext.reference.nn.snell_linear import budget_sparsity, budget_split, snell_init

__all__ = ["budget_sparsity", "budget_split", "sinkhorn_loss", "snell_init"]
