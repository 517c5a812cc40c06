"""Optimizers: ``torch.optim.Optimizer`` subclasses on the library's fused kernels."""

from torch_ext.optim.adahessian import AdaHessian
from torch_ext.optim.alflb import ALFLB
from torch_ext.optim.eggroll import Eggroll
from torch_ext.optim.mezo import MeZO
from torch_ext.optim.mfac import MFAC

__all__ = ["ALFLB", "MFAC", "AdaHessian", "Eggroll", "MeZO"]
