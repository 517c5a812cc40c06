"""Movement of tokens to their experts and back, without a copy to the host and without atomics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DispatchPlan(NamedTuple):
    """Rows sorted by expert, equal experts in the order of (t, k); S rows in all, known from shapes alone.

    ``offsets`` ``[E + 1]``: expert e owns rows ``offsets[e]`` to ``offsets[e + 1] - 1``. ``slot_of`` ``[T, K]``: row of
    (t, k), or -1. ``src_of`` ``[S]``: ``t * K + k`` of a row, or -1. All int32.
    """

    offsets: Tensor
    slot_of: Tensor
    src_of: Tensor


def dispatch_plan(
    ids: Tensor, num_experts: int, *, capacity: int | None = None, gates: Tensor | None = None, align: int = 1
) -> DispatchPlan:
    """A stable counting sort of the entries (t, k) by expert.

    Args:
        ids: ``[T, K]`` int32 or int64 in ``[0, num_experts)``, or -1 for none, as :func:`torch_ext.moe.route` returns.
        capacity: most rows of an expert. Kept are the first in (t, k) order, or those with the largest ``gates`` (equal
            ones by position); gates of what is dropped are not redistributed.
        gates: ``[T, K]``, read with ``capacity`` only.
        align: every expert's segment is padded to a multiple of it, for grouped products.

    Returns:
        The plan; S is ``T * K``, with a capacity ``min(T * K, E * capacity)``, plus ``E * (align - 1)``. Rows past
        ``offsets[E]`` and those that pad a segment are empty.

    Raises:
        ValueError: shapes, an id out of range (CPU; on CUDA the entry is dropped), ``capacity`` or ``align`` below 1,
            2^31 rows or more.
        TypeError: dtypes.
    """
    return DispatchPlan(
        *torch.ops.torch_ext.moe_dispatch_plan(ids, num_experts, capacity=capacity, gates=gates, align=align)
    )


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """``x`` ``[T, D]`` -> ``[S, D]``: row s is token ``src_of[s] // K``, or zeros. Differentiable to any order."""
    rows: Tensor = torch.ops.torch_ext.moe_permute(x, None, plan.slot_of, plan.src_of)
    return rows


def combine(z: Tensor, gates: Tensor | None, plan: DispatchPlan) -> Tensor:
    """``z`` ``[S, D]`` -> ``[T, D]``: the sum over k of ``gates[t, k] * z[slot_of[t, k]]``.

    Added in the order of k in float32 (float64 for float64 rows), which is the dtype of ``gates``; None: all are 1.
    Differentiable to any order in both. The bits do not depend on threads or device.
    """
    tokens: Tensor = torch.ops.torch_ext.moe_combine(z, gates, plan.slot_of, plan.src_of)
    return tokens


def to_dense(gates: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """For callers that want dense tensors: gates ``[T, E]``, differentiable, and a bool map ``[T, E]``."""
    dense: tuple[Tensor, Tensor] = torch.ops.torch_ext.moe_to_dense(gates, ids, num_experts)
    return dense
