"""nn.SinkhornLoss and torch_ext::sinkhorn_points: point clouds whose cost is never stored."""

from __future__ import annotations

import math
import resource

import pytest
import torch
from torch import Tensor

from torch_ext import nn, ops
from torch_ext.reference.nn import sinkhorn_loss

F64 = torch.float64
points = torch.ops.torch_ext.sinkhorn_points.default
displacement = torch.ops.torch_ext.sinkhorn_displacement.default


def clouds(n: int, m: int, d: int = 3, dtype: torch.dtype = F64, *batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n)
    x, y = (torch.rand(*batch, k, d, generator=rng, dtype=dtype) for k in (n, m))
    a, b = (torch.rand(*batch, k, generator=rng, dtype=dtype) + 0.1 for k in (n, m))
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (20, 30, 3), (30, 20, 2), (12, 1100, 5)])
def test_points_equal_the_dense_cost(n: int, m: int, d: int) -> None:
    x, y, a, b = clouds(n, m, d)
    cost = 0.5 * (x[:, None] - y[None]).square().sum(-1)
    dense = ops.sinkhorn_newton(cost, a, b, 0.02, tol=1e-12)
    value, f, g, info = points(x, y, a, b, 0.02, 1e-12)
    torch.testing.assert_close(value, dense.value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(f, dense.f, rtol=0, atol=1e-10)
    torch.testing.assert_close(g, dense.g, rtol=0, atol=1e-10)
    assert info[3] == 1
    by_x, by_y = displacement(x, y, f, g, 0.02)
    torch.testing.assert_close(by_x, dense.plan.sum(1)[:, None] * x - dense.plan @ y, rtol=0, atol=1e-9)
    torch.testing.assert_close(by_y, dense.plan.sum(0)[:, None] * y - dense.plan.T @ x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("debias", [False, True])
def test_equals_the_reference(debias: bool) -> None:
    x, y, a, b = clouds(15, 10)
    got = nn.SinkhornLoss(0.05, debias=debias)(x, y, a, b)
    torch.testing.assert_close(got, sinkhorn_loss(x, y, a, b, 0.05, debias=debias), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("debias", [False, True])
def test_gradcheck(debias: bool) -> None:
    x, y, a, b = clouds(5, 4, 2)
    a, b = a.log(), b.log()

    def loss(x: Tensor, y: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        return nn.SinkhornLoss(0.2, debias=debias)(x, y, la.softmax(-1), lb.softmax(-1))

    for t in (x, y, a, b):
        t.requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, y, a, b), atol=1e-6)


def test_debiased_is_a_distance() -> None:
    """>= 0, 0 for equal clouds, and blind to how a cloud is ordered."""
    x, y, _, _ = clouds(40, 40)
    loss = nn.SinkhornLoss(0.01, debias=True)
    assert abs(float(loss(x, x))) < 1e-8
    assert abs(float(loss(x, x[torch.randperm(40)]))) < 1e-8
    assert float(loss(x, y)) > 1e-3
    assert float(nn.SinkhornLoss(0.01)(x, x)) < 0  # the entropy is part of V


def test_one_dimension_in_closed_form() -> None:
    """Equal weights on a line: sorted points are matched; eps -> 0 gives half their mean squared distance."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.rand(30, 1, generator=rng, dtype=F64) for _ in range(2))
    exact = 0.5 * (x.sort(0).values - y.sort(0).values).square().mean()
    assert abs(float(nn.SinkhornLoss(1e-5, debias=True)(x, y) - exact)) < 1e-4


def test_batches_and_weights() -> None:
    x, y, a, b = clouds(9, 7, 2, F64, 3)
    loss = nn.SinkhornLoss(0.1)
    together = loss(x, y, a, b)
    assert together.shape == (3,)
    for k in range(3):
        assert torch.equal(together[k], loss(x[k], y[k], a[k], b[k]))
    uniform = loss(x, y[0])
    assert torch.equal(uniform[1], loss(x[1], y[0], torch.full((9,), 1.0, dtype=F64) / 9, torch.ones(7, dtype=F64) / 7))
    a[0, 2] = 0
    a = a / a.sum(-1, keepdim=True)
    x.requires_grad_()
    loss(x, y, a, b).sum().backward()
    assert x.grad is not None
    assert float(x.grad[0, 2].abs().sum()) == 0
    assert float(x.grad[0, 1].abs().sum()) > 0


def test_float32_follows_float64() -> None:
    x, y, a, b = clouds(60, 50)
    narrow = [t.float().requires_grad_() for t in (x, y)]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    loss = nn.SinkhornLoss(1e-3)
    for x_, y_ in (narrow, wide):
        loss(x_, y_, a.to(x_.dtype), b.to(x_.dtype)).backward()
    for p, q in zip(narrow, wide, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-6)


def test_the_cost_is_never_stored() -> None:
    """6000 x 6000 entries would take 288 MB."""
    x, y, _, _ = clouds(6000, 6000, 2, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x.requires_grad_()
    nn.SinkhornLoss(0.5)(x, y).backward()
    assert x.grad is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_no_second_derivative_says_what_to_do() -> None:
    x, y, a, b = clouds(5, 4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(nn.SinkhornLoss(0.1)(x, y, a, b), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"does not implement double backward.*sinkhorn_newton on the cost"):
        grad.sum().backward()


def test_module() -> None:
    loss = nn.SinkhornLoss(0.1, debias=True)
    assert repr(loss) == "SinkhornLoss(eps=0.1, debias=True)"
    assert list(loss.parameters()) == []
    torch._dynamo.reset()
    x, y, a, b = clouds(5, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, y, a, b), loss(x, y, a, b))


def test_opcheck() -> None:
    x, y, a, b = (t.requires_grad_() for t in clouds(5, 4, 3, F64, 2))
    torch.library.opcheck(points, (x, y, a, b, 0.5))
    _, f, g, _ = points(x, y, a, b, 0.5)
    torch.library.opcheck(displacement, (x.detach(), y.detach(), f, g, 0.5))


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    x, y, a, b = clouds(70, 1100)
    here, there = points(x, y, a, b, 0.02), points(x.cuda(), y.cuda(), a.cuda(), b.cuda(), 0.02)
    for p, q in zip(here, there, strict=True):
        assert torch.equal(p, q.cpu())
    for p, q in zip(
        displacement(x, y, here[1], here[2], 0.02),
        displacement(x.cuda(), y.cuda(), there[1], there[2], 0.02),
        strict=True,
    ):
        assert torch.equal(p, q.cpu())


def test_bad_input() -> None:
    x, y, a, b = clouds(5, 4)
    loss = nn.SinkhornLoss(0.1)
    for eps in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="SinkhornLoss: eps must be a finite number > 0"):
            nn.SinkhornLoss(eps)
    with pytest.raises(ValueError, match=r"x must be \[..., n, d\] and y \[..., m, d\]"):
        loss(x, y[:, :2], a, b)
    with pytest.raises(ValueError, match=r"SinkhornLoss: points must be \[..., n, d\]"):
        loss(x[0], y)
    with pytest.raises(TypeError, match="x has dtype Half; points are float32 or float64"):
        loss(x.half(), y.half(), a.half(), b.half())
    with pytest.raises(TypeError, match="y has dtype Float, x Double"):
        loss(x, y.float(), a, b.float())
    with pytest.raises(ValueError, match=r"a has shape \[4\], its points \[5, 3\]"):
        loss(x, y, b, b)
    with pytest.raises(ValueError, match="both must carry the same mass"):
        loss(x, y, 2 * a, b)
    with pytest.raises(ValueError, match="a point of problem 0 is not finite"):
        loss(x * math.nan, y, a, b)
    with pytest.raises(ValueError, match="both sides need at least one point"):
        loss(x[:0], y, a[:0], b)
