"""EGGROLL's noise, layers and update (arXiv:2511.16652) in plain torch, with every perturbation written out.

Noise is bit-equal to the kernels': it is a function of (seed, epoch, pair, ordinal, tag, element) through
Philox4x32-10, and only correctly rounded operations lie between. The layers form ``W + s sigma E`` for each member,
which the operators never do, so they agree up to rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from torch_ext.reference.ops.philox4x32 import philox4x32, philox_counter, philox_key

FACTOR_A, FACTOR_B, VECTOR = 0, 1, 2
PER_BLOCK = {"gaussian": 4, "binomial16": 8, "binomial64": 2, "rademacher": 128}
UNITS = {"binomial16": 2, "binomial64": 4, "rademacher": 1}  # times an element: an integer
#: E z^4 of each law; the gaussian one is that of the interpolated quantiles.
FOURTH_MOMENT = {"gaussian": 2.99662, "binomial16": 2.875, "binomial64": 2.96875, "rademacher": 1.0}
_LAST_KNOT = 3.7978908433  # instead of infinity: makes the variance 1


def gaussian_knots() -> Tensor:
    """float32 [1025]: quantiles of N(0, 1) at 1/2 + c / 2048."""
    quantile = NormalDist().inv_cdf
    knots = [0.0, *(quantile(0.5 + c / 2048) for c in range(1, 1024)), _LAST_KNOT]
    return torch.tensor(knots, dtype=torch.float64).float()


_KNOTS = gaussian_knots()


def _gaussian(words: Tensor) -> Tensor:
    cell, fraction = (words >> 21) & 1023, (words & 0x1FFFFF).float()
    slope = (_KNOTS[1:] - _KNOTS[:-1]) * 2.0**-21
    magnitude = _KNOTS[cell] + slope[cell] * fraction
    return torch.where((words >> 31) != 0, -magnitude, magnitude)


def _ones(words: Tensor, bits: int) -> Tensor:
    return ((words.unsqueeze(-1) >> torch.arange(bits)) & 1).sum(-1)


def noise(numel: int, *, seed: int, pair: int, ordinal: int, tag: int, epoch: int = 0, law: str = "gaussian") -> Tensor:
    """The first ``numel`` elements of one stream, float32."""
    block = torch.arange((numel + PER_BLOCK[law] - 1) // PER_BLOCK[law], dtype=torch.int64)
    counter = philox_counter(block, stream=pair, ordinal=ordinal, tag=tag, epoch=epoch)
    words = philox4x32(counter, philox_key(seed))  # [blocks, 4]
    if law == "gaussian":
        z = _gaussian(words)
    elif law == "binomial16":
        halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
        z = (_ones(halves, 16) - 8).float() / 2
    elif law == "binomial64":
        z = (_ones(words, 32).reshape(-1, 2).sum(-1) - 32).float() / 4
    elif law == "rademacher":
        z = ((words.unsqueeze(-1) >> torch.arange(32)) & 1).float() * 2 - 1
    else:
        raise ValueError(f"law must be one of {sorted(PER_BLOCK)}, got {law!r}")
    return z.reshape(-1)[:numel]


def eggroll_noise(
    rows: int,
    rank: int,
    *,
    seed: int,
    ordinal: int,
    tag: int,
    pair_begin: int,
    pair_end: int,
    epoch: int = 0,
    law: str = "gaussian",
    row_begin: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``[pairs, rows, rank]``."""
    streams = [
        noise((row_begin + rows) * rank, seed=seed, pair=pair, ordinal=ordinal, tag=tag, epoch=epoch, law=law)
        for pair in range(pair_begin, pair_end)
    ]
    z = torch.stack(streams) if streams else torch.empty(0, (row_begin + rows) * rank)
    z = z[:, row_begin * rank :].reshape(len(streams), rows, rank)
    return (z * UNITS[law]).to(dtype) if dtype == torch.int8 else z.to(dtype)


def pair_and_sign(member: int, antithetic: bool) -> tuple[int, int]:
    """The noise that a member sees, and its sign."""
    return (member // 2, 1 - 2 * (member % 2)) if antithetic else (member, 1)


def direction(
    shape: Sequence[int],
    *,
    kind: str,
    seed: int,
    pair: int,
    ordinal: int,
    epoch: int = 0,
    rank: int = 1,
    law: str = "gaussian",
    dtype: torch.dtype = torch.float64,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """``E_p`` of a parameter of ``dtype``, computed in ``compute``: ``A B^T / sqrt(rank)``, or ``eps`` for a vector."""
    common = {"seed": seed, "ordinal": ordinal, "epoch": epoch, "law": law}
    if kind == "vector":
        z = noise(math.prod(shape), pair=pair, tag=VECTOR, **common)  # type: ignore[arg-type]
        return z.to(dtype).to(compute).reshape(tuple(shape))
    rows, columns = shape[0], math.prod(shape[1:])
    a = noise(rows * rank, pair=pair, tag=FACTOR_A, **common).to(dtype).to(compute)  # type: ignore[arg-type]
    b = noise(columns * rank, pair=pair, tag=FACTOR_B, **common).to(dtype).to(compute)  # type: ignore[arg-type]
    return (a.reshape(rows, rank) @ b.reshape(columns, rank).T / math.sqrt(rank)).reshape(tuple(shape))


def perturbed(
    theta: Tensor,
    member: int,
    *,
    kind: str,
    ordinal: int,
    seed: int = 0,
    epoch: int = 0,
    antithetic: bool = True,
    sigma: float = 1e-2,
    rank: int = 1,
    law: str = "gaussian",
) -> Tensor:
    """``theta + s sigma E`` of one member, in float64."""
    if ordinal < 0:
        return theta.double()
    pair, sign = pair_and_sign(member, antithetic)
    e = direction(
        theta.shape,
        kind=kind,
        seed=seed,
        pair=pair,
        ordinal=ordinal,
        epoch=epoch,
        rank=rank,
        law=law,
        dtype=theta.dtype,
    )
    return theta.double() + sign * sigma * e


def eggroll_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ordinal: int,
    bias_ordinal: int = -1,
    *,
    transposed: bool = False,
    member_begin: int = 0,
    **noise_options: object,
) -> Tensor:
    """float64 ``[members, ..., m]``, one member after another."""
    out = []
    for i, rows in enumerate(x.double()):
        w = perturbed(weight, member_begin + i, kind="matrix", ordinal=ordinal, **noise_options)  # type: ignore[arg-type]
        y = rows @ (w if transposed else w.T)
        if bias is not None:
            y = y + perturbed(bias, member_begin + i, kind="vector", ordinal=bias_ordinal, **noise_options)  # type: ignore[arg-type]
        out.append(y)
    return torch.stack(out)


def eggroll_update(
    coeff: Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    ordinal: int,
    kind: str = "matrix",
    rank: int = 1,
    epoch: int = 0,
    law: str = "gaussian",
    pair_begin: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``sum_k coeff[k] E_{pair_begin + k}`` in float64."""
    total = torch.zeros(tuple(shape), dtype=torch.float64)
    for k, c in enumerate(coeff.double()):
        total += c * direction(
            shape,
            kind=kind,
            seed=seed,
            pair=pair_begin + k,
            ordinal=ordinal,
            epoch=epoch,
            rank=rank,
            law=law,
            dtype=dtype,
        )
    return total


def seeded_noise_add_(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    seed: int,
    ordinals: Sequence[int],
    stream: int,
    epoch: int = 0,
    law: str = "gaussian",
) -> None:
    """``tensors[i] += scales[i] * eps_i`` with one rounding to the tensor's type."""
    with torch.no_grad():
        for tensor, scale, ordinal in zip(tensors, scales, ordinals, strict=True):
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            z = noise(tensor.numel(), seed=seed, pair=stream, ordinal=ordinal, tag=VECTOR, epoch=epoch, law=law)
            z = z.to(tensor.dtype).to(wide).reshape(tensor.shape)
            tensor.copy_(tensor.to(wide) + torch.tensor(scale, dtype=wide) * z)
