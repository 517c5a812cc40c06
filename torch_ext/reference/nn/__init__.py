"""Reference versions of ``torch_ext.nn``."""

from torch_ext.reference.nn.sinkhorn_loss import sinkhorn_loss

__all__ = ["sinkhorn_loss"]
