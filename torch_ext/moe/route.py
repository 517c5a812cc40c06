"""Routing of a mixture of experts without an auxiliary loss: scores, top-k, gates and loads in one operator."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Score = Literal["sigmoid", "softmax", "sqrtsoftplus", "none", "post_softmax"]
NanPolicy = Literal["propagate", "zero"]
CountIn = Literal["backward", "forward", "manual"]


class RouteResult(NamedTuple):
    """``gates`` ``[T, K]``, ``ids`` ``[T, K]`` int32, ``counts`` ``[E]`` int32, ``cutoff`` ``[T]`` or ``[0]``."""

    gates: Tensor
    ids: Tensor
    counts: Tensor
    cutoff: Tensor


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int = 2,
    score: Score = "sigmoid",
    normalize: bool = True,
    route_scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score_k: int = 2,
    nan_policy: NanPolicy = "propagate",
    count_in: CountIn = "backward",
    valid: Tensor | None = None,
    load: Tensor | None = None,
    histogram: Tensor | None = None,
    histogram_bounds: Tensor | None = None,
) -> RouteResult:
    """Sends each token to the ``top_k`` experts with the largest ``score + bias``; the bias is not in the gates.

    ::

        s = score(logits)                                  ids = top_k of s + bias, equal ones by the lower expert
        a = s[ids]                                         counts[e] = how often e is among the ids
        gates = route_scale * (a / (sum_k a + 1e-20) if normalize and top_k > 1 else a)

    Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437 (groups, scale); theory in arXiv:2512.03915.

    Args:
        logits: ``[T, E]``. Scores are computed in float32, of float64 logits in float64.
        bias: ``[E]`` float32, no gradient.
        top_k: K, experts per token.
        score: ``"sigmoid"``, ``"softmax"`` over all experts, ``"sqrtsoftplus"`` = ``sqrt(log(1 + exp(l)))``, ``"none"``
            = the logits, or ``"post_softmax"``: select by ``logits + bias``, gates = softmax of the selected logits.
        normalize: gates sum to ``route_scale``. With ``"softmax"`` they are the softmax of the selected logits, which
            is the same number.
        route_scale: 2.5 in DeepSeek-V3.
        num_groups, top_groups, group_score_k: experts in ``num_groups`` equal blocks; only the ``top_groups`` blocks
            with the largest sums of their ``group_score_k`` largest keys take part. DeepSeek-V3: 8, 4, 2.
            ``group_score_k`` is checked only if ``num_groups > 1``.
        nan_policy: gates of a row with a NaN score, or an infinite one among the selected: ``"propagate"`` NaN, so that
            a loss scaler sees it, or ``"zero"``. Its ids are distinct and in range either way.
        count_in: when ``load`` grows by ``counts``: in the ``"backward"`` pass of the gates, once however often that
            runs, which is right with every kind of activation checkpointing and adds nothing under ``no_grad``; in the
            ``"forward"`` pass; or never (``"manual"``).
        valid: ``[T]`` bool, False for padding: ids -1, gates 0, not counted.
        load: ``[E]`` int64.
        histogram, histogram_bounds: what the quantile rule of :class:`torch_ext.optim.ALFLB` collects: int64
            ``[E, bins]`` and float32 ``[2]``. ``histogram[e, b]`` counts the valid tokens with ``cutoff - s[:, e]`` in
            bin b of equal ones between the bounds (the outer bins take what lies outside), when ``load`` grows.

    Returns:
        ``gates`` ``[T, K]`` float32 (float64 for float64 logits), differentiable twice in ``logits``; ``ids`` ``[T,
        K]`` int32, largest key first; ``counts`` ``[E]`` int32; ``cutoff`` ``[T]``, the (K + 1)-th largest key, if
        there is a histogram, else ``[0]``. Scores, ids and counts have the same bits on CPU and CUDA and for any number
        of threads. Logits that are not selected get gradient 0 exactly, but for softmax without ``normalize``.

    Raises:
        ValueError: shapes, devices, unknown words, ``top_k`` outside [1, E], ``num_groups`` that does not divide E,
            groups with fewer than ``top_k`` experts, ``group_score_k`` larger than a group, a histogram with groups or
            with ``top_k`` = E.
        TypeError: dtypes.
    """
    return RouteResult(
        *torch.ops.torch_ext.moe_route(
            logits,
            bias,
            top_k=top_k,
            score=score,
            normalize=normalize,
            route_scale=route_scale,
            num_groups=num_groups,
            top_groups=top_groups,
            group_score_k=group_score_k,
            nan_policy=nan_policy,
            count_in=count_in,
            valid=valid,
            load=load,
            histogram=histogram,
            histogram_bounds=histogram_bounds,
        )
    )


def check_route_options(num_experts: int, **options: Any) -> None:
    """ValueError for options that :func:`route` would refuse for every tensor."""
    torch.ops.torch_ext.moe_route_check(num_experts, **options)
