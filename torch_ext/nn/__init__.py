"""Modules."""

from torch_ext.nn.sinkhorn_loss import SinkhornLoss

__all__ = ["SinkhornLoss"]
