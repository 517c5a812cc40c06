"""curvature.hvp in both modes against the reference, closed forms and its own rules for bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ext import curvature
from torch_ext.reference.curvature import hvp as reference
from torch_ext.testing import bits

MODES = ("double_backward", "finite_difference")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Any]:
    params = [randn(*s, seed=i, dtype=dtype).div(2).requires_grad_() for i, s in enumerate(((5, 4), (5,), (1, 5), ()))]
    w, b, v, c = params
    x = randn(9, 4, seed=9, dtype=dtype)
    return params, lambda: ((torch.tanh(x @ w.t() + b) @ v.t() + c) ** 2).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(mode: Any, dtype: torch.dtype) -> None:
    params, loss = problem(dtype)
    v = [randn(*p.shape, seed=20 + i, dtype=dtype) for i, p in enumerate(params)]
    before = bits(params)
    actual, expected = curvature.hvp(loss, params, v, mode=mode), reference(loss, params, v, mode=mode)
    assert bits(params) == before
    for a, e in zip(actual, expected, strict=True):
        assert not a.requires_grad
        if mode == "double_backward":
            assert bits(a) == bits(e)
        else:  # the step h rounds differently
            torch.testing.assert_close(
                a, e, rtol=1e-3 if dtype == torch.float32 else 1e-6, atol=1e-4 if dtype == torch.float32 else 1e-9
            )


def test_equals_the_hessian_matrix() -> None:
    params, _ = problem()
    sizes = [p.numel() for p in params]

    def flat_loss(flat: Tensor) -> Tensor:
        w, b, v, c = (t.reshape(p.shape) for t, p in zip(flat.split(sizes), params, strict=True))
        return ((torch.tanh(randn(9, 4, seed=9) @ w.t() + b) @ v.t() + c) ** 2).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    hessian = torch.autograd.functional.hessian(flat_loss, flat)
    v = randn(sum(sizes), seed=3)
    parts = [t.reshape(p.shape) for t, p in zip(v.split(sizes), params, strict=True)]
    for mode, tolerance in (("double_backward", 1e-13), ("finite_difference", 1e-7)):
        product = curvature.hvp(problem_on(params), params, parts, mode=mode)  # type: ignore[arg-type]
        actual = torch.cat([t.reshape(-1) for t in product])
        torch.testing.assert_close(actual, hessian @ v, rtol=0, atol=tolerance)


def problem_on(params: list[Tensor]) -> Any:
    w, b, v, c = params
    x = randn(9, 4, seed=9)
    return lambda: ((torch.tanh(x @ w.t() + b) @ v.t() + c) ** 2).mean()


def test_tensor_loss_keeps_its_graph() -> None:
    params, loss = problem()
    value = loss()
    v = [torch.ones_like(p) for p in params]
    first, second = curvature.hvp(value, params, v), curvature.hvp(value, params, v)
    assert bits(first) == bits(second) == bits(curvature.hvp(loss, params, v))
    value.backward()
    assert all(p.grad is not None for p in params)


def test_grad_is_not_touched() -> None:
    params, loss = problem()
    for mode in MODES:
        curvature.hvp(loss, params, [torch.ones_like(p) for p in params], mode=mode)  # type: ignore[arg-type]
        assert all(p.grad is None for p in params)


@pytest.mark.parametrize("mode", MODES)
def test_absent_and_linear_parameters_have_none(mode: Any) -> None:
    x, unused, linear = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    v = [torch.full((2,), 3.0, dtype=torch.float64)] * 3
    products = curvature.hvp(lambda: (x**2).sum() + linear.sum(), [x, unused, linear], v, mode=mode)
    torch.testing.assert_close(products[0], v[0] * 2)
    assert products[1].tolist() == products[2].tolist() == [0.0, 0.0]
    only_linear = curvature.hvp(lambda: linear.sum(), [linear], [v[0]], mode=mode)
    assert only_linear[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode: Any, layout: str) -> None:
    values, v = randn(4, 6), randn(4, 6, seed=1)
    plain = values.clone().requires_grad_()
    other = values.t().contiguous().t() if layout == "transposed" else torch.stack([values, values], -1)[..., 1]
    other.requires_grad_()
    results = [curvature.hvp(lambda p=p: (p**4).sum() + p.sum() ** 3, [p], [v], mode=mode)[0] for p in (plain, other)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12 if mode == "double_backward" else 1e-6)


def test_finite_difference_step_does_not_depend_on_threads_or_layout() -> None:
    values = randn(700, 300)
    results = []
    for threads, p in ((1, values.clone()), (2, values.clone()), (2, values.t().contiguous().t())):
        torch.set_num_threads(threads)
        p.requires_grad_()
        results.append(
            bits(curvature.hvp(lambda p=p: (p**4).sum(), [p], [torch.ones_like(p)], mode="finite_difference"))
        )
    assert results[0] == results[1] == results[2]


def test_finite_difference_at_zero_parameters() -> None:
    """h does not vanish with the parameters."""
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (product,) = curvature.hvp(lambda: (p**2).sum() * 2 + p.sum(), [p], [torch.ones_like(p)], mode="finite_difference")
    torch.testing.assert_close(product, torch.full((3,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_finite_difference_works_where_double_backward_cannot() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

    p = randn(3).requires_grad_()
    v = torch.ones_like(p)

    def loss() -> Tensor:
        return (Square.apply(p) ** 2).sum()

    with pytest.raises(RuntimeError, match=r"(?s)twice.*Hessian-vector product.*finite_difference"):
        curvature.hvp(loss, [p], [v])
    (product,) = curvature.hvp(loss, [p], [v], mode="finite_difference")
    torch.testing.assert_close(product, 12 * p.detach() ** 2, rtol=1e-6, atol=1e-6)


def test_generators_are_replayed() -> None:
    dropout = nn.Dropout(0.5)
    p = randn(50).requires_grad_()
    torch.manual_seed(3)
    (product,) = curvature.hvp(lambda: (dropout(p) ** 2).sum(), [p], [torch.ones_like(p)], mode="finite_difference")
    torch.manual_seed(3)
    kept = dropout(torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(product, 2 * kept**2, rtol=1e-5, atol=1e-5)


def test_a_failing_loss_restores_the_parameters() -> None:
    p = randn(4).requires_grad_()
    before, calls = bits(p), []

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second")
        return (p**2).sum()

    with pytest.raises(KeyError, match="second"):
        curvature.hvp(loss, [p], [torch.ones_like(p)], mode="finite_difference")
    assert bits(p) == before


def test_bad_input() -> None:
    p = torch.ones(2, requires_grad=True)
    one = torch.ones(2)
    with pytest.raises(ValueError, match="hvp: got 1 parameters and 2 vectors"):
        curvature.hvp(lambda: (p**2).sum(), [p], [one, one])
    with pytest.raises(ValueError, match=r"hvp: parameter 0 has shape \[2\], its vector \[3\]"):
        curvature.hvp((p**2).sum(), [p], [torch.ones(3)])
    with pytest.raises(TypeError, match="pass a function, not a tensor"):
        curvature.hvp((p**2).sum(), [p], [one], mode="finite_difference")
    for loss in (lambda: (p**2).sum(), (p**2).sum()):
        with pytest.raises(ValueError, match="mode must be 'double_backward' or 'finite_difference', got 'forward'"):
            curvature.hvp(loss, [p], [one], mode="forward")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"the loss must be one number, got shape \[2\]"):
        curvature.hvp(p**2, [p], [one])
    with pytest.raises(RuntimeError, match="the loss carries no graph"):
        curvature.hvp(torch.ones(()), [p], [one])
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(TypeError, match=r"parameter 0 is BFloat16"):
        curvature.hvp(lambda: (half**2).sum(), [half], [half.detach()], mode="finite_difference")
    expanded = torch.ones(1).expand(3).requires_grad_()
    with pytest.raises(RuntimeError, match=r"parameter 0.* is expanded"):
        curvature.hvp(lambda: (expanded**2).sum(), [expanded], [torch.ones(3)], mode="finite_difference")


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_cuda(mode: Any) -> None:
    p = randn(40).requires_grad_()
    q = p.detach().cuda().requires_grad_()
    v = randn(40, seed=1)
    (a,) = curvature.hvp(lambda: (p**4).sum(), [p], [v], mode=mode)
    (b,) = curvature.hvp(lambda: (q**4).sum(), [q], [v.cuda()], mode=mode)
    torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-8)
