"""Auxiliary losses of mixtures of experts, to compare routing without them.

Differentiable in the logits, computed in float32 (float64 for float64 logits); rows that are not valid are left out of
every mean. ValueError for shapes, devices, unknown words; TypeError for dtypes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossScore = Literal["sigmoid", "softmax", "sqrtsoftplus"]


def balance_loss(
    logits: Tensor,
    counts: Tensor,
    coef: float = 1e-2,
    *,
    score: LossScore = "softmax",
    valid: Tensor | None = None,
) -> Tensor:
    """``coef * E * sum_e f_e P_e``, ``f = counts / counts.sum()`` (constant), P the mean share of the scores.

    ``logits`` ``[T, E]``, ``counts`` ``[E]``, ``valid`` ``[T]``. It is ``coef`` at perfect balance. With the counts of
    the micro-batch it is the loss of Switch and GShard (arXiv:2101.03961, Eq. 4); with counts summed over processes and
    micro-batches, the global-batch loss (arXiv:2501.11873).
    """
    loss: Tensor = torch.ops.torch_ext.moe_balance_loss(logits, counts, coef, score, valid)
    return loss


def sequence_loss(
    logits: Tensor,
    top_k: int,
    alpha: float = 1e-4,
    *,
    score: LossScore = "sigmoid",
    valid: Tensor | None = None,
) -> Tensor:
    """The sequence-wise loss of DeepSeek-V3 (arXiv:2412.19437, Eq. 17 to 20), averaged over sequences.

    ``alpha * sum_e f_e P_e`` per sequence, ``f_e = E / (K S)`` times how often e is among the K largest scores, without
    bias, of the S tokens (constant). ``logits`` ``[B, S, E]``, ``valid`` ``[B, S]``.
    """
    loss: Tensor = torch.ops.torch_ext.moe_sequence_loss(logits, top_k, alpha, score, valid)
    return loss


def z_loss(logits: Tensor, coef: float = 1e-3, *, valid: Tensor | None = None) -> Tensor:
    """``coef * mean(logsumexp(logits)**2)`` over tokens (arXiv:2202.08906, Eq. 5). ``logits`` ``[..., E]``."""
    loss: Tensor = torch.ops.torch_ext.moe_z_loss(logits, coef, valid)
    return loss
