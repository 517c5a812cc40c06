"""Optimizers: ``torch.optim.Optimizer`` subclasses on the library's fused kernels."""

from torch_ext.optim.adahessian import AdaHessian

__all__ = ["AdaHessian"]
