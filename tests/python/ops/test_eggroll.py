"""ops.eggroll_*: the noise to the bit, layers and update against the population written out, and the exact oracles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_ext import ops
from torch_ext.ops import EggrollNoise
from torch_ext.reference.ops import eggroll as reference

LAWS = ("gaussian", "binomial16", "binomial64", "rademacher")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
OPS = torch.ops.torch_ext


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300))


def draw(numel: int, law: str, **keys: Any) -> Tensor:
    settings = {"seed": 3, "ordinal": 1, "tag": 0, "pair_begin": 0, **keys}
    return ops.eggroll_noise(numel, 1, pair_end=settings["pair_begin"] + 1, law=law, **settings).flatten()  # type: ignore[arg-type]


# --- 1: the noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_1_noise_equals_the_reference(law: str) -> None:
    for rows, rank in ((0, 1), (1, 1), (7, 2), (130, 3), (1024, 1), (5000, 1)):
        keys: dict[str, Any] = {"seed": -(2**62) + 5, "ordinal": 2**24 - 1, "tag": 2, "epoch": 2**32 - 1, "law": law}
        pairs = {"pair_begin": 2**31 - 1, "pair_end": 2**31 + 1}
        got = ops.eggroll_noise(rows, rank, **keys, **pairs)
        assert torch.equal(got, reference.eggroll_noise(rows, rank, **keys, **pairs))
        assert torch.equal(torch.signbit(got), torch.signbit(reference.eggroll_noise(rows, rank, **keys, **pairs)))


@pytest.mark.parametrize("law", LAWS)
def test_1_a_range_equals_the_slice(law: str) -> None:
    whole = draw(3000, law)
    for begin, end in ((0, 1), (1, 2), (3, 130), (127, 129), (255, 257), (1000, 3000), (2999, 3000)):
        assert torch.equal(draw(end - begin, law, row_begin=begin), whole[begin:end])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_1_narrow_types_round_to_nearest_even(law: str, dtype: torch.dtype) -> None:
    assert torch.equal(draw(999, law, dtype=dtype), draw(999, law).to(dtype))


@pytest.mark.parametrize("law", LAWS[1:])
def test_1_int8_units(law: str) -> None:
    units = draw(999, law, dtype=torch.int8)
    assert units.dtype == torch.int8
    assert torch.equal(units.float() / reference.UNITS[law], draw(999, law))


@pytest.mark.parametrize("law", LAWS)
def test_1_moments(law: str) -> None:
    z = draw(1_000_000, law).double()
    assert abs(z.mean().item()) < 4e-3
    assert abs(z.var().item() - 1) < 5e-3
    fourth = z.pow(4)
    assert abs(fourth.mean().item() - reference.FOURTH_MOMENT[law]) < 5 * fourth.std().item() / 1000 + 1e-12
    assert abs(z.pow(3).mean().item()) < 5 * z.pow(3).std().item() / 1000
    if law == "gaussian":
        assert z.abs().max().item() < 3.798
        assert abs(z.pow(6).mean().item() - 14.864) < 5 * z.pow(6).std().item() / 1000


def test_1_moments_of_the_gaussian_law_are_exact() -> None:
    """Piecewise linear in a uniform variable, so its moments are sums over the table."""
    low, high = reference.gaussian_knots().double()[:-1], reference.gaussian_knots().double()[1:]

    def moment(order: int) -> float:
        return float(sum(low**k * high ** (order - k) for k in range(order + 1)).mean()) / (order + 1)

    assert moment(2) == pytest.approx(1, abs=1e-8)
    assert moment(4) == pytest.approx(2.99662, abs=1e-5)
    assert moment(6) == pytest.approx(14.864, abs=1e-3)


def test_1_table_is_the_quantile_function() -> None:
    """The first element of each cell, found among many draws, is the knot."""
    z = draw(200_000, "gaussian").abs().sort().values
    knots = reference.gaussian_knots()
    u = (torch.searchsorted(knots, z) - 1).clamp(0, 1023)
    counts = torch.bincount(u, minlength=1024).double()
    assert (counts - 200_000 / 1024).abs().max().item() < 6 * math.sqrt(200_000 / 1024)


# --- 2: pairs and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_2_members_of_a_pair_are_opposite(law: str) -> None:
    noise = EggrollNoise(seed=5, sigma=0.25, rank=2, law=law)  # type: ignore[arg-type]
    out = ops.eggroll_vector(torch.zeros(50), 6, noise, 3)
    assert torch.equal(out[0::2], -out[1::2])
    x = torch.randn(1, 3, 8).expand(6, 3, 8)
    y = ops.eggroll_linear(x, torch.zeros(5, 8), None, noise, 0)
    assert torch.equal(y[0::2], -y[1::2])
    assert y[0].abs().max() > 0
    free = ops.eggroll_vector(torch.zeros(50), 6, noise._replace(antithetic=False), 3)
    assert torch.equal(free[:3], out[0::2])


@pytest.mark.parametrize("law", LAWS)
def test_2_streams_are_uncorrelated(law: str) -> None:
    n = 100_000
    base = {"ordinal": 4, "tag": 0, "pair_begin": 6, "epoch": 2}
    one = draw(n, law, **base).double()
    for change in ({"ordinal": 5}, {"tag": 1}, {"tag": 2}, {"pair_begin": 7}, {"epoch": 3}, {"seed": 4}):
        other = draw(n, law, **{**base, **change}).double()
        assert abs(float((one * other).mean())) < 4 / math.sqrt(n), change
    for lag in (1, 2, 3, 4, 8, 128):
        assert abs(float((one[lag:] * one[:-lag]).mean())) < 4 / math.sqrt(n)


# --- 3: the layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_3_linear_is_the_materialised_one(dtype: torch.dtype, rank: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n = 7, 13
    w = torch.randn(m, n, generator=generator).to(dtype)
    bias = torch.randn(n if transposed else m, generator=generator).to(dtype)
    for law in LAWS:
        for rows, members, begin, antithetic in (((), 6, 0, True), ((3,), 5, 3, True), ((2, 70), 3, 2, False)):
            x = torch.randn(members, *rows, m if transposed else n, generator=generator).to(dtype)
            options: dict[str, Any] = {"seed": 9, "epoch": 4, "antithetic": antithetic, "sigma": 0.3, "rank": rank}
            noise = EggrollNoise(member_begin=begin, law=law, **options)  # type: ignore[arg-type]
            for b, ordinals in ((None, (2, -1)), (bias, (2, 3)), (bias, (2, -1)), (bias, (-1, 3)), (bias, (-1, -1))):
                y = ops.eggroll_linear(x, w, b, noise, *ordinals, transposed=transposed)
                expected = reference.eggroll_linear(
                    x, w, b, *ordinals, transposed=transposed, member_begin=begin, law=law, **options
                )
                assert y.dtype == dtype
                assert y.shape == expected.shape
                assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_3_embedding_and_perturb_agree_to_the_bit(law: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(70, 300, generator=generator).to(dtype)
    ids = torch.randint(0, 70, (4, 5, 2), generator=generator)
    noise = EggrollNoise(seed=1, epoch=2, member_begin=3, sigma=0.4, rank=3, law=law)  # type: ignore[arg-type]
    rows = ops.eggroll_embedding(ids, w, noise, 6)
    assert torch.equal(ops.eggroll_embedding(ids.int(), w, noise, 6), rows)
    for i in range(4):
        changed = w.clone()
        ops.eggroll_perturb_([changed], [6], ["embedding"], noise._replace(member_begin=3 + i))
        assert torch.equal(changed[ids[i]], rows[i])
        options = {"seed": 1, "epoch": 2, "sigma": 0.4, "rank": 3, "law": law}
        expected = reference.perturbed(w, 3 + i, kind="matrix", ordinal=6, **options)  # type: ignore[arg-type]
        assert relative_error(changed, expected) < TOLERANCE[dtype]
    assert torch.equal(ops.eggroll_embedding(ids, w, noise, -1), w[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_3_vector_and_perturb_agree_to_the_bit(dtype: torch.dtype) -> None:
    theta = torch.randn(3, 1700).to(dtype)
    for law in LAWS:
        noise = EggrollNoise(seed=1, member_begin=1, sigma=0.4, law=law)  # type: ignore[arg-type]
        out = ops.eggroll_vector(theta, 4, noise, 2)
        for i in range(4):
            changed = theta.clone()
            ops.eggroll_perturb_([changed], [2], ["vector"], noise._replace(member_begin=1 + i))
            assert torch.equal(changed, out[i])
            expected = reference.perturbed(theta, 1 + i, kind="vector", ordinal=2, seed=1, sigma=0.4, law=law)
            assert relative_error(out[i], expected) < TOLERANCE[dtype]
    assert torch.equal(ops.eggroll_vector(theta, 2, noise, -1), theta.expand(2, 3, 1700))


def test_3_perturb_in_every_layout() -> None:
    noise = EggrollNoise(sigma=0.4, rank=2)
    plain = torch.zeros(6, 4, 3, 5)
    ops.eggroll_perturb_([plain], [1], ["matrix"], noise)
    assert torch.equal(plain.view(6, 60), ops.eggroll_embedding(torch.arange(6)[None], torch.zeros(6, 60), noise, 1)[0])
    for other in (torch.zeros(5, 3, 4, 6).permute(3, 2, 1, 0), torch.zeros(6, 4, 3, 10)[..., ::2]):
        untouched = torch.zeros(4)
        ops.eggroll_perturb_([other, untouched], [1, -1], ["matrix", "vector"], noise)
        assert torch.equal(other, plain)
        assert torch.equal(untouched, torch.zeros(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_seeded_noise_add(dtype: torch.dtype) -> None:
    tensors = [torch.randn(33).to(dtype), torch.randn(20, 50).to(dtype).t(), torch.randn(()).to(dtype)]
    for law in LAWS:
        expected = [t.clone() for t in tensors]
        reference.seeded_noise_add_(expected, [0.5, -0.1, 3.0], 8, [0, 7, 9], 5, 6, law)
        got = [t.clone() for t in tensors]
        ops.seeded_noise_add_(got, [0.5, -0.1, 3.0], 8, [0, 7, 9], 5, 6, law)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("geometry", [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 1)), ((1, 2), (2, 0), (2, 1))])
def test_3_conv2d_is_the_materialised_one(dtype: torch.dtype, geometry: Any) -> None:
    stride, padding, dilation = geometry
    w, bias = torch.randn(5, 3, 3, 2, dtype=dtype), torch.randn(5, dtype=dtype)
    x = torch.randn(6, 2, 3, 9, 8, dtype=dtype)
    options: dict[str, Any] = {"seed": 2, "sigma": 0.3, "rank": 2}
    noise = EggrollNoise(member_begin=1, **options)
    y = ops.eggroll_conv2d(x, w, bias, noise, 0, 1, stride=stride, padding=padding, dilation=dilation)
    for i in range(6):
        kernel = reference.perturbed(w, 1 + i, kind="matrix", ordinal=0, **options)
        offset = reference.perturbed(bias, 1 + i, kind="vector", ordinal=1, **options)
        expected = torch.nn.functional.conv2d(x[i].double(), kernel, offset, stride, padding, dilation)
        assert relative_error(y[i], expected) < TOLERANCE[dtype]
    single = ops.eggroll_conv2d(x[:, 0], w, bias, noise, 0, 1, stride=stride, padding=padding, dilation=dilation)
    assert single.shape == y[:, 0].shape
    assert relative_error(single, y[:, 0]) < TOLERANCE[dtype]


def test_conv2d_in_chunks_equals_the_whole() -> None:
    """70 members of 9 x 64 x 64 unfolded numbers each are more than one chunk."""
    w, x = torch.randn(2, 4, 3, 3), torch.randn(70, 4, 50, 50)
    noise = EggrollNoise(sigma=0.3)
    y = ops.eggroll_conv2d(x, w, None, noise, 0)
    for i in (0, 1, 45, 46, 69):
        alone = ops.eggroll_conv2d(x[i : i + 1], w, None, noise._replace(member_begin=i), 0)
        assert relative_error(y[i : i + 1], alone) < 1e-5


# --- 4: the update --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["matrix", "embedding", "vector"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_4_update_is_the_sum_over_members(kind: Any, rank: int) -> None:
    """sum_i z_i s_i E_i over members, brute force, against the pair form."""
    z = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for law in LAWS:
        keys: dict[str, Any] = {"seed": 4, "ordinal": 3, "epoch": 2, "rank": rank, "law": law}
        total = torch.zeros(7, 13, dtype=torch.float64)
        for i in range(24):
            pair, sign = reference.pair_and_sign(i, True)
            total += z[i] * sign * reference.direction((7, 13), kind=kind, pair=pair, **keys)
        c = z[0::2] - z[1::2]
        s = ops.eggroll_update(c, (7, 13), kind=kind, dtype=torch.float64, **keys)
        assert s.dtype == torch.float64
        assert relative_error(s, total) < 1e-12
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)):
            narrow = ops.eggroll_update(c.float(), (7, 13), kind=kind, dtype=dtype, **keys)
            assert narrow.dtype == torch.float32
            expected = reference.eggroll_update(c, (7, 13), kind=kind, dtype=dtype, **keys)
            assert relative_error(narrow, expected) < tolerance


@pytest.mark.parametrize("law", LAWS[1:])
@pytest.mark.parametrize("kind", ["matrix", "vector"])
def test_4_integer_laws_are_exact(law: Any, kind: Any) -> None:
    c = torch.randint(-1, 2, (700,), generator=torch.Generator().manual_seed(1)).float()
    keys: dict[str, Any] = {"seed": 4, "ordinal": 3, "kind": kind, "law": law, "rank": 4}
    expected = reference.eggroll_update(c, (33, 21), **keys).float()  # rank 4: the scale is 1/2, so float64 is exact
    whole = ops.eggroll_update(c, (33, 21), **keys)
    assert torch.equal(whole, expected)
    for chunk in (1, 3, 64, 699, 5000):
        assert torch.equal(ops.eggroll_update(c, (33, 21), chunk_pairs=chunk, **keys), whole)
    rows = [ops.eggroll_update(c, (33, 21), row_begin=a, row_end=b, **keys) for a, b in ((0, 5), (5, 5), (5, 33))]
    assert torch.equal(torch.cat(rows), whole)
    parts = [ops.eggroll_update(c[a:b], (33, 21), pair_begin=a, **keys) for a, b in ((0, 100), (100, 700))]
    assert torch.equal(parts[0] + parts[1], whole)
    torch.set_num_threads(2)
    assert torch.equal(ops.eggroll_update(c, (33, 21), **keys), whole)


def test_4_row_shards_and_scale() -> None:
    c = torch.randn(50)
    for kind, tolerance in (("matrix", 1e-6), ("vector", 0.0)):
        keys: dict[str, Any] = {"seed": 4, "ordinal": 3, "kind": kind}
        whole = ops.eggroll_update(c, (9, 4, 5), **keys)
        rows = [ops.eggroll_update(c, (9, 4, 5), row_begin=a, row_end=a + 3, **keys) for a in (0, 3, 6)]
        assert relative_error(torch.cat(rows), whole) <= tolerance
        assert relative_error(ops.eggroll_update(c, (9, 4, 5), scale=-0.25, **keys), whole * -0.25) <= tolerance
    assert torch.equal(ops.eggroll_update(c[:0], (9, 4), seed=0, ordinal=0), torch.zeros(9, 4))
    assert ops.eggroll_update(c, (), seed=0, ordinal=0, kind="vector").shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_forward_and_update_noise_have_equal_bits(dtype: torch.dtype, law: Any) -> None:
    """The update of a single pair is its E as the layers add it to a weight of zeros with sigma 1."""
    noise = EggrollNoise(seed=3, epoch=1, member_begin=10, sigma=1.0, law=law)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    one = torch.ones(1, dtype=wide)
    keys: dict[str, Any] = {"seed": 3, "ordinal": 2, "epoch": 1, "pair_begin": 5, "law": law, "dtype": dtype}
    vector = ops.eggroll_vector(torch.zeros(40, dtype=dtype), 1, noise, 2)[0]
    assert torch.equal(ops.eggroll_update(one, (40,), kind="vector", **keys).to(dtype), vector)
    matrix = torch.zeros(6, 40, dtype=dtype)
    ops.eggroll_perturb_([matrix], [2], ["matrix"], noise)
    assert torch.equal(ops.eggroll_update(one, (6, 40), **keys).to(dtype), matrix)
    eye = torch.eye(40, dtype=dtype)[None]
    assert torch.equal(ops.eggroll_linear(eye, torch.zeros(6, 40, dtype=dtype), None, noise, 2)[0].T, matrix)


# --- 5 and 6: what the estimator estimates ---------------------------------------------------------------------------

PAIRS = 400_000


def estimates(m: int, n: int, rank: int, law: str, values: Any) -> Tensor:
    """ghat of each pair on its own, [pairs, m * n]: (f(W + sigma E) - f(W - sigma E)) / (2 sigma) E for f = values."""
    keys: dict[str, Any] = {"seed": 1, "ordinal": 0, "pair_begin": 0, "pair_end": PAIRS, "law": law}
    a = ops.eggroll_noise(m, rank, tag=0, dtype=torch.float64, **keys)
    b = ops.eggroll_noise(n, rank, tag=1, dtype=torch.float64, **keys)
    e = torch.bmm(a, b.transpose(1, 2)) / math.sqrt(rank)
    return values(e).unsqueeze(-1) * e.reshape(PAIRS, m * n)


@pytest.mark.parametrize(
    ("law", "rank", "m2"),
    [
        ("gaussian", 1, 30.0),
        ("binomial16", 1, 28.64),
        ("rademacher", 1, 12.0),
        ("gaussian", 2, 22.0),
        ("binomial16", 2, 21.32),
        ("rademacher", 2, 13.0),
    ],
)
def test_5_estimator_of_a_linear_function(law: str, rank: int, m2: float) -> None:
    """f(W) = <G, W>: E ghat = G, E |ghat|^2 = M2 |G|^2, M2 = (m-1+k)(n-1+k)/r + (1-1/r)(mn+2), k = E z^4."""
    m, n, k = 4, 3, reference.FOURTH_MOMENT[law]
    exact = (m - 1 + k) * (n - 1 + k) / rank + (1 - 1 / rank) * (m * n + 2)
    assert exact == pytest.approx(m2, rel=2e-3)
    g = torch.randn(m, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ghat = estimates(m, n, rank, law, lambda e: (e * g).sum((1, 2)))
    assert ((ghat.mean(0) - g.flatten()).norm() / g.norm()).item() < 3 * math.sqrt((exact - 1) / PAIRS)
    assert ghat.square().sum(1).mean().item() / g.square().sum().item() == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize("rank", [1, 2])
def test_5_unbiased_for_a_quadratic(rank: int, sigma: float) -> None:
    """f(W) = vec(W)^T H vec(W) / 2: the odd moments vanish, so E ghat is the gradient at the centre for every sigma."""
    m, n = 3, 2
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(m * n, m * n, generator=generator, dtype=torch.float64)
    h, center = h + h.T, torch.randn(m * n, generator=generator, dtype=torch.float64)

    def slope(e: Tensor) -> Tensor:
        def f(w: Tensor) -> Tensor:
            return ((w @ h) * w).sum(1) / 2

        v = sigma * e.reshape(PAIRS, m * n)
        return (f(center + v) - f(center - v)) / (2 * sigma)

    ghat = estimates(m, n, rank, "gaussian", slope)
    error = (ghat.mean(0) - h @ center) / (ghat.std(0) / math.sqrt(PAIRS))
    assert error.abs().max().item() < 4


def test_5_update_op_is_the_mean_of_the_estimates() -> None:
    """The same pairs through eggroll_update with the unbiased scale: N = 2 P members, kappa = 1 / (N sigma)."""
    g, sigma = torch.randn(4, 3, dtype=torch.float64), 0.1
    ghat = estimates(4, 3, 2, "gaussian", lambda e: (e * g).sum((1, 2)))
    keys: dict[str, Any] = {"seed": 1, "ordinal": 0, "rank": 2}
    noise = EggrollNoise(seed=1, sigma=sigma, rank=2, member_begin=0)
    count = 2000
    ids = torch.arange(4).expand(2 * count, 4)
    f = (ops.eggroll_embedding(ids, torch.zeros(4, 3, dtype=torch.float64), noise, 0) * g).sum((1, 2))
    c = f[0::2] - f[1::2]
    s = ops.eggroll_update(c, (4, 3), scale=1 / (2 * count * sigma), dtype=torch.float64, **keys)
    assert relative_error(s.flatten(), ghat[:count].mean(0)) < 1e-10


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_6_rank_error_of_a_cube(law: str, rank: int) -> None:
    """f = W_11^3: E ghat_11 = 3 M^2 + sigma^2 (3 + (k^2 - 3) / r), k = E z^4, so the excess is exactly O(1/r)."""
    mean, sigma = 0.5, 1.0

    def slope(e: Tensor) -> Tensor:
        v = sigma * e[:, 0, 0]
        return ((mean + v).pow(3) - (mean - v).pow(3)) / (2 * sigma)

    ghat = estimates(3, 3, rank, law, slope)[:, 0]
    expected = 3 * mean**2 + sigma**2 * (3 + (reference.FOURTH_MOMENT[law] ** 2 - 3) / rank)
    assert abs(ghat.mean().item() - expected) < 4 * ghat.std().item() / math.sqrt(PAIRS) + 1e-12


# --- derivatives, compilation, threads ------------------------------------------------------------------------------

NOISE: dict[str, Any] = {"seed": 7, "epoch": 3, "member_begin": 1, "antithetic": True, "sigma": 0.3, "rank": 2}


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_linear(transposed: bool) -> None:
    noise = EggrollNoise(**NOISE)
    x, w = torch.randn(3, 2, 4 if transposed else 5).double().requires_grad_(), torch.randn(4, 5).double()
    w, bias = w.requires_grad_(), torch.randn(5 if transposed else 4).double().requires_grad_()

    def f(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return ops.eggroll_linear(x, w, bias, noise, 0, 1, transposed=transposed)

    assert torch.autograd.gradcheck(f, (x, w, bias))
    assert torch.autograd.gradgradcheck(f, (x, w, bias))
    assert torch.autograd.gradcheck(
        lambda w: ops.eggroll_linear(x.detach(), w, None, noise, 0, transposed=transposed), (w,)
    )


def test_gradients_of_embedding_vector_and_conv() -> None:
    noise = EggrollNoise(**NOISE)
    w, theta = torch.randn(4, 5).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    ids = torch.tensor([[0, 3], [3, 3], [1, 2]])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda w: ops.eggroll_embedding(ids, w, noise, 0) ** 2, (w,))
        assert check(lambda theta: ops.eggroll_vector(theta, 3, noise, 0) ** 2, (theta,))
    x, kernel = torch.randn(3, 2, 4, 4).double().requires_grad_(), torch.randn(3, 2, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, k: ops.eggroll_conv2d(x, k, None, noise, 0), (x, kernel))


def test_update_and_in_place_are_not_differentiable() -> None:
    c = torch.ones(3, requires_grad=True)
    assert not ops.eggroll_update(c, (2, 2), seed=0, ordinal=0).requires_grad
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="seeded_noise_add_ writes to a tensor that requires a gradient"):
        ops.seeded_noise_add_([p], [1.0], 0, [0], 0)
    with torch.no_grad():
        version = p._version
        ops.seeded_noise_add_([p], [1.0], 0, [0], 0)
        ops.eggroll_perturb_([p], [0], ["vector"], EggrollNoise())
    assert p._version == version + 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    check = torch.library.opcheck
    noise = {**NOISE, "law": "gaussian"}
    x, w = torch.randn(3, 2, 5).to(dtype).requires_grad_(), torch.randn(4, 5).to(dtype).requires_grad_()
    bias = torch.randn(4).to(dtype).requires_grad_()
    check(OPS.eggroll_linear.default, (x, w, bias), {**noise, "ordinal": 0, "bias_ordinal": 1})
    check(OPS.eggroll_linear.default, (x.detach(), w, None), {**noise, "ordinal": 0})
    check(OPS.eggroll_embedding.default, (torch.tensor([[0, 3], [1, 2]]), w), {**noise, "ordinal": 0})
    check(OPS.eggroll_vector.default, (bias, 3), {**noise, "ordinal": 0})
    check(OPS.eggroll_update.default, (torch.randn(3), [4, 5]), {"seed": 1, "ordinal": 0, "dtype": dtype})
    data, rows = torch.randn(4).to(dtype), torch.randn(4, 5).to(dtype)
    check(OPS.eggroll_perturb_.default, ([data, rows], [0, 1], ["vector", "matrix"]), noise)
    check(OPS.seeded_noise_add_.default, ([data, rows], [0.5, 1.0], 3, [0, 1], 2))
    check(OPS.eggroll_noise_.default, (torch.empty(2, 3, 2, dtype=dtype), 3, 1, 0, 5))


def test_compiled_forward_serves_every_epoch_and_meta() -> None:
    torch._dynamo.reset()
    w, bias = torch.randn(4, 5), torch.randn(4)
    compiles = torch._dynamo.testing.CompileCounter()

    def f(x: Tensor, epoch: int, begin: int) -> Tensor:
        noise = EggrollNoise(seed=2, epoch=epoch, member_begin=begin)
        return torch.relu(ops.eggroll_linear(x, w, bias, noise, 0, 1)) + ops.eggroll_vector(bias, x.shape[0], noise, 2)

    compiled = torch.compile(f, fullgraph=True, backend=compiles, dynamic=True)
    for members, epoch in ((4, 0), (4, 5), (6, 6), (8, 7), (2, 8)):
        x = torch.randn(members, 5)
        assert torch.equal(compiled(x, epoch, 2 * epoch), f(x, epoch, 2 * epoch))
    assert compiles.frame_count <= 3  # numbers 0 and 1 are special to the compiler
    y = ops.eggroll_linear(
        torch.empty(3, 2, 5, device="meta"), torch.empty(4, 5, device="meta"), None, EggrollNoise(), 0
    )
    assert y.shape == (3, 2, 4)
    assert y.device.type == "meta"


def test_threads_do_not_matter() -> None:
    """Noise, rows and the vector sum to the bit; the product with the weight is ATen's."""
    noise = EggrollNoise(sigma=0.2, rank=2)

    def everything() -> list[Tensor]:
        c = torch.linspace(-1, 1, 300)
        return [
            ops.eggroll_vector(torch.ones(5000), 9, noise, 0),
            ops.eggroll_embedding(torch.arange(200).expand(9, 200), torch.ones(200, 64), noise, 1),
            ops.eggroll_linear(torch.ones(9, 70, 64), torch.zeros(32, 64), None, noise, 1),
            ops.eggroll_update(c, (100, 70), seed=0, ordinal=3, kind="vector"),
            ops.eggroll_noise(100, 3, seed=0, ordinal=0, tag=0, pair_begin=0, pair_end=90),
        ]

    one = everything()
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(everything(), one, strict=True))


# --- bad input ------------------------------------------------------------------------------------------------------

X, W, B = torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(3)
GOOD = EggrollNoise()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(sigma=0.0), 0), ValueError, "sigma must be positive"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(sigma=math.inf), 0), ValueError, "sigma must be .* finite"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(sigma=math.nan), 0), ValueError, "sigma must be"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(rank=0), 0), ValueError, "rank must be at least 1, got 0"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(rank=4), 0), ValueError, r"rank must be in \[1, 3\]"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(law="cauchy"), 0), ValueError, "law must be 'gaussian'"),  # type: ignore[arg-type]
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(epoch=-1), 0), ValueError, "epoch must be in"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(member_begin=-1), 0), ValueError, "member_begin must be in"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD._replace(member_begin=2**32 - 1), 0), ValueError, "below 2\\^32"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD, 2**24), ValueError, r"ordinal must be in \[0, 2\^24\), or -1"),
        (lambda: ops.eggroll_linear(X, W, B, GOOD, 0, -2), ValueError, "bias_ordinal must be in"),
        (lambda: ops.eggroll_linear(X, W, None, GOOD, 0, 1), ValueError, "bias_ordinal is 1, but there is no bias"),
        (
            lambda: ops.eggroll_linear(X, W.t(), B, GOOD, 0),
            ValueError,
            r"x must be \[members, ..., 3\] beside a weight",
        ),
        (lambda: ops.eggroll_linear(X, W, B, GOOD, 0, transposed=True), ValueError, r"\(transposed\), got \[4, 5\]"),
        (lambda: ops.eggroll_linear(X[0], W, B, GOOD, 0), ValueError, "x must be"),
        (lambda: ops.eggroll_linear(X, W[0], B, GOOD, 0), ValueError, "weight must have two dimensions"),
        (lambda: ops.eggroll_linear(X, W, X[0], GOOD, 0), ValueError, r"bias must be \[3\], got \[5\]"),
        (lambda: ops.eggroll_linear(X, W.double(), B, GOOD, 0), TypeError, "weight has dtype Double, x Float"),
        (lambda: ops.eggroll_linear(X, W, B.double(), GOOD, 0), TypeError, "bias has dtype Double"),
        (lambda: ops.eggroll_linear(X.long(), W, B, GOOD, 0), TypeError, "x has dtype Long; supported are"),
        (lambda: ops.eggroll_embedding(X, W, GOOD, 0), TypeError, "ids must be int64 or int32, got Float"),
        (lambda: ops.eggroll_embedding(torch.tensor([3]), W, GOOD, 0), IndexError, r"id 3 is outside \[0, 3\)"),
        (lambda: ops.eggroll_embedding(torch.tensor([-1]), W, GOOD, 0), IndexError, "id -1 is outside"),
        (lambda: ops.eggroll_embedding(torch.tensor(1), W, GOOD, 0), ValueError, "got a scalar"),
        (lambda: ops.eggroll_embedding(torch.tensor([1]), B, GOOD, 0), ValueError, "two dimensions"),
        (lambda: ops.eggroll_vector(B, -1, GOOD, 0), ValueError, "members must not be negative"),
        (lambda: ops.eggroll_vector(B.long(), 1, GOOD, 0), TypeError, "theta has dtype Long"),
        (lambda: ops.eggroll_update(B[None], (3, 5), seed=0, ordinal=0), ValueError, r"coeff must be \[pairs\]"),
        (lambda: ops.eggroll_update(B.half(), (3, 5), seed=0, ordinal=0), TypeError, "coeff must be float32 or"),
        (lambda: ops.eggroll_update(B, (3,), seed=0, ordinal=0), ValueError, "is no matrix; use kind='vector'"),
        (lambda: ops.eggroll_update(B, (3, 5), seed=0, ordinal=0, rank=4), ValueError, r"rank must be in \[1, 3\]"),
        (lambda: ops.eggroll_update(B, (3, 5), seed=0, ordinal=0, kind="tensor"), ValueError, "kind must be"),  # type: ignore[arg-type]
        (lambda: ops.eggroll_update(B, (3, 5), seed=0, ordinal=-1), ValueError, r"ordinal must be in \[0, 2\^24\)"),
        (lambda: ops.eggroll_update(B, (3, 5), seed=0, ordinal=0, row_end=4), ValueError, r"rows \[0, 4\) are not"),
        (lambda: ops.eggroll_update(B, (3, 5), seed=0, ordinal=0, chunk_pairs=-1), ValueError, "chunk_pairs"),
        (lambda: ops.eggroll_update(B, (3, 5), seed=0, ordinal=0, dtype=torch.int8), TypeError, "dtype is that of"),
        (lambda: ops.eggroll_perturb_([B], [0], ["matrix"], GOOD), ValueError, "tensor 0 of shape .* is no matrix"),
        (lambda: ops.eggroll_perturb_([B], [0, 1], ["vector"], GOOD), ValueError, "ordinals has 2 tensors, expected 1"),
        (lambda: ops.eggroll_perturb_([B], [0], [], GOOD), ValueError, "kinds has 0 tensors, expected 1"),
        (lambda: ops.eggroll_perturb_([B.long()], [0], ["vector"], GOOD), TypeError, "tensor 0 has dtype Long"),
        (lambda: ops.eggroll_perturb_([B[:1].expand(3)], [0], ["vector"], GOOD), RuntimeError, "is expanded"),
        (lambda: ops.seeded_noise_add_([B], [], 0, [0], 0), ValueError, "scales has 0 tensors, expected 1"),
        (lambda: ops.seeded_noise_add_([B], [1.0], 0, [0], -1), ValueError, "stream must be in"),
        (lambda: draw(3, "gaussian", dtype=torch.int8), ValueError, "gaussian law has no int8 form"),
        (lambda: draw(3, "gaussian", tag=3), ValueError, r"tag must be 0 \(A\), 1 \(B\) or 2"),
        (lambda: draw(3, "gaussian", row_begin=-1), ValueError, "row_begin must not be negative"),
        (lambda: ops.eggroll_conv2d(X, W, B, GOOD, 0), ValueError, "weight must be"),
        (lambda: ops.eggroll_conv2d(X, W.view(3, 5, 1, 1), B, GOOD, 0), ValueError, "x must be"),
        (
            lambda: ops.eggroll_conv2d(torch.zeros(2, 5, 2, 2), torch.zeros(3, 5, 3, 1), None, GOOD, 0),
            ValueError,
            "the kernel spans 3 pixels, the padded input has 2",
        ),
        (
            lambda: ops.eggroll_conv2d(torch.zeros(2, 5, 2, 2), W.view(3, 5, 1, 1), None, GOOD, 0, stride=(0, 1)),
            ValueError,
            "stride and dilation must be positive",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert not B.any()


# --- memory and CUDA ------------------------------------------------------------------------------------------------


def test_12_memory_does_not_grow_with_the_population() -> None:
    """Beside input and output: what the CPU allocator hands out is the same for 256 and for 65,536 members."""
    from torch.profiler import ProfilerActivity, profile

    def allocated(run: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
        events = recorded.profiler.kineto_results.events()
        return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)

    w = torch.zeros(16, 8)
    for members in (256, 65536):
        x, c = torch.zeros(members, 8), torch.zeros(members // 2)
        forward = allocated(lambda x=x: ops.eggroll_linear(x, w, None, GOOD, 0))
        assert forward == 4 * 16 * members
        update = allocated(lambda c=c: ops.eggroll_update(c, (1024, 1024), seed=0, ordinal=0))
        assert update <= 4 * 1024 * 1024 + 2**23


@pytest.mark.cuda
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(law: Any, dtype: torch.dtype) -> None:
    noise = EggrollNoise(seed=3, epoch=2, member_begin=3, sigma=0.3, rank=3, law=law)
    keys: dict[str, Any] = {"seed": 3, "ordinal": 5, "tag": 1, "pair_begin": 7, "pair_end": 9, "law": law}
    gpu = ops.eggroll_noise(1000, 3, device="cuda", dtype=dtype, row_begin=5, **keys)
    assert torch.equal(gpu.cpu(), ops.eggroll_noise(1000, 3, dtype=dtype, row_begin=5, **keys))
    theta, w = torch.randn(5000).to(dtype), torch.randn(200, 300).to(dtype)
    vector = ops.eggroll_vector(theta.cuda(), 5, noise, 1)
    assert torch.equal(vector.cpu(), ops.eggroll_vector(theta, 5, noise, 1))
    ids = torch.randint(0, 200, (5, 40))
    rows = ops.eggroll_embedding(ids.cuda(), w.cuda(), noise, 1)
    assert torch.equal(rows.cpu(), ops.eggroll_embedding(ids, w, noise, 1))
    changed = [w.clone(), w.cuda()]
    for tensor in changed:
        ops.eggroll_perturb_([tensor], [1], ["matrix"], noise)
    assert torch.equal(changed[0], changed[1].cpu())
    x = torch.randn(5, 70, 300).to(dtype)
    zero = torch.zeros_like(w)  # the product with it is exact, so what noise adds is compared to the bit
    y = ops.eggroll_linear(x.cuda(), zero.cuda(), theta[:200].cuda(), noise, 1, 2)
    assert torch.equal(y.cpu(), ops.eggroll_linear(x, zero, theta[:200], noise, 1, 2))
    y = ops.eggroll_linear(x.cuda(), w.cuda(), theta[:200].cuda(), noise, 1, 2)
    assert relative_error(y.cpu(), ops.eggroll_linear(x, w, theta[:200], noise, 1, 2)) < TOLERANCE[dtype]
    c = torch.randint(-1, 2, (500,)).float()
    for kind in ("vector", "matrix"):
        update: dict[str, Any] = {"seed": 3, "ordinal": 4, "kind": kind, "law": law, "dtype": dtype}
        s = ops.eggroll_update(c.cuda(), (60, 70), **update).cpu()
        if kind == "vector" or law != "gaussian":
            assert torch.equal(s, ops.eggroll_update(c, (60, 70), **update))
        else:
            assert relative_error(s, ops.eggroll_update(c, (60, 70), **update)) < 1e-5


@pytest.mark.cuda
def test_cuda_rank_limit() -> None:
    w = torch.zeros(100, 100, device="cuda")
    with pytest.raises(ValueError, match="on CUDA rank must be at most 64, got 65"):
        ops.eggroll_linear(w, w, None, EggrollNoise(rank=65), 0)
