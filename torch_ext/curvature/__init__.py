"""Second-order information: Hessian-vector products and estimates of the Hessian diagonal."""

from torch_ext.curvature.fisher_window import FisherWindow
from torch_ext.curvature.hutchinson_diag import hutchinson_diag
from torch_ext.curvature.hvp import hvp

__all__ = ["FisherWindow", "hutchinson_diag", "hvp"]
