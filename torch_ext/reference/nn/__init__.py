"""Reference versions of ``torch_ext.nn``."""

from torch_ext.reference.nn.snell_linear import budget_split, budget_sparsity, snell_init

__all__ = ["budget_split", "budget_sparsity", "snell_init"]
