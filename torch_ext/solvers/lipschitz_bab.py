"""Branch and bound on the local Lipschitz constant."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torch_ext.ops._lipschitz_layers import encode


class LipschitzBabResult(NamedTuple):
    """What :func:`lipschitz_bab` returns: ``lower <= L <= upper``, whenever it stops."""

    upper: float
    lower: float  #: a norm of J at some point of the box
    nodes: int  #: boxes bounded, the root included


def lipschitz_bab(
    model: nn.Module,
    lo: Tensor,
    hi: Tensor,
    *,
    output: int | None = None,
    split: Literal["input", "activation"] = "input",
    max_nodes: int = 1000,
    max_seconds: float | None = None,
    tol: float = 1e-6,
    safe: bool = False,
) -> LipschitzBabResult:
    """Tightens :func:`torch_ext.ops.local_lipschitz` on one box by splitting it, best first, up to 128 at a time.

    ``"input"`` halves the box along the feature of the largest width times ``|J|`` and bounds both halves anew. It
    converges to ``L`` where kinks of the network do not coincide (a network without biases keeps all of them at 0); for
    few features. ``"activation"`` fixes the slope of an open ReLU to one of its ends and keeps the forward bounds. It
    converges to the largest norm over all patterns of the open ReLUs, which need not occur in the box: an upper bound
    of ``L``; for many features. A child's bound is never above its parent's, so more nodes never loosen the result.

    Args:
        model: as in :func:`torch_ext.ops.local_lipschitz`.
        lo, hi: the box, shaped like one input of the model.
        output: the row of ``J``; the largest of all rows if not given.
        split: see above.
        max_nodes: >= 1.
        max_seconds: wall time, looked at between batches.
        tol: stops at ``upper - lower <= tol * upper``.
        safe: round outward.

    Raises:
        ValueError: an option; ``split="activation"`` with smooth activations; what ``local_lipschitz`` raises.
        TypeError: a layer without a bound, named by its path.
    """
    return LipschitzBabResult(
        *torch.ops.torch_ext.lipschitz_bab(
            *encode(model),
            lo,
            hi,
            output,
            split=split,
            max_nodes=max_nodes,
            max_seconds=max_seconds,
            tol=tol,
            safe=safe,
        )
    )
