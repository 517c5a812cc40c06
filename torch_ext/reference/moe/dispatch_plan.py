"""Movement of tokens to their experts and back, entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor


def dispatch_plan(
    ids: Tensor, num_experts: int, *, capacity: int | None = None, gates: Tensor | None = None, align: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """``offsets``, ``slot_of``, ``src_of`` of ``torch_ext.moe.dispatch_plan``."""
    entries = ids.flatten().tolist()
    rows = len(entries) if capacity is None else min(len(entries), num_experts * capacity)
    slot_of, src_of = [-1] * len(entries), [-1] * (rows + num_experts * (align - 1))
    offsets, at = [0], 0
    for expert in range(num_experts):
        mine = [i for i, id_ in enumerate(entries) if id_ == expert]
        if capacity is not None and len(mine) > capacity:
            if gates is None:
                mine = mine[:capacity]
            else:
                value = gates.flatten().tolist()
                mine = sorted(sorted(mine, key=lambda i: -value[i])[:capacity])  # a stable sort: ties by position
        for slot, i in enumerate(mine, at):
            slot_of[i], src_of[slot] = slot, i
        at += -(-len(mine) // align) * align
        offsets.append(at)
    return (
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(slot_of, dtype=torch.int32).view(ids.shape),
        torch.tensor(src_of, dtype=torch.int32),
    )


def permute(x: Tensor, slot_of: Tensor, src_of: Tensor) -> Tensor:
    rows = x[(src_of.clamp_min(0) // slot_of.size(1)).long()]
    return torch.where((src_of >= 0).unsqueeze(-1), rows, 0)


def combine(z: Tensor, gates: Tensor | None, slot_of: Tensor) -> Tensor:
    """In float32, or float64 for float64 rows."""
    wide = z.double() if z.dtype == torch.float64 else z.float()
    total = torch.zeros(slot_of.size(0), z.size(1), dtype=wide.dtype)
    for k in range(slot_of.size(1)):
        slot = slot_of[:, k].long()
        gate = 1 if gates is None else gates[:, k : k + 1]
        total = total + torch.where((slot >= 0).unsqueeze(-1), gate * wide[slot.clamp_min(0)], 0)
    return total.to(z.dtype)
