"""Dispatcher operators that stand on their own."""

from torch_ext.ops.philox4x32 import philox4x32
from torch_ext.ops.rademacher import rademacher_
from torch_ext.ops.snell import snell_linear, snell_merge

__all__ = ["philox4x32", "rademacher_", "snell_linear", "snell_merge"]
