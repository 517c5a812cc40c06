"""Rademacher (+1 / -1) probes that are never stored."""

import torch
from torch import Tensor


def rademacher_(tensor: Tensor, seed: int, stream: int, *, ordinal: int = 0, epoch: int = 0) -> Tensor:
    """Fills ``tensor`` with independent signs, a function of the seed and of each element's position only.

    Element e (row-major index) is bit e mod 128 of the Philox4x32-10 block with key ``seed`` and counter
    ``(e // 128, stream, ordinal << 8 | 3, epoch)``; a set bit is +1.

    Args:
        tensor: float32, float64, bfloat16 or float16 of any shape and layout.
        seed: 64-bit key.
        stream: in [0, 2^32), such as the number of a sample.
        ordinal: in [0, 2^24), such as the number of a parameter.
        epoch: in [0, 2^32), such as the number of a refresh.

    Returns:
        ``tensor``.

    Raises:
        TypeError: another dtype.
        ValueError: a counter out of range.
        RuntimeError: an expanded tensor.
    """
    torch.ops.torch_ext.rademacher_(tensor, seed, stream, ordinal, epoch)
    return tensor
