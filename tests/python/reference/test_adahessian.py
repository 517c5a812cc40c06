"""The reference AdaHessian against closed forms. ``test_<n>_...`` is acceptance test n. All in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_ext.reference.ops import rademacher
from torch_ext.reference.ops.philox4x32 import philox4x32, philox_counter, philox_key
from torch_ext.reference.optim import AdaHessianReference
from torch_ext.reference.optim.adahessian import averaged_diagonal, block_length, block_sum, exact_sqrt, reduced_shape


def leaf(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).clone().requires_grad_()


def quadratic(x: Tensor, a: Tensor, c: Tensor | float = 0.0) -> Callable[[], Tensor]:
    return lambda: ((x - c) ** 2 * a / 2).sum()


# ---- numbered acceptance tests


def test_1_one_step_newton() -> None:
    a = torch.tensor([1e-3, 1.0, 50.0, 1e4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for draw in range(200):
        exact = draw < 100
        x0, c = (
            torch.randint(-20, 21, (4,), generator=generator).double()
            if exact
            else torch.randn(4, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        x = leaf(x0)
        AdaHessianReference([x], lr=1.0, betas=(0, 0), eps=0.0).step_closure(quadratic(x, a, c))
        error = (x.detach() - c).abs()
        if exact:
            assert torch.equal(x.detach(), c)
        else:
            largest = torch.maximum(x0.abs(), c.abs())
            ulp = torch.nextafter(largest, torch.full_like(largest, math.inf)) - largest
            assert bool((error <= 4 * ulp).all())


def test_2_conditioning_invariance() -> None:
    largest = []
    for condition in (1.0, 1e3, 1e6):
        x = leaf(torch.ones(20))
        a = torch.logspace(0, math.log10(condition), 20, dtype=torch.float64)
        optimizer = AdaHessianReference([x], lr=0.15, eps=0.0)
        for _ in range(200):
            optimizer.step_closure(quadratic(x, a))
        largest.append(float(x.detach().abs().max()))
    assert largest[0] == pytest.approx(9.3475e-7, rel=1e-4)
    assert largest[1] == pytest.approx(largest[0], rel=1e-11)
    assert largest[2] == pytest.approx(largest[0], rel=1e-11)


@pytest.mark.parametrize(("z", "d", "expected"), [((1, -1), (1, 2), (0.9, -0.9)), ((1, 1), (3, 4), (29 / 30, -0.95))])
def test_3_hand_case(z: tuple[int, int], d: tuple[int, int], expected: tuple[float, float]) -> None:
    h = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    x = leaf([1.0, -1.0])
    g, hz = h @ x.detach(), h @ torch.tensor(z, dtype=torch.float64)
    assert g.tolist() == [1.0, -2.0]
    assert hz.abs().tolist() == list(d)
    AdaHessianReference([x], lr=0.1, eps=0.0).step([g], [hz])
    torch.testing.assert_close(x.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_4_estimator_moments(n_samples: int) -> None:
    draws, n = 200_000, 6
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = a @ a.t()
    d = torch.zeros(draws, n, dtype=torch.float64)
    for s in range(n_samples):
        counter = philox_counter(torch.zeros(draws, dtype=torch.int64), stream=s, ordinal=0, tag=3, epoch=0)
        counter[:, 3] = torch.arange(draws)  # all refreshes at once
        bits = (philox4x32(counter, philox_key(0))[:, :1] >> torch.arange(n)) & 1
        z = (bits * 2 - 1).double()
        for epoch in (0, 1, draws - 1):
            assert torch.equal(z[epoch], rademacher((n,), seed=0, stream=s, epoch=epoch, dtype=torch.float64))
        d += z * (z @ h) / n_samples
    diagonal = h.diag()
    second = diagonal**2 + ((h**2).sum(1) - diagonal**2) / n_samples
    for sample, expected in ((d, diagonal), (d**2, second)):
        standard_error = sample.std(0) / draws**0.5
        assert bool(((sample.mean(0) - expected).abs() <= torch.maximum(0.01 * expected, 5 * standard_error)).all())


def breast_cancer() -> tuple[Tensor, Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0, correction=0), torch.tensor(data.target, dtype=torch.float64)


def logistic(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    fit = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)
    return fit + 0.005 * (w * w).sum()


def test_5_hvp_oracle() -> None:
    from torch_ext.reference.curvature import hvp

    x, y = breast_cancer()
    w = leaf(torch.linspace(-0.3, 0.3, 30, dtype=torch.float64))
    z = rademacher((30,), seed=1, dtype=torch.float64)
    p = torch.sigmoid(x @ w.detach())
    expected = x.t() @ ((p * (1 - p)) * (x @ z)) / len(y) + 0.01 * z
    (exact,) = hvp(lambda: logistic(w, x, y), [w], [z])
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    (close,) = hvp(lambda: logistic(w, x, y), [w], [z], mode="finite_difference")
    torch.testing.assert_close(close, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_6_convergence() -> None:
    x, y = breast_cancer()
    optimum = 0.10241656575570418
    at_50 = []
    for seed in range(5):
        w = leaf(torch.zeros(30))
        optimizer = AdaHessianReference([w], seed=seed)
        gap = {}
        for t in range(1, 501):
            optimizer.step_closure(lambda w=w: logistic(w, x, y))
            if t in (50, 100, 200, 500):
                gap[t] = float(logistic(w.detach(), x, y)) - optimum
        at_50.append(gap[50])
        assert gap[100] <= 1e-2
        assert gap[200] <= 5e-4
        assert abs(gap[500]) <= 1e-8
    assert sorted(at_50)[2] <= 2e-2


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_7_loss_scale_invariance(power: float) -> None:
    x, y = breast_cancer()
    start = torch.linspace(-0.1, 0.1, 30, dtype=torch.float64)
    plain, scaled, told = leaf(start), leaf(start), leaf(start)
    options: dict[str, Any] = {"eps": 0.0, "hessian_power": power}
    a, b, c = (AdaHessianReference([w], **options) for w in (plain, scaled, told))
    for t in range(20):
        a.step_closure(lambda: logistic(plain, x, y))
        b.step_closure(lambda: logistic(scaled, x, y) * 1024)
        c.step_closure(lambda: logistic(told, x, y) * 1024, loss_scale=1024)
        if power == 1:
            assert torch.equal(plain, scaled)
        elif t == 0:
            factor = 1024 ** (1 - power)
            torch.testing.assert_close(scaled.detach() - start, (plain.detach() - start) * factor, rtol=1e-12, atol=0)
        assert torch.equal(plain, told)


def test_8_negative_curvature() -> None:
    x = leaf([0.1])
    AdaHessianReference([x], lr=1.0, betas=(0, 0), eps=0.0).step_closure(lambda: -(x * x).sum())
    assert x.tolist() == [0.2]


@pytest.mark.parametrize(
    ("shape", "options", "length", "reduced"),
    [
        ((), {}, 1, []),
        ((7,), {"linear_averaging": "row"}, 1, [7]),
        ((5, 64), {}, 1, [5, 64]),
        ((5, 64), {"linear_averaging": "row"}, 64, [5, 1]),
        ((5, 64), {"linear_averaging": "block", "block_size": 16}, 16, [5, 4]),
        ((3, 2, 5), {}, 5, [3, 2, 1]),
        ((3, 2, 3, 3), {}, 9, [3, 2, 1, 1]),
        ((3, 2, 3, 3), {"average_conv": False}, 1, [3, 2, 3, 3]),
        ((2, 2, 3, 4, 5), {}, 60, [2, 2, 1, 1, 1]),
        ((2, 1, 2, 1, 2, 2), {}, 1, [2, 1, 2, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("averaging", ["abs_mean", "signed_mean"])
def test_10_averaging_shapes(
    shape: tuple[int, ...], options: dict[str, Any], length: int, reduced: list[int], averaging: str
) -> None:
    """The reduced v gives what the formula written with a full v gives."""
    generator = torch.Generator().manual_seed(0)
    p = leaf(torch.randn(shape, generator=generator, dtype=torch.float64))
    optimizer = AdaHessianReference([p], averaging=averaging, **options)
    assert optimizer.params[0].length == length
    assert reduced_shape(shape, length) == reduced
    full, m, v = p.detach().clone(), torch.zeros(shape).double(), torch.zeros(shape).double()
    for t in range(1, 6):
        g, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        optimizer.step([g], [c])
        blocks = c.reshape(-1, length)
        d = blocks.abs().mean(1, keepdim=True) if averaging == "abs_mean" else blocks.mean(1, keepdim=True).abs()
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * d.expand_as(blocks).reshape(shape) ** 2
        full -= 0.15 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-4)
        torch.testing.assert_close(p.detach(), full, rtol=1e-10, atol=1e-12)
    assert list(optimizer.params[0].state["exp_hessian_diag_sq"].shape) == reduced


def test_10_non_dividing_block_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"block_size must divide dimension 1 of parameter 1 \[4, 6\], got 4"):
        AdaHessianReference([leaf([1.0]), leaf(torch.ones(4, 6))], linear_averaging="block", block_size=4)


# ---- the conventions of the step


def test_the_page_of_formulas() -> None:
    """Section 'Algorithm' of the paper once more, without any of our bookkeeping; lazy curvature included."""
    generator = torch.Generator().manual_seed(1)
    for update_each, power in ((1, 1.0), (3, 1.0), (3, 0.5), (2, 0.7), (2, 0.0)):
        p = leaf(torch.randn(3, 5, generator=generator, dtype=torch.float64))
        options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.02}
        optimizer = AdaHessianReference([p], update_each=update_each, hessian_power=power, **options)
        q, m, v, r = p.detach().clone(), torch.zeros(3, 5).double(), torch.zeros(3, 5).double(), 0
        b2 = 0.9**update_each
        for t in range(1, 12):
            g, c = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
            refresh = (t - 1) % update_each == 0
            assert optimizer.is_refresh == refresh
            optimizer.step([g], [c] if refresh else None)
            if refresh:
                v, r = b2 * v + (1 - b2) * c**2, r + 1
            m = 0.8 * m + 0.2 * g
            update = m / (1 - 0.8**t) / ((v / (1 - b2**r)) ** (power / 2) + 1e-3)
            q = q - 0.1 * (update + 0.02 * q)
            torch.testing.assert_close(p.detach(), q, rtol=1e-11, atol=1e-12)
        state = optimizer.params[0].state
        assert (float(state["step"]), state["step"].dtype, state["step"].dim()) == (11.0, torch.float32, 0)
        assert state["bias_products"].tolist() == pytest.approx([0.8**11, b2**r], rel=1e-13)


def test_block_sum_order() -> None:
    """Cancellations that come out differently in any other order."""
    generator = torch.Generator().manual_seed(2)
    for length in (1, 5, 31, 32, 33, 100, 1024, 1025, 2500):
        c = torch.randn(3, length, generator=generator, dtype=torch.float64) * 10 ** (
            8 * torch.rand(3, length, generator=generator, dtype=torch.float64)
        )
        expected = []
        for row in c.tolist():
            total = 0.0
            if length < 32:
                for value in row:
                    total += value
            else:
                for begin in range(0, length, 1024):
                    lanes = [0.0] * 32
                    for e, value in enumerate(row[begin : begin + 1024]):
                        lanes[e % 32] += value
                    for width in (16, 8, 4, 2, 1):
                        for i in range(width):
                            lanes[i] += lanes[i + width]
                    total += lanes[0]
            expected.append(total)
        assert block_sum(c, length).tolist() == expected


def test_block_mean_of_float32_is_summed_in_float64() -> None:
    c = torch.full((2, 4096), 0.1, dtype=torch.float32)
    c[1, ::2] *= -1
    assert averaged_diagonal(c, 4096, scale=1.0, averaging="abs_mean").tolist() == [[c[0, 0].item()]] * 2
    assert averaged_diagonal(c, 4096, scale=2.0, averaging="signed_mean").tolist() == [[2 * c[0, 0].item()], [0.0]]
    assert averaged_diagonal(c, 4096, scale=1.0, averaging="abs_mean").dtype == torch.float32


def test_zero_size_parameters() -> None:
    for shape in ((0,), (3, 0), (0, 4), (2, 2, 0)):
        p = leaf(torch.zeros(shape))
        optimizer = AdaHessianReference([p, x := leaf([1.0])], linear_averaging="row")
        optimizer.step([torch.zeros_like(p), torch.ones_like(x)], [torch.zeros_like(p), torch.ones_like(x)])
        assert p.shape == shape
        assert x.item() < 1
        assert block_length(shape, optimizer.options) >= 1


def test_maximize_of_the_negative_is_equal() -> None:
    x, y = leaf([0.4, -0.2]), leaf([0.4, -0.2])
    a, b = AdaHessianReference([x], weight_decay=0.1), AdaHessianReference([y], weight_decay=0.1, maximize=True)
    for _ in range(5):
        a.step_closure(lambda: (x**4).sum() + x.prod())
        b.step_closure(lambda: -((y**4).sum() + y.prod()))
    assert torch.equal(x, y)


def test_max_update_bounds_the_step_where_curvature_is_zero() -> None:
    x = leaf([1.0, 1.0])
    AdaHessianReference([x], max_update=2.0).step_closure(lambda: x[0] * 3 + x[1] ** 2 / 2)
    assert x.tolist() == pytest.approx([1 - 0.15 * 2, 1 - 0.15 / (1 + 1e-4)], rel=1e-12)


def test_14_linear_loss_and_undefined_gradients() -> None:
    x, unused, linear = leaf([2.0]), leaf([5.0]), leaf([1.0])
    optimizer = AdaHessianReference([unused, x, linear], weight_decay=0.1)
    optimizer.step_closure(lambda: (x**2).sum() + 1e-3 * linear.sum())
    assert unused.tolist() == [5.0]
    assert not optimizer.params[0].state
    assert linear.item() == pytest.approx(1 - 0.15 * (1e-3 / 1e-4 + 0.1), rel=1e-12)  # D = 0, denominator = eps
    # every gradient constant: nothing to differentiate twice
    optimizer = AdaHessianReference([x])
    optimizer.step_closure(lambda: 1e-3 * x.sum())
    assert optimizer.global_calls == 1


def test_step_without_any_gradient_is_no_call() -> None:
    x = leaf([2.0])
    optimizer = AdaHessianReference([x])
    optimizer.step([None], [None])
    assert (optimizer.global_calls, optimizer.global_skipped, x.item()) == (0, 0, 2.0)


@pytest.mark.parametrize("where", ["gradient", "curvature"])
def test_14_non_finite_step_changes_nothing(where: str) -> None:
    x, y = leaf([1.0]), leaf([2.0])
    optimizer = AdaHessianReference([x, y], update_each=2)
    one, bad = torch.ones(1).double(), torch.tensor([math.inf]).double()
    optimizer.step([one, bad] if where == "gradient" else [one, one], [one, one] if where == "gradient" else [bad, one])
    assert (x.item(), y.item(), optimizer.global_calls, optimizer.global_skipped) == (1.0, 2.0, 1, 1)
    optimizer.step([one, one])  # no curvature yet: parameters wait for the next refresh
    assert (x.item(), y.item(), optimizer.global_calls, optimizer.global_skipped) == (1.0, 2.0, 2, 1)
    assert not any(p.state for p in optimizer.params)
    optimizer.step([one, one], [one, one])
    expected = 1 - 0.15 / (1 + 1e-4)  # bias corrections know of one step and one refresh
    assert x.item() == pytest.approx(expected, rel=1e-12)


def test_probe_follows_refreshes_samples_and_ordinals() -> None:
    parameters = [leaf(torch.zeros(3)), leaf(torch.zeros(2, 70))]
    optimizer = AdaHessianReference(parameters, update_each=5, seed=9)
    optimizer.global_calls = 10
    for s in (0, 1):
        expected = rademacher((2, 70), seed=9, stream=s, ordinal=1, epoch=2, dtype=torch.float64)
        assert torch.equal(optimizer.probe(s)[1], expected)


def test_external_hessian_counts_as_refresh_and_ignores_loss_scale() -> None:
    x, y = leaf([1.0, -2.0]), leaf([1.0, -2.0])
    h = torch.tensor([2.0, 8.0], dtype=torch.float64)
    a, b = AdaHessianReference([x], eps=0.0), AdaHessianReference([y], eps=0.0)
    for _ in range(3):
        a.step_closure(quadratic(x, h))
        b.step_closure(lambda: quadratic(y, h)() * 1024, hessian=[h], loss_scale=1024)
    assert torch.equal(x, y)
    assert b.params[0].state["bias_products"].tolist() == a.params[0].state["bias_products"].tolist()


def test_curvature_closure_feeds_only_the_curvature() -> None:
    x, h = leaf([1.0, -2.0]), torch.tensor([2.0, 8.0], dtype=torch.float64)
    AdaHessianReference([x], lr=1.0, eps=0.0).step_closure(quadratic(x, h), curvature_closure=quadratic(x, 2 * h))
    assert x.tolist() == [0.5, -1.0]


@pytest.mark.parametrize("options", [{}, {"n_samples": 3}, {"linear_averaging": "row", "averaging": "signed_mean"}])
def test_14_finite_difference_agrees(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) / 3 for s in ((5, 4), (5,), (1, 5))]
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    results = []
    for mode in ("double_backward", "finite_difference"):
        w, b, v = (leaf(s) for s in start)
        optimizer = AdaHessianReference([w, b, v], hvp=mode, **options)
        optimizer.step_closure(lambda w=w, b=b, v=v: ((torch.tanh(x @ w.t() + b) @ v.t()) ** 2).mean())
        results.append([p.state["exp_hessian_diag_sq"].sqrt() for p in optimizer.params])
    for exact, close in zip(*results, strict=True):
        torch.testing.assert_close(close, exact, rtol=0, atol=1e-6 * float(exact.max()))


def test_half_parameters_have_float32_state() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, -0.5], dtype=dtype, requires_grad=True)
        y = x.detach().float().requires_grad_()
        a, b = AdaHessianReference([x]), AdaHessianReference([y])
        g = torch.tensor([0.3, 0.7]).to(dtype)
        a.step([g], [g])
        b.step([g.float()], [g.float()])
        assert torch.equal(x, y.to(dtype))
        assert a.params[0].state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_float32_order_of_operations(power: float) -> None:
    """Every operation rounds once, in this order: numpy float32 gives the same bits."""
    f, generator = np.float32, torch.Generator().manual_seed(4)
    p = torch.randn(7, 45, generator=generator).requires_grad_()
    options = {"lr": 0.15, "eps": 1e-4, "weight_decay": 0.01, "max_update": 1.5, "linear_averaging": "row"}
    optimizer = AdaHessianReference([p], hessian_power=power, update_each=3, maximize=True, **options)
    q, m, v = p.detach().numpy().copy(), np.zeros((7, 45), f), np.zeros((7, 1), f)
    bias1, bias2, b2 = 1.0, 1.0, 0.999**3
    for t in range(7):
        g, c = (torch.randn(7, 45, generator=generator) for _ in range(2))
        optimizer.step([g * 3], [c * 3] if t % 3 == 0 else None, loss_scale=3.0)
        g1 = (g * 3).numpy() * f(-1 / 3.0)
        if t % 3 == 0:
            d = (block_sum((c * 3).abs(), 45).numpy() / 45).astype(f).reshape(7, 1) * f(1 / 3.0)
            v = v * f(b2) + (d * d) * f(1 - b2)
            bias2 *= b2
        m = m * f(0.9) + g1 * f(1 - 0.9)
        bias1 *= 0.9
        vh = v * f(1 / (1 - bias2))
        root = {0.0: np.ones_like(vh), 0.5: np.sqrt(np.sqrt(vh)), 1.0: np.sqrt(vh)}[power]
        u = np.clip((m * f(1 / (1 - bias1))) / (root + f(1e-4)), f(-1.5), f(1.5))
        q = q - f(0.15) * (u + f(0.01) * q)
        assert q.dtype == f
        assert np.array_equal(p.detach().numpy(), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_square_root_is_correctly_rounded(dtype: torch.dtype) -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    expected = torch.tensor([math.sqrt(v) for v in x.tolist()], dtype=torch.float64).to(dtype)
    assert torch.equal(exact_sqrt(x), expected)
    assert exact_sqrt(torch.tensor(4.0, dtype=dtype)).shape == ()


def test_groups_have_their_own_options_and_running_ordinals() -> None:
    x, y = leaf([1.0]), leaf([1.0])
    optimizer = AdaHessianReference([{"params": [x]}, {"params": [y], "lr": 0.0}])
    optimizer.step_closure(lambda: (x**2 + y**2).sum())
    assert x.item() < 1
    assert y.item() == 1
    with pytest.raises(ValueError, match="seed must be the same in every group"):
        AdaHessianReference([{"params": [x]}, {"params": [y], "seed": 1}])
