"""Philox4x32-10, the counter-based generator behind every random number of the pack."""

import torch
from torch import Tensor


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32 (Salmon, Moraes, Dror and Shaw, SC 2011).

    Args:
        counter: int64 ``[..., 4]``, each word taken modulo 2^32.
        key: int64 ``[..., 2]``, the same; leading dimensions broadcast against those of ``counter``.

    Returns:
        int64 ``[..., 4]`` in [0, 2^32).

    Raises:
        TypeError: another dtype.
        ValueError: a last dimension other than 4 and 2, or two devices.
    """
    words: Tensor = torch.ops.torch_ext.philox4x32(counter, key)
    return words
