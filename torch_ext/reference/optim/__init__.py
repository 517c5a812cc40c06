"""Reference versions of ``torch_ext.optim``."""

from torch_ext.reference.optim.adahessian import AdaHessianReference
from torch_ext.reference.optim.alflb import ALFLBReference
from torch_ext.reference.optim.eggroll import EggrollReference
from torch_ext.reference.optim.mezo import MeZOReference
from torch_ext.reference.optim.mfac import MFACReference

__all__ = [
    "ALFLBReference",
    "AdaHessianReference",
    "EggrollReference",
    "MFACReference",
    "MeZOReference",
]
