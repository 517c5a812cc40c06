"""Reference versions of ``torch_ext.optim``."""

from torch_ext.reference.optim.adahessian import AdaHessianReference

__all__ = ["AdaHessianReference"]
