"""Reference versions of ``torch_ext.curvature``."""

from torch_ext.reference.curvature.hutchinson_diag import hutchinson_diag
from torch_ext.reference.curvature.hvp import hvp

__all__ = ["hutchinson_diag", "hvp"]
