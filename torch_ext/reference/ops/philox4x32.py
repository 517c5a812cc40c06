"""Philox4x32-10, the counter-based generator behind every random number of the library.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), the Random123 generator. Output
word j of block n depends on (counter n, key) only, so the numbers do not depend on threads, devices or the order of
calls.

Layout used everywhere in the library (each word is 32 bits)::

    key     = (seed & 0xffffffff, seed >> 32)                              seed: 64 bits
    counter = (block, stream, (ordinal << 8) | tag, epoch)

``ordinal`` (24 bits) is the running index of the parameter over all groups; ``tag`` (8 bits) says what the numbers
are for; the meaning of ``stream`` and ``epoch`` belongs to the tag.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # multipliers
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # Weyl steps of the key: golden ratio, sqrt(3) - 1
_LOW, _SHIFT = np.uint64(_MASK), np.uint64(32)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 ``[..., 4]``; the low 32 bits of each word are used.
        key: int64 ``[..., 2]``; leading dimensions broadcast against those of ``counter``.

    Returns:
        int64 ``[..., 4]``, every value in ``[0, 2**32)``.

    One round, with ``hi`` and ``lo`` the halves of the 64-bit product::

        (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))
        (k0, k1)         <- (k0 + W0, k1 + W1)  mod 2**32, between rounds
    """
    if counter.dtype != torch.int64 or key.dtype != torch.int64:
        raise TypeError(f"philox4x32: counter and key must be int64, got {counter.dtype} and {key.dtype}")
    if counter.dim() < 1 or counter.size(-1) != 4 or key.dim() < 1 or key.size(-1) != 2:
        raise ValueError(
            f"philox4x32: counter must be [..., 4] and key [..., 2], got {list(counter.shape)} and {list(key.shape)}"
        )
    c = counter.cpu().numpy().astype(np.uint64) & _LOW
    k = key.cpu().numpy().astype(np.uint64) & _LOW
    c0, c1, c2, c3 = (c[..., i] for i in range(4))
    k0, k1 = k[..., 0], k[..., 1]
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2  # 32 x 32 -> 64 bits, exact
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    words = np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.int64)
    return torch.from_numpy(words).to(counter.device)


def philox_key(seed: int) -> Tensor:
    """The two key words of a 64-bit seed (a negative int64 counts as its two's complement)."""
    return torch.tensor([seed & _MASK, (seed >> 32) & _MASK], dtype=torch.int64)


def philox_counter(block: Tensor, *, stream: int, ordinal: int, tag: int, epoch: int) -> Tensor:
    """The counters ``[..., 4]`` of the blocks ``block[...]``; every field is cut to its width."""
    third = ((ordinal & 0xFFFFFF) << 8) | (tag & 0xFF)
    fields = (block & _MASK, stream & _MASK, third, epoch & _MASK)
    return torch.stack([torch.as_tensor(f, dtype=torch.int64).expand(block.shape) for f in fields], dim=-1)
