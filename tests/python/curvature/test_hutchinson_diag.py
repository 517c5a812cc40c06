"""curvature.hutchinson_diag against the reference. Its moments: acceptance test 4 of AdaHessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_ext import curvature, ops
from torch_ext.reference.curvature import hutchinson_diag as reference


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_samples", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 7, 64, 127, 128, 129, 3000])
def test_equals_the_reference(size: int, n_samples: int, dtype: torch.dtype) -> None:
    params = [randn(size, dtype=dtype).requires_grad_(), randn(3, seed=1, dtype=dtype).requires_grad_()]

    def loss() -> Tensor:
        return (params[0] ** 3).sum() * params[1].sum() + (params[1] ** 4).sum()

    actual = curvature.hutchinson_diag(loss(), params, n_samples=n_samples, seed=9)
    expected = reference(loss(), params, n_samples=n_samples, seed=9)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert not a.requires_grad
        torch.testing.assert_close(a, e, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts(layout: str) -> None:
    values = randn(6, 9)
    other = values.t().contiguous().t() if layout == "transposed" else torch.stack([values, values], -1)[..., 0]
    results = []
    for p in (values.clone().requires_grad_(), other.requires_grad_()):
        results.append(curvature.hutchinson_diag((p**4).sum() + p.sum() ** 3, [p], n_samples=2, seed=1)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_diagonal_hessian_is_exact() -> None:
    a, p = randn(100).abs(), randn(100, seed=1).requires_grad_()
    for n_samples in (1, 2, 4):
        (d,) = curvature.hutchinson_diag((a * p * p).sum() / 2, [p], n_samples=n_samples)
        assert torch.equal(d, a)


def test_one_sample_is_z_times_hz() -> None:
    p, q = randn(5).requires_grad_(), randn(5, seed=1).requires_grad_()
    loss = (p * q).sum() ** 2
    z = torch.ops.torch_ext.rademacher_probe([p.detach(), q.detach()], [0, 1], 4, 0, 0)
    expected = [a * b for a, b in zip(z, curvature.hvp(loss, [p, q], z), strict=True)]
    actual = curvature.hutchinson_diag(loss, [p, q], seed=4)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(z[1], ops.rademacher_(torch.empty(5).double(), 4, 0, ordinal=1))


def test_half_precision_gives_float32() -> None:
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    (d,) = curvature.hutchinson_diag((p.float() ** 2).sum(), [p], n_samples=3)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, torch.full((4,), 2.0), rtol=1e-2, atol=0)


def test_the_graph_is_kept_and_grad_untouched() -> None:
    p = randn(4).requires_grad_()
    loss = (p**4).sum()
    curvature.hutchinson_diag(loss, [p], n_samples=2)
    assert p.grad is None
    loss.backward()


def test_parameters_without_curvature() -> None:
    x, unused, linear = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    d = curvature.hutchinson_diag((x**2).sum() + linear.sum(), [x, unused, linear], n_samples=2)
    assert [t.tolist() for t in d] == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_bad_input() -> None:
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        curvature.hutchinson_diag((p**2).sum(), [p], n_samples=0)
    with pytest.raises(RuntimeError, match="the loss carries no graph"):
        curvature.hutchinson_diag(torch.ones(()), [p])
    with pytest.raises(RuntimeError, match="must be one number"):
        curvature.hutchinson_diag(p**2, [p])


@pytest.mark.cuda
def test_cuda_uses_the_same_probes() -> None:
    p = randn(200).requires_grad_()
    q = p.detach().cuda().requires_grad_()
    (a,) = curvature.hutchinson_diag((p**3).sum() * p.sum(), [p], n_samples=2)
    (b,) = curvature.hutchinson_diag((q**3).sum() * q.sum(), [q], n_samples=2)
    torch.testing.assert_close(a, b.cpu(), rtol=1e-10, atol=1e-10)
