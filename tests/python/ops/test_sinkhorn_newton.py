"""torch_ext::sinkhorn_newton: closed forms, the reference, the numbered acceptance tests, derivatives, messages.

The numbers are those of the method's acceptance list. Problems of test 5: uniform random costs, and blobs on a
28 x 28 grid, whose inputs ``random_cost`` and ``blobs`` spell out.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_ext import ops
from torch_ext.ops import SinkhornResult
from torch_ext.reference.ops import sinkhorn_newton as reference
from torch_ext.reference.ops.sinkhorn_newton import hess_solve, two_by_two, vjp

F64 = torch.float64
newton = torch.ops.torch_ext.sinkhorn_newton.default
solve = torch.ops.torch_ext.sinkhorn_hess_solve.default


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """A problem that does not converge warns, and no test may overlook it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sinkhorn")
        yield


def problem(n: int, m: int, seed: int = 0, *batch: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    cost = torch.rand(*batch, n, m, generator=rng, dtype=F64)
    a, b = torch.rand(*batch, n, generator=rng, dtype=F64) + 0.1, torch.rand(*batch, m, generator=rng, dtype=F64) + 0.1
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def random_cost(n: int = 500, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    uniform = torch.full((n,), 1 / n, dtype=F64)
    return torch.from_numpy(np.random.default_rng(seed).random((n, n))), uniform, uniform


def blobs(power: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two mixtures of four Gaussian blobs on the 28 x 28 grid; L1 (power 1) or squared (2) distance / 2."""
    line = np.arange(28) / 27
    u = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    masses = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        z = sum(np.exp(-((u - rng.random(2)) ** 2).sum(1) / (2 * 0.06**2)) for _ in range(4))
        z = z / z.sum() + 1e-4 / 784
        masses.append(torch.from_numpy(z / z.sum()))
    cost = (np.abs(u[:, None] - u[None]) ** power).sum(-1) / 2
    return torch.from_numpy(cost), masses[0], masses[1]


def digits(i: int) -> Tensor:
    from sklearn.datasets import load_digits

    image = torch.from_numpy(load_digits().data[i]) + 1e-3
    return image / image.sum()


def digits_cost() -> Tensor:
    line = torch.arange(8, dtype=F64) / 7
    u = torch.cartesian_prod(line, line)
    return (u[:, None] - u[None]).square().sum(-1) / 2


def error_of(result: SinkhornResult, a: Tensor, b: Tensor) -> float:
    """The larger L1 error of the two marginals, from the plan itself."""
    return float(max((result.plan.sum(-1) - a).abs().sum(-1).max(), (result.plan.sum(-2) - b).abs().sum(-1).max()))


# --- closed forms and invariances ------------------------------------------------------------------------------------


def test_1_two_by_two_closed_form() -> None:
    cost = torch.tensor([[0, 1], [1, 0]], dtype=F64)
    a, b = torch.tensor([0.6, 0.4], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    result = ops.sinkhorn_newton(cost, a, b, 0.5, tol=1e-14)
    expected = torch.tensor([[0.47417374, 0.12582626], [0.02582626, 0.37417374]], dtype=F64)
    torch.testing.assert_close(result.plan, expected, rtol=0, atol=5e-9)  # digits as printed
    torch.testing.assert_close(result.plan, two_by_two(cost, a, b, 0.5), rtol=0, atol=1e-12)
    assert abs(float((result.plan * cost).sum()) - 0.15165253) < 5e-9
    assert abs(float(result.value) + 0.88679504) < 5e-9
    assert abs(float(result.value) - float((result.plan * (cost + 0.5 * (result.plan.log() - 1))).sum())) < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_1_two_by_two_over_costs_masses_and_eps(seed: int) -> None:
    cost, a, b = problem(2, 2, seed)
    eps = 10 ** (-0.1 * seed)
    result = ops.sinkhorn_newton(cost, a, b, eps, tol=1e-14)
    torch.testing.assert_close(result.plan, two_by_two(cost, a, b, eps), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (40, 33), (70, 1030)])
def test_2_separable_cost_gives_the_product(n: int, m: int) -> None:
    cost, a, b = problem(n, m)
    separable = cost[:, :1] * 3 + cost[:1, :]
    for mass in (1.0, 2.5):
        result = ops.sinkhorn_newton(separable, mass * a, mass * b, 0.05, tol=1e-13)
        torch.testing.assert_close(result.plan, mass * a[:, None] * b, rtol=0, atol=1e-12)


def test_2_invariances() -> None:
    """C += u_i + v_j leaves the plan; permutations and transposition go through."""
    cost, a, b = problem(13, 9)
    base = ops.sinkhorn_newton(cost, a, b, 0.02, tol=1e-14)
    u, v = torch.rand(13, dtype=F64), torch.rand(9, dtype=F64)
    moved = ops.sinkhorn_newton(cost + u[:, None] + v, a, b, 0.02, tol=1e-14)
    torch.testing.assert_close(moved.plan, base.plan, rtol=0, atol=1e-12)
    rows, columns = torch.randperm(13), torch.randperm(9)
    permuted = ops.sinkhorn_newton(cost[rows][:, columns], a[rows], b[columns], 0.02, tol=1e-14)
    torch.testing.assert_close(permuted.plan, base.plan[rows][:, columns], rtol=0, atol=1e-12)
    turned = ops.sinkhorn_newton(cost.T, b, a, 0.02, tol=1e-14)
    torch.testing.assert_close(turned.plan.T, base.plan, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.f, base.g, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.g, base.f, rtol=0, atol=1e-12)
    assert abs(float(a @ base.f - b @ base.g)) < 1e-14


def test_2_a_large_offset_costs_no_digits() -> None:
    cost, a, b = problem(20, 20)
    base = ops.sinkhorn_newton(cost.round(decimals=3), a, b, 0.01, tol=1e-12)
    moved = ops.sinkhorn_newton(cost.round(decimals=3) + 2.0**20, a, b, 0.01, tol=1e-12)
    torch.testing.assert_close(moved.plan, base.plan, rtol=0, atol=1e-9)  # the cost itself has lost 1e-10
    assert error_of(moved, a, b) < 1e-12


@pytest.mark.parametrize("mode", ["auto", "sns", "ssns", "sinkhorn"])
@pytest.mark.parametrize(("n", "m", "eps"), [(30, 30, 0.1), (20, 50, 0.05), (50, 20, 0.05)])
def test_3_duality_gap(n: int, m: int, eps: float, mode: Any) -> None:
    cost, a, b = problem(n, m)
    result = ops.sinkhorn_newton(cost, a, b, eps, tol=1e-12, mode=mode, max_iter=5000)
    plan = result.plan
    primal = (plan * cost).sum() + eps * (plan * (plan.clamp_min(1e-300).log() - 1)).sum()
    dual = a @ result.f + b @ result.g - eps * plan.sum()
    assert abs(float(primal - dual)) <= 1e-10
    assert abs(float(result.value - dual)) <= 1e-10
    assert result.info[3] == 1
    assert error_of(result, a, b) <= 2e-12


def test_equals_the_reference() -> None:
    for n, m, eps in [(2, 2, 1.0), (6, 11, 0.1), (11, 6, 0.1), (40, 40, 0.01)]:
        cost, a, b = problem(n, m, n)
        got, expected = ops.sinkhorn_newton(cost, 3 * a, 3 * b, eps, tol=1e-13), reference(cost, 3 * a, 3 * b, eps)
        for x, y in zip(got[:4], expected[:4], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


# --- the limit eps -> 0, speed of convergence ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_4_small_eps_finds_the_assignment(seed: int) -> None:
    cost, a, _ = random_cost(7, seed)
    rows = torch.arange(7)
    best = min(float(cost[rows, list(p)].mean()) for p in itertools.permutations(range(7)))
    result = ops.sinkhorn_newton(cost, a, a, 1 / 2e4)
    assert abs(float((result.plan * cost).sum()) - best) <= 1e-3 * float(cost.max() - cost.min())


@pytest.mark.parametrize(("i", "j", "value"), [(0, 1, 0.01139658), (2, 3, 0.01289609), (10, 20, 0.00310911)])
def test_4_digits(i: int, j: int, value: float) -> None:
    cost = digits_cost()
    result = ops.sinkhorn_newton(cost, digits(i), digits(j), 1 / 1200, tol=1e-12)
    assert abs(float((result.plan * cost).sum()) - value) < 6e-9
    assert result.info[2] <= 80


#: eta, passes of the table; ours count the sweep that forms the row sums too, which the table's do not.
TABLE: list[tuple[str, Callable[[], tuple[Tensor, Tensor, Tensor]], int, int]] = [
    ("random", random_cost, 200, 21),
    ("random", random_cost, 1200, 42),
    ("squared L2", lambda: blobs(2), 200, 34),
    ("squared L2", lambda: blobs(2), 1200, 50),
    ("L1", lambda: blobs(1), 200, 38),
    ("L1", lambda: blobs(1), 1200, 86),
]


@pytest.mark.parametrize(("name", "make", "eta", "passes"), TABLE)
def test_5_passes(name: str, make: Callable[[], tuple[Tensor, Tensor, Tensor]], eta: int, passes: int) -> None:
    cost, a, b = make()
    result = ops.sinkhorn_newton(cost, a, b, 1 / eta, tol=1e-10)
    assert result.info[0] <= 1e-10, name
    assert result.info[2] <= 1.5 * passes, name
    assert error_of(result, a, b) <= 2e-10


def test_5_sweeps_alone_do_not_get_there() -> None:
    cost, a, b = random_cost()
    with pytest.warns(UserWarning, match=r"1 of 1 problems did not reach tol \(largest marginal error"):
        result = ops.sinkhorn_newton(cost, a, b, 1 / 1200, tol=1e-10, mode="sinkhorn", max_iter=300)
    assert result.info[0] > 1e-5
    assert result.info[3] == 0


def test_5_the_hard_spot_of_conjugate_gradients() -> None:
    """eta = 10000: conjugate gradients hit their cap, the sparse Cholesky factorisation takes over."""
    cost, a, b = random_cost()
    result = ops.sinkhorn_newton(cost, a, b, 1e-4, tol=1e-9)
    assert result.info[3] == 1
    assert result.info[1] <= 40
    assert error_of(result, a, b) <= 2e-9


def test_5_a_fixed_number_of_entries_converges_linearly() -> None:
    """The paper's rule takes several times the steps of the one by mass (arXiv:2401.12253, keep 2 n)."""
    cost, a, b = random_cost()
    paper = ops.sinkhorn_newton(cost, a, b, 1 / 1200, tol=1e-11, mode="sns")
    safeguarded = ops.sinkhorn_newton(cost, a, b, 1 / 1200, tol=1e-11, mode="ssns")
    ours = ops.sinkhorn_newton(cost, a, b, 1 / 1200, tol=1e-11)
    assert 40 <= paper.info[1] <= 65
    assert safeguarded.info[1] <= 25
    assert ours.info[1] <= 12
    for result in (paper, safeguarded):
        torch.testing.assert_close(result.plan, ours.plan, rtol=0, atol=1e-9)


def test_7_quadratic_tail() -> None:
    """The errors of the last steps at the final eps, from runs that are stopped after each."""
    cost, a, _ = random_cost(200)
    errors = []
    warnings.filterwarnings("ignore", message="sinkhorn")
    for steps in range(1, 12):
        result = ops.sinkhorn_newton(cost, a, a, 1 / 200, tol=1e-13, max_iter=steps)
        errors.append(float(result.info[0]))
        if result.info[3] == 1:
            break
    assert errors[-1] <= 1e-13
    assert len(errors) >= 3
    for error, following in itertools.pairwise(errors):
        assert following <= max(100 * error**2, 1e-13)


def test_8_a_batch_equals_a_loop_on_any_number_of_threads() -> None:
    cost, a, b = problem(24, 17, 3, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.sinkhorn_newton(cost, a, b, 0.02))
        singles = [ops.sinkhorn_newton(c, p, q, 0.02) for c, p, q in zip(cost, a, b, strict=True)]
        results.append(SinkhornResult(*map(torch.stack, zip(*singles, strict=True))))
    big = random_cost(300)
    one = ops.sinkhorn_newton(*big, 1 / 500)
    torch.set_num_threads(1)
    for x, y in zip(one, ops.sinkhorn_newton(*big, 1 / 500), strict=True):
        assert torch.equal(x, y)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_8_cuda_equals_cpu(dtype: torch.dtype) -> None:
    cost, a, b = (x.to(dtype) for x in problem(90, 1100, 3, 3))
    here, there = ops.sinkhorn_newton(cost, a, b, 0.02), ops.sinkhorn_newton(cost.cuda(), a.cuda(), b.cuda(), 0.02)
    for x, y in zip(here, there, strict=True):
        assert torch.equal(x, y.cpu())


# --- starts, broadcasting, supports ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 50), (50, 30)])
def test_warm_start(n: int, m: int) -> None:
    cost, a, b = problem(n, m)
    cold = ops.sinkhorn_newton(cost, 2 * a, 2 * b, 0.01)
    again = ops.sinkhorn_newton(cost, 2 * a, 2 * b, 0.01, f0=cold.f)
    assert again.info[1] == 0
    assert again.info[2] <= 3
    nearby = ops.sinkhorn_newton(cost + 0.002 * problem(n, m, 5)[0], 2 * a, 2 * b, 0.01, f0=cold.f)
    assert nearby.info[2] < cold.info[2] / 2
    hopeless = ops.sinkhorn_newton(cost, 2 * a, 2 * b, 0.01, f0=100 * torch.randn(n, dtype=F64))
    torch.testing.assert_close(hopeless.plan, cold.plan, rtol=0, atol=1e-8)


def test_leading_dimensions_broadcast() -> None:
    cost, a, b = problem(6, 5, 1, 3)
    many = ops.sinkhorn_newton(cost[0], a[:, None], b, 0.1)
    assert many.plan.shape == (3, 3, 6, 5)
    assert many.info.shape == (3, 3, 4)
    for i, j in itertools.product(range(3), range(3)):
        one = ops.sinkhorn_newton(cost[0], a[i], b[j], 0.1)
        for x, y in zip(many, one, strict=True):
            assert torch.equal(x[i, j], y)
    empty = ops.sinkhorn_newton(cost[:0], a[:0], b[:0], 0.1)
    assert empty.plan.shape == (0, 6, 5)


def test_layouts() -> None:
    cost, a, b = problem(12, 15)
    wide = torch.zeros(15, 24, dtype=F64)
    wide[:, ::2] = cost.T
    expected = ops.sinkhorn_newton(cost, a, b, 0.05)
    got = ops.sinkhorn_newton(wide[:, ::2].T, a, b, 0.05)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_zero_masses_are_left_out() -> None:
    cost, a, b = problem(7, 6)
    a[2] = a[5] = b[0] = 0
    a, b = a / a.sum(), b / b.sum()
    cost[2] = math.nan  # never looked at
    rows, columns = a > 0, b > 0
    result = ops.sinkhorn_newton(cost, a, b, 0.05)
    part = ops.sinkhorn_newton(cost[rows][:, columns], a[rows], b[columns], 0.05)
    assert torch.equal(result.plan[rows][:, columns], part.plan)
    assert float(result.plan[~rows].abs().sum()) == 0
    assert float(result.plan[:, ~columns].abs().sum()) == 0
    assert torch.equal(result.f[~rows], torch.full((2,), -math.inf, dtype=F64))
    assert torch.equal(result.g[~columns], torch.full((1,), -math.inf, dtype=F64))
    assert torch.equal(result.f[rows], part.f)
    assert result.value == part.value
    cost[2] = 0.5
    for x in (cost, a, b):
        x.requires_grad_()
    result = ops.sinkhorn_newton(cost, a, b, 0.05)
    (result.value + (result.plan * torch.rand(7, 6, dtype=F64)).sum() + result.f[0] * result.g[2]).backward()
    for x, zero in ((cost.grad, ~rows), (a.grad, ~rows), (b.grad, ~columns)):
        assert x is not None
        assert bool(x.isfinite().all())
        assert float(x[zero].abs().sum()) == 0


def test_forbidden_pairs() -> None:
    cost, a, _ = random_cost(6, 3)
    cost = torch.where(torch.eye(6) + torch.eye(6).roll(1, 0) > 0, cost, math.inf)
    for mode in ("auto", "ssns", "sinkhorn"):
        result = ops.sinkhorn_newton(cost, a, a, 0.1, mode=mode, max_iter=1000)
        assert error_of(result, a, a) < 2e-9
        assert bool((result.plan[cost.isinf()] == 0).all())
    cost.requires_grad_()
    ops.sinkhorn_newton(cost, a, a, 0.1).plan.square().sum().backward()
    assert cost.grad is not None
    assert bool(cost.grad.isfinite().all())


def test_a_support_without_a_plan_is_reported() -> None:
    """Both rows may only use column 0, which takes half of the mass: no loop, no silence."""
    inf = math.inf
    cost = torch.tensor([[0.0, inf], [0.0, inf], [1.0, 2.0]], dtype=F64)
    a, b = torch.tensor([0.4, 0.4, 0.2], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    with pytest.warns(UserWarning, match=r"1 of 1 problems did not reach tol .*check that the finite costs"):
        result = ops.sinkhorn_newton(cost, a, b, 0.1)
    assert result.info[3] == 0
    assert result.info[0] > 0.1


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_costs_are_solved_in_double(dtype: torch.dtype) -> None:
    """eta C = 1200, where a float32 exponent would leave 1e-4 in the marginals."""
    cost, a, _ = random_cost(100)
    narrow = cost.to(dtype)
    result = ops.sinkhorn_newton(narrow, a.float(), a.float(), 1 / 1200, tol=1e-10)
    exact = ops.sinkhorn_newton(narrow.double(), a.float().double(), a.float().double(), 1 / 1200, tol=1e-10)
    assert [x.dtype for x in result] == [torch.float32] * 4 + [F64]
    assert result.info[0] <= 1e-10
    for x, y in zip(result[:4], exact[:4], strict=True):
        torch.testing.assert_close(x, y.float(), rtol=1e-6, atol=1e-9)


def test_default_tolerances() -> None:
    cost, a, _ = random_cost(60)
    wide, narrow = ops.sinkhorn_newton(cost, a, a, 0.01), ops.sinkhorn_newton(cost.float(), a.float(), a.float(), 0.01)
    assert wide.info[0] <= 1e-9
    assert narrow.info[0] <= 1e-5


def test_eps_may_be_far_beyond_where_kernels_underflow() -> None:
    cost, a, b = problem(20, 20)
    for eps in (1e-6, 1e3):
        assert error_of(ops.sinkhorn_newton(1e3 * cost, a, b, 1e3 * eps), a, b) < 2e-9


# --- derivatives -----------------------------------------------------------------------------------------------------


def through_softmax(k: int) -> Callable[..., tuple[Tensor, ...]]:
    def function(cost: Tensor, la: Tensor, lb: Tensor) -> tuple[Tensor, ...]:
        result = ops.sinkhorn_newton(cost, 2 * la.softmax(-1), 2 * lb.softmax(-1), 0.1, tol=1e-13)
        return tuple(result[:k])

    return function


def gradcheck_inputs(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    shapes = ((*batch, 5, 4), (*batch, 5), (4,))  # the last one is broadcast
    return tuple(torch.rand(s, generator=rng, dtype=F64).requires_grad_() for s in shapes)  # type: ignore[return-value]


def test_6_gradcheck_of_the_value() -> None:
    for batch in ((), (2,)):
        inputs = gradcheck_inputs(*batch)
        assert torch.autograd.gradcheck(through_softmax(1), inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(through_softmax(1), inputs, check_fwd_over_rev=True)


def test_6_gradcheck_of_plan_and_potentials() -> None:
    inputs = gradcheck_inputs()
    assert torch.autograd.gradcheck(through_softmax(4), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(through_softmax(4), inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (4, 5), (3, 3)])
def test_6_gradcheck_of_the_solve(n: int, m: int) -> None:
    """For any plan and right-hand side, consistent or not."""
    rng = torch.Generator().manual_seed(n)
    plan, u, v = (torch.rand(s, generator=rng, dtype=F64).requires_grad_() for s in ((2, n, m), (2, n), (2, m)))
    assert torch.autograd.gradcheck(solve, (plan, u, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, (plan, u, v), check_fwd_over_rev=True)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (30, 20)])
def test_6_the_solve_is_the_pseudo_inverse(n: int, m: int) -> None:
    cost, a, b = problem(n, m)
    plan = ops.sinkhorn_newton(cost, a, b, 0.05, tol=1e-13).plan
    u, v = torch.randn(n, dtype=F64), torch.randn(m, dtype=F64)
    for x, y in zip(solve(plan, u, v), hess_solve(plan, u, v), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


def test_6_vjp_against_central_differences_and_the_dense_formula() -> None:
    cost, a, b = problem(12, 9)
    eps = 0.03
    by_plan, by_f, by_g = torch.randn(12, 9, dtype=F64), torch.randn(12, dtype=F64), torch.randn(9, dtype=F64)
    inputs = [x.clone().requires_grad_() for x in (cost, a, b)]
    result = ops.sinkhorn_newton(*inputs, eps, tol=1e-14)
    torch.autograd.backward((result.plan, result.f, result.g), (by_plan, by_f, by_g))
    grads = [x.grad for x in inputs]
    expected = vjp(result.plan.detach(), result.f.detach(), result.g.detach(), a, b, eps, by_plan, by_f, by_g)
    direction_a, direction_b = (torch.randn_like(x) for x in (a, b))
    directions = [torch.randn_like(cost), direction_a - direction_a.mean(), direction_b - direction_b.mean()]
    for grad, dense, direction in zip(grads, expected, directions, strict=True):
        assert grad is not None
        assert float(((grad - dense) * direction).sum().abs()) <= 1e-8 * float((dense * direction).sum().abs())

    def loss(t: float) -> float:
        moved = [x + t * d for x, d in zip((cost, a, b), directions, strict=True)]
        r = ops.sinkhorn_newton(*moved, eps, tol=1e-14)
        return float((r.plan * by_plan).sum() + r.f @ by_f + r.g @ by_g)

    h = 1e-5
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    total = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True) if g is not None)
    assert abs(slope - total) <= 1e-6 * abs(total)


def test_6_transport_cost_of_the_plan() -> None:
    """Gradient of <C, P>, which needs the plan's derivative besides P itself."""
    cost, a, b = problem(8, 8)
    cost.requires_grad_()

    def sharp(c: Tensor) -> Tensor:
        return (c * ops.sinkhorn_newton(c, a, b, 0.05, tol=1e-14).plan).sum()

    assert torch.autograd.gradcheck(sharp, (cost,))


def test_6_value_gradient_needs_no_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The envelope: the plan itself is the gradient, to the bit."""
    cost, a, b = problem(10, 12)
    cost.requires_grad_()
    result = ops.sinkhorn_newton(cost, a, b, 0.05)
    with torch.profiler.profile() as profile:
        (grad,) = torch.autograd.grad(result.value, cost)
    assert torch.equal(grad, result.plan.detach())
    assert not any("hess_solve" in event.key for event in profile.key_averages())


def exact_gradient(plan: Tensor, eps: float, by_plan: Tensor) -> Tensor:
    """grad_C of sum(plan * by_plan) in 350 digits: couplings of blocks may be as small as 1e-300."""
    import mpmath

    n, m = plan.shape
    with mpmath.workdps(350):
        p = mpmath.matrix(plan.tolist())
        weighted = mpmath.matrix(n, m)
        for i, j in itertools.product(range(n), range(m)):
            weighted[i, j] = p[i, j] * mpmath.mpf(float(by_plan[i, j])) / eps
        system, rhs = mpmath.matrix(n + m - 1, n + m - 1), mpmath.matrix(n + m - 1, 1)  # beta_m = 0
        for i in range(n):
            system[i, i] = mpmath.fsum(p[i, j] for j in range(m))
            rhs[i] = mpmath.fsum(weighted[i, j] for j in range(m))
        for j in range(m - 1):
            system[n + j, n + j] = mpmath.fsum(p[i, j] for i in range(n))
            rhs[n + j] = mpmath.fsum(weighted[i, j] for i in range(n))
            for i in range(n):
                system[i, n + j] = system[n + j, i] = p[i, j]
        z = mpmath.lu_solve(system, rhs)
        beta = [z[n + j] for j in range(m - 1)] + [mpmath.mpf(0)]
        rows = [[float(p[i, j] * (z[i] + beta[j]) - weighted[i, j]) for j in range(m)] for i in range(n)]
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("eps", [0.05, 1 / 400])
def test_6_gradients_at_small_eps(eps: float) -> None:
    n = 32
    cost, a, _ = random_cost(n)
    by_plan = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    for dtype, tol in ((F64, 1e-12), (torch.float32, 1e-6)):
        c = cost.to(dtype).requires_grad_()
        result = ops.sinkhorn_newton(c, a.to(dtype), a.to(dtype), eps, tol=1e-12)
        (grad,) = torch.autograd.grad(result.plan, c, by_plan.to(dtype))
        expected = exact_gradient(result.plan.detach().double(), eps, by_plan.to(dtype).double())
        addends = result.plan.detach() * by_plan / eps  # which cancel in the gradient
        assert float((grad.double() - expected).norm()) <= tol * float(addends.norm())


def test_6_forward_mode() -> None:
    """torch.func refuses autograd functions written in C++ by name; torch.autograd.forward_ad does not need it."""
    fwd = torch.autograd.forward_ad
    cost, a, b = problem(6, 7)
    tangent = torch.randn_like(cost)
    with fwd.dual_level():
        dual = ops.sinkhorn_newton(fwd.make_dual(cost, tangent), a, b, 0.05)
        moved = fwd.unpack_dual(dual.value).tangent
        assert moved is not None
        torch.testing.assert_close(moved, (dual.plan * tangent).sum(), rtol=1e-12, atol=0)
    hessian = torch.autograd.functional.hvp(lambda c: ops.sinkhorn_newton(c, a, b, 0.05).value, cost, tangent)[1]
    with fwd.dual_level():
        dual_cost = fwd.make_dual(cost.clone().requires_grad_(), tangent)
        (grad,) = torch.autograd.grad(ops.sinkhorn_newton(dual_cost, a, b, 0.05).value, dual_cost)
        forward = fwd.unpack_dual(grad).tangent
    assert forward is not None
    torch.testing.assert_close(forward, hessian, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda c: ops.sinkhorn_newton(c, a, b, 0.05).value)(cost)


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    cost, a, b = (x.to(dtype).requires_grad_() for x in problem(5, 4, 0, 2))
    torch.library.opcheck(newton, (cost, a, b, 0.5))
    torch.library.opcheck(newton, (cost.detach(), a.detach()[0], b.detach(), 0.5), {"mode": "sns", "f0": a.detach()})
    torch.library.opcheck(solve, (cost, a, b))


def test_compile_fullgraph_and_meta() -> None:
    torch._dynamo.reset()
    cost, a, b = problem(6, 7)

    def loss(c: Tensor) -> Tensor:
        result = ops.sinkhorn_newton(c * 2, a, b, 0.1)
        return result.value + (result.plan * c).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        c = cost.clone().requires_grad_()
        function(c).backward()
        assert c.grad is not None
        grads.append(c.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-15)
    result = ops.sinkhorn_newton(cost.to("meta").expand(3, 6, 7), a.to("meta"), b.to("meta"), 0.1)
    assert [tuple(x.shape) for x in result] == [(3,), (3, 6, 7), (3, 6), (3, 7), (3, 4)]
    assert result.info.dtype == F64


def case(**changes: Any) -> dict[str, Any]:
    cost, a, b = problem(3, 4)
    return {"C": cost, "a": a, "b": b, "eps": 0.1, **changes}


def with_entry(x: Tensor, index: Any, value: float) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


A, B, COST = problem(3, 4)[1], problem(3, 4)[2], problem(3, 4)[0]
ROW_FORBIDDEN = with_entry(COST, 1, math.inf)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps must be a finite number > 0, got 0"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number > 0, got -1"),
        ({"eps": math.nan}, ValueError, "eps must be a finite number > 0"),
        ({"tol": 0.0}, ValueError, "tol must be > 0"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1, got 0"),
        ({"mode": "newton"}, ValueError, "mode must be 'auto', 'sns', 'ssns' or 'sinkhorn', got 'newton'"),
        ({"a": with_entry(A, 1, math.nan)}, ValueError, r"a\[1\] of problem 0 is nan; a marginal holds finite masses"),
        ({"b": with_entry(B, 3, -0.1)}, ValueError, r"b\[3\] of problem 0 is -0.1"),
        ({"a": with_entry(A, 0, math.inf)}, ValueError, r"a\[0\] of problem 0 is inf"),
        ({"a": 2 * A}, ValueError, "a sums to 2 and b to 1; both must carry the same mass"),
        ({"a": A * 0, "b": B * 0}, ValueError, "a of problem 0 sums to 0; there must be some mass"),
        ({"C": with_entry(COST, (1, 2), math.nan)}, ValueError, "C of problem 0 has a NaN or -infinity"),
        ({"C": with_entry(COST, (1, 2), -math.inf)}, ValueError, "C of problem 0 has a NaN or -infinity"),
        ({"C": ROW_FORBIDDEN}, ValueError, "row 1 of problem 0 has mass but no finite cost"),
        ({"C": with_entry(COST, (slice(None), 2), math.inf)}, ValueError, "column 2 of problem 0 has mass but no fin"),
        ({"C": COST * math.inf}, ValueError, "has mass but no finite cost"),
        ({"C": COST[0]}, ValueError, r"C must be \[..., n, m\], got shape \[4\]"),
        ({"C": COST[:0], "a": A[:0]}, ValueError, "both sides need at least one point"),
        ({"C": COST[:, :0], "b": B[:0]}, ValueError, "both sides need at least one point"),
        ({"a": A[:2]}, ValueError, r"a has shape \[2\], its last dimension must be the rows of C"),
        ({"b": B[:2]}, ValueError, r"b has shape \[2\], its last dimension must be the columns of C"),
        ({"f0": A[:2]}, ValueError, r"f0 has shape \[2\]; it must be \[..., n\] like a"),
        ({"f0": A * math.nan}, ValueError, r"f0\[0\] of problem 0 is nan; a start must be finite wherever a > 0"),
        ({"C": COST.long()}, TypeError, "C has dtype Long; supported are"),
        ({"a": A.float()}, TypeError, "a has dtype Float; a cost of dtype Double takes marginals of dtype Double"),
        ({"C": COST.half(), "a": A.half()}, TypeError, "a has dtype Half; a cost of dtype Half takes marginals of"),
        ({"C": COST.expand(2, 3, 4), "a": A.expand(3, 3)}, RuntimeError, "must match"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = case(**changes)
    with pytest.raises(error, match=message):
        ops.sinkhorn_newton(
            arguments.pop("C"), arguments.pop("a"), arguments.pop("b"), arguments.pop("eps"), **arguments
        )


def test_equal_masses_are_asked_to_the_precision_of_the_dtype() -> None:
    cost, a, b = problem(3, 4)
    ops.sinkhorn_newton(cost, a * (1 + 5e-7), b, 0.1)
    ops.sinkhorn_newton(cost.float(), a.float() * (1 + 5e-5), b.float(), 0.1)
    with pytest.raises(ValueError, match="same mass"):
        ops.sinkhorn_newton(cost, a * (1 + 5e-6), b, 0.1)
    with pytest.raises(ValueError, match="same mass"):
        ops.sinkhorn_newton(cost.float(), a.float() * (1 + 5e-4), b.float(), 0.1)


def test_a_batch_names_the_problem() -> None:
    cost, a, b = problem(3, 4, 0, 5)
    a[3, 1] = -1
    with pytest.raises(ValueError, match=r"a\[1\] of problem 3 is -1"):
        ops.sinkhorn_newton(cost, a, b, 0.1)
    with pytest.raises(TypeError, match="u has dtype Float"):
        solve(cost, a.float(), b)
    with pytest.raises(ValueError, match=r"v has shape \[5, 3\], plan \[5, 3, 4\]"):
        solve(cost, a, a)
