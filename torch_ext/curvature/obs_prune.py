"""Optimal-Brain-Surgeon pruning with the inverse of a Fisher matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_ext import _C
from torch_ext.curvature.static_fisher import StaticFisher


class ObsPruneResult(NamedTuple):
    """What :func:`obs_prune` returns; ``w`` and ``mask`` are tensors or lists, as the weights were."""

    w: Tensor | list[Tensor]
    mask: Tensor | list[Tensor]  # bool, True = kept
    predicted_loss_increase: Tensor  # delta^T F delta / 2 of the change delta of all weights, 0-dim float64


def obs_prune(
    w: Tensor | Sequence[Tensor],
    fisher: StaticFisher | Sequence[StaticFisher],
    sparsity: float,
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    update: Literal["joint", "independent"] = "joint",
) -> ObsPruneResult:
    """Sets those weights to zero that the quadratic model of the loss misses least, and moves the others to make up.

    With F^-1 the inverse of F restricted to the weights that ``mask`` keeps (arXiv:2107.03356, section 3.1), weights go
    in the order of rho_i = w_i^2 / (2 [F^-1]_ii), compared over all layers. Then, with S the set of them,

    - ``"joint"``: w -= F^-1_{:,S} ([F^-1]_SS)^-1 w_S, the minimum of the model with S at zero;
    - ``"independent"``: w -= F^-1 t with t_i = w_i / [F^-1]_ii on S, then w_S = 0: each weight as if it went alone.

    Args:
        w: one weight or a list, a layer each, of any shape. Not modified.
        fisher: its Fisher matrix or matrices; column e belongs to element e (row-major).
        sparsity: zeros of the returned masks / number of weights, in [0, 1), over all layers together.
        mask: bool, True = kept, in the shapes of ``w``. What it marks as pruned counts, stays pruned and is taken as
            zero; a weight that merely happens to be zero is not pruned.
        update: see above.

    Returns:
        (w, mask, predicted_loss_increase); pruned weights are exactly 0.

    Raises:
        ValueError: lengths, shapes, devices; weights that are not finite; a sparsity out of range or below that of
            ``mask``; an unknown update.
        TypeError: dtypes; a ``fisher`` of another kind.
    """
    weights = [w] if isinstance(w, Tensor) else list(w)
    layers = [fisher] if isinstance(fisher, StaticFisher) else list(fisher)
    for layer in layers:
        if not isinstance(layer, StaticFisher):
            raise TypeError(f"obs_prune: fisher must be a StaticFisher or a list of them, got {type(layer)}")
    if not weights:  # the dispatcher could not tell the device
        raise ValueError("no weights to prune")
    masks = [] if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    pruned, kept, increase = torch.ops.torch_ext.obs_prune(
        weights,
        [layer.gradients for layer in layers],
        [layer.factor for layer in layers],
        [layer.tail_factor for layer in layers],
        [layer.damping for layer in layers],
        [layer.block for layer in layers],
        sparsity,
        masks,
        update,
    )
    if isinstance(w, Tensor):
        return ObsPruneResult(pruned[0], kept[0], increase)
    return ObsPruneResult(pruned, kept, increase)


def sparsity_schedule(sparsity: float, recomputations: int, *, initial: float = 0.0) -> list[float]:
    """Sparsities of rounds between which gradients and Fisher matrix are computed anew.

    The kept fraction shrinks by the same factor each time: round j (from 1) ends at
    1 - (1 - initial) ((1 - sparsity) / (1 - initial))^(j / recomputations).

    Raises:
        ValueError: recomputations < 1, or not 0 <= initial <= sparsity < 1.
    """
    return _C.sparsity_schedule(sparsity, recomputations, initial)
