"""Hutchinson's estimate of the Hessian diagonal."""

from collections.abc import Iterable

from torch import Tensor

from torch_ext import _C


def hutchinson_diag(loss: Tensor, params: Iterable[Tensor], *, n_samples: int = 1, seed: int = 0) -> list[Tensor]:
    """(1/S) sum_s z_s * (H z_s) with S joint Rademacher probes, unbiased for diag(H).

    The variance of element i is (1/S) sum over j != i of H_ij^2 (Bekas, Kokiopoulou and Saad 2007).

    Args:
        loss: a scalar with a graph, which is kept.
        params: leaf tensors.
        n_samples: S >= 1.
        seed: key of the probes; the same seed gives the same estimate on every device.

    Returns:
        one tensor per parameter, in its shape (float32 for half-precision parameters), without graph.

    Raises:
        ValueError: n_samples < 1.
        RuntimeError: the loss is no scalar with a graph, or an op has no second derivative.
    """
    return _C.hutchinson_diag(loss, list(params), n_samples, seed)
