"""Rademacher signs (+1 or -1 with probability 1/2), one bit of Philox4x32-10 per element.

Element ``e`` (row-major logical index, whatever the strides) reads bit ``j = e % 128`` of block ``e // 128``: bit ``j
% 32``, least significant first, of word ``j // 32``. The bit 1 is +1, the bit 0 is -1. Tag 3; for Hessian probes
``stream`` is the sample, ``epoch`` the index of the curvature refresh, ``ordinal`` the running index of the parameter
over the groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_ext.reference.ops.philox4x32 import philox4x32, philox_counter, philox_key

RADEMACHER_TAG = 3


def rademacher(
    shape: Sequence[int],
    *,
    seed: int,
    stream: int = 0,
    ordinal: int = 0,
    epoch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A tensor of ``shape`` filled with signs; equal arguments give equal signs on every machine."""
    numel = math.prod(shape)
    block = torch.arange((numel + 127) // 128, dtype=torch.int64)
    counter = philox_counter(block, stream=stream, ordinal=ordinal, tag=RADEMACHER_TAG, epoch=epoch)
    words = philox4x32(counter, philox_key(seed))  # [blocks, 4]
    bits = (words.unsqueeze(-1) >> torch.arange(32)) & 1  # [blocks, 4, 32]
    return (bits.reshape(-1)[:numel] * 2 - 1).to(dtype).reshape(tuple(shape))


def rademacher_(tensor: Tensor, seed: int, stream: int = 0, *, ordinal: int = 0, epoch: int = 0) -> Tensor:
    """Fills ``tensor`` in place and returns it."""
    signs = rademacher(tensor.shape, seed=seed, stream=stream, ordinal=ordinal, epoch=epoch, dtype=tensor.dtype)
    with torch.no_grad():
        return tensor.copy_(signs)
