"""Initial factors of ``nn.SnellLinear`` and the budget of ``nn.SnellBudget`` (arXiv:2510.24037), in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_ext.reference.ops.philox4x32 import philox4x32, philox_counter, philox_key

INITIAL_TAG = 7


def snell_init(features: int, rank: int, stream: int, seed: int) -> Tensor:
    """``[2, features, rank / 2]`` uniform in +-1 / sqrt(features rank / 2); stream 0 is lora_in, 1 lora_out."""
    shape = (2, features, rank // 2)
    numel = 2 * features * (rank // 2)
    block = torch.arange((numel + 3) // 4)
    words = philox4x32(philox_counter(block, stream=stream, ordinal=0, tag=INITIAL_TAG, epoch=0), philox_key(seed))
    unit: Tensor = 2 * ((words.flatten()[:numel] >> 8) / 2.0**24).double() - 1
    bound: float = (features * (rank // 2)) ** -0.5
    return (unit * bound).reshape(shape)


def budget_sparsity(step: int, total: int, initial: float, target: float, warmup: int, final: int) -> float:
    """Sparsity of the whole model at a step, counted from 1."""
    if step <= warmup:
        return initial
    if step >= total - final:
        return target
    progress = (step - warmup) / (total - final - warmup)
    return target + (initial - target) * (1 - progress) ** 3


def budget_split(scores: Sequence[float], entries: Sequence[int], sparsity: float) -> list[float]:
    """Entries that each layer keeps: proportional to its score, at most all, the excess shared out again."""
    kept = [0.0] * len(scores)
    open_layers = list(range(len(scores)))
    budget = (1 - sparsity) * sum(entries)
    while open_layers:
        total = sum(scores[i] for i in open_layers)
        for i in open_layers:
            kept[i] = budget * scores[i] / total if total > 0 else 0.0
        full = [i for i in open_layers if kept[i] >= entries[i]]
        if not full:
            break
        for i in full:
            kept[i] = float(entries[i])
            budget -= entries[i]
            open_layers.remove(i)
    return kept
