"""Reference versions of ``torch_ext.moe``."""

from torch_ext.reference.moe.dispatch_plan import combine, dispatch_plan, permute
from torch_ext.reference.moe.layer import experts, grouped_mm
from torch_ext.reference.moe.losses import balance_loss, sequence_loss, z_loss
from torch_ext.reference.moe.route import route

__all__ = [
    "balance_loss",
    "combine",
    "dispatch_plan",
    "experts",
    "grouped_mm",
    "permute",
    "route",
    "sequence_loss",
    "z_loss",
]
