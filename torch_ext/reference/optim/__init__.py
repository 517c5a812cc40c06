"""Reference versions of ``torch_ext.optim``."""

from torch_ext.reference.optim.adahessian import AdaHessianReference
from torch_ext.reference.optim.eggroll import EggrollReference
from torch_ext.reference.optim.mezo import MeZOReference
from torch_ext.reference.optim.mfac import MFACReference

__all__ = ["AdaHessianReference", "EggrollReference", "MFACReference", "MeZOReference"]
