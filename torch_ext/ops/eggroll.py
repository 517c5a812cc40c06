"""EGGROLL: layers that every member of a population perturbs with low-rank noise which is never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Law = Literal["gaussian", "binomial16", "binomial64", "rademacher"]
Kind = Literal["matrix", "embedding", "vector"]


class EggrollNoise(NamedTuple):
    """Which noise a group of members sees (arXiv:2511.16652).

    Member ``i`` belongs to pair ``p = i // 2`` with sign ``s = +1`` for even ``i`` and ``-1`` for odd ``i``; without
    ``antithetic``, ``p = i`` and ``s = +1``. It uses ``W + s sigma E`` for a matrix, ``E = A_p B_p^T / sqrt(rank)``
    with ``A_p`` ``[m, rank]`` and ``B_p`` ``[n, rank]``, and ``theta + s sigma eps_p`` for a vector. All elements have
    mean 0 and variance 1 and are functions of ``(seed, epoch, p, ordinal, element)`` alone, with the same bits on every
    device; for bfloat16 and float16 parameters they are rounded to that type.
    """

    #: any 64 bits
    seed: int = 0
    #: number of the draw, in [0, 2**32)
    epoch: int = 0
    #: number of the member that row 0 of an input belongs to
    member_begin: int = 0
    antithetic: bool = True
    #: standard deviation of the perturbation, positive
    sigma: float = 1e-2
    #: in [1, min(m, n)]; at most 64 on CUDA
    rank: int = 1
    #: ``"gaussian"`` (to 3.8 standard deviations), ``"binomial16"``, ``"binomial64"`` (scaled binomials: 17 and 65
    #: equally spaced values) or ``"rademacher"``
    law: Law = "gaussian"


def eggroll_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: EggrollNoise,
    ordinal: int,
    bias_ordinal: int = -1,
    *,
    transposed: bool = False,
) -> Tensor:
    """``y_i = x_i (W + s sigma E)^T + bias + s sigma eps`` for all members: one matrix product serves them all.

    Args:
        x: ``[members, ..., n]``; ``x[i]`` is seen by member ``noise.member_begin + i``.
        weight: ``[m, n]``, of ``x``'s dtype.
        bias: ``[m]`` or None.
        noise: which noise.
        ordinal: running number of the parameter ``weight``, in [0, 2**24); -1: it is not perturbed.
        bias_ordinal: the same for ``bias``.
        transposed: multiply with ``W + s sigma E`` itself: ``x`` is then ``[members, ..., m]``, ``bias`` ``[n]``.

    Returns:
        ``[members, ..., m]`` in ``x``'s dtype. Differentiable, any number of times, in ``x``, ``weight`` and ``bias``;
        the noise counts as a constant.

    Raises:
        ValueError: shapes that do not fit, devices, numbers out of range, unknown words.
        TypeError: integer or complex tensors, different dtypes.
    """
    y: Tensor = torch.ops.torch_ext.eggroll_linear(
        x, weight, bias, **noise._asdict(), ordinal=ordinal, bias_ordinal=bias_ordinal, transposed=transposed
    )
    return y


def eggroll_embedding(ids: Tensor, weight: Tensor, noise: EggrollNoise, ordinal: int) -> Tensor:
    """Rows ``weight[id] + s sigma E[id]``.

    Args:
        ids: ``[members, ...]``, int64 or int32.
        weight: ``[entries, n]``.
        noise: which noise.
        ordinal: running number of the parameter, -1: not perturbed.

    Returns:
        ``[members, ..., n]``, differentiable in ``weight``.

    Raises:
        IndexError: an id outside [0, entries); on CUDA the kernel traps. Else as :func:`eggroll_linear`.
    """
    rows: Tensor = torch.ops.torch_ext.eggroll_embedding(ids, weight, **noise._asdict(), ordinal=ordinal)
    return rows


def eggroll_vector(theta: Tensor, members: int, noise: EggrollNoise, ordinal: int) -> Tensor:
    """``theta + s sigma eps`` for ``members`` members: ``[members, *theta.shape]``, differentiable in ``theta``."""
    out: Tensor = torch.ops.torch_ext.eggroll_vector(theta, members, **noise._asdict(), ordinal=ordinal)
    return out


def eggroll_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: EggrollNoise,
    ordinal: int,
    bias_ordinal: int = -1,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Convolution whose weight counts as the matrix ``[out, channels * kh * kw]`` of the unfolded input.

    Args:
        x: ``[members, channels, height, width]`` or ``[members, batch, channels, height, width]``.
        weight: ``[out, channels, kh, kw]``.
        bias: ``[out]`` or None.
        noise: which noise.
        ordinal: running number of the parameter ``weight``, -1: not perturbed.
        bias_ordinal: the same for ``bias``.
        stride: two numbers, as in ``torch.nn.functional.conv2d``.
        padding: zeros on both sides.
        dilation: the same.

    Returns:
        ``[members, (batch,) out, height', width']``. Differentiable as :func:`eggroll_linear`. The input is unfolded
        for some members at a time, so beside the result memory does not grow with their number.

    Raises:
        As :func:`eggroll_linear`.
    """
    y: Tensor = torch.ops.torch_ext.eggroll_conv2d(
        x,
        weight,
        bias,
        **noise._asdict(),
        ordinal=ordinal,
        bias_ordinal=bias_ordinal,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    return y


def eggroll_update(
    coeff: Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    ordinal: int,
    kind: Kind = "matrix",
    rank: int = 1,
    epoch: int = 0,
    law: Law = "gaussian",
    pair_begin: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    row_begin: int = 0,
    row_end: int = -1,
    chunk_pairs: int = 0,
) -> Tensor:
    """``S = scale * sum_k coeff[k] E_{pair_begin + k}``, the population's noise weighted and summed.

    Args:
        coeff: float32 or float64 ``[pairs]``. For antithetic pairs the difference of the two members' weights.
        shape: of the parameter; more than two dimensions count as ``[shape[0], rest]``.
        seed: as in :class:`EggrollNoise`.
        ordinal: running number of the parameter.
        kind: ``"matrix"`` and ``"embedding"`` (the same), or ``"vector"`` with noise of full rank.
        rank: as in :class:`EggrollNoise`.
        epoch: the same.
        law: the same.
        pair_begin: pair that ``coeff[0]`` belongs to.
        scale: multiplies the sum, once, at the end.
        dtype: of the parameter; noise is rounded to it, as it was in the layers.
        row_begin: first of the rows (of the first dimension) that are computed, so that processes can share them out.
        row_end: end of these rows, -1: of all.
        chunk_pairs: pairs whose factors exist at a time, 0: as many as fit 8 MiB.

    Returns:
        ``[row_end - row_begin, *shape[1:]]``, float32, or float64 for ``dtype=torch.float64``, without gradient. With
        small integers for coefficients and a law other than gaussian the sums are exact, hence equal for every chunk,
        number of threads and device.

    Raises:
        ValueError: shapes, numbers out of range, unknown words.
        TypeError: other dtypes.
    """
    s: Tensor = torch.ops.torch_ext.eggroll_update(
        coeff,
        shape,
        kind=kind,
        seed=seed,
        ordinal=ordinal,
        epoch=epoch,
        pair_begin=pair_begin,
        rank=rank,
        law=law,
        scale=scale,
        dtype=dtype,
        row_begin=row_begin,
        row_end=row_end,
        chunk_pairs=chunk_pairs,
    )
    return s


def eggroll_perturb_(
    tensors: Sequence[Tensor], ordinals: Sequence[int], kinds: Sequence[Kind], noise: EggrollNoise
) -> None:
    """``tensors[i] += s sigma E_i`` in place for the member ``noise.member_begin``, rounded once.

    An ordinal of -1 leaves a tensor as it is. Any layout, dtype and device; call it under ``torch.no_grad()``. Rows are
    those that :func:`eggroll_embedding` returns, to the bit, on CPU and CUDA.
    """
    torch.ops.torch_ext.eggroll_perturb_(list(tensors), list(ordinals), list(kinds), **noise._asdict())


def seeded_noise_add_(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    seed: int,
    ordinals: Sequence[int],
    stream: int,
    epoch: int = 0,
    law: Law = "gaussian",
) -> None:
    """``tensors[i] += scales[i] * eps_i`` in place, ``eps_i`` the vector noise of pair ``stream``.

    Any layout, dtype and device; call it under ``torch.no_grad()``.
    """
    torch.ops.torch_ext.seeded_noise_add_(list(tensors), list(scales), seed, list(ordinals), stream, epoch, law)


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
    law: Law = "gaussian",
    row_begin: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The noise itself: rows ``row_begin``, ``row_begin + 1``, ... of the factors of a range of pairs.

    Args:
        rows: how many.
        rank: columns of the factor; 1 for a vector.
        seed: as in :class:`EggrollNoise`.
        ordinal: running number of the parameter.
        tag: 0 factor A, 1 factor B, 2 vector.
        pair_begin: first pair.
        pair_end: end of the pairs.
        epoch: as in :class:`EggrollNoise`.
        law: the same.
        row_begin: any; the rows equal those of a draw from 0.
        dtype: float32, float64, bfloat16, float16; int8 (not for the gaussian law) for ones - 8, ones - 32 and +-1.
        device: of the result.

    Returns:
        ``[pair_end - pair_begin, rows, rank]``.
    """
    out = torch.empty(pair_end - pair_begin, rows, rank, dtype=dtype, device=device)
    torch.ops.torch_ext.eggroll_noise_(out, seed, ordinal, tag, pair_begin, epoch, law, row_begin)
    return out
