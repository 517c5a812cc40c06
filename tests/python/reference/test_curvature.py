"""hvp and hutchinson_diag of the reference against closed forms."""

import pytest
import torch

from torch_ext.reference.curvature import hutchinson_diag, hvp
from torch_ext.reference.curvature.hvp import finite_difference_step


def cubic() -> tuple[list[torch.Tensor], torch.Tensor]:
    """f = x^2 y + y^3 + 2 u: H = [[2y, 2x], [2x, 6y]], u linear, w unused."""
    params = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (3.0, -2.0, 1.0, 4.0)]
    x, y, u, _ = params
    return params, (x * x * y + y**3 + 2 * u).sum()


def test_hvp_of_a_cubic() -> None:
    params, loss = cubic()
    v = [torch.tensor([t], dtype=torch.float64) for t in (1.0, 10.0, 5.0, 5.0)]
    assert [float(h) for h in hvp(loss, params, v)] == [-4 + 60, 6 - 120, 0, 0]


def test_hvp_when_nothing_has_curvature() -> None:
    w = torch.ones(3, requires_grad=True)
    for loss in (w.sum() * 2, torch.zeros((), requires_grad=True) * 1.0, torch.tensor(1.0)):
        assert hvp(loss, [w], [torch.ones(3)])[0].tolist() == [0, 0, 0]


def test_finite_difference_restores_the_parameters() -> None:
    w = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    before, calls = w.detach().clone(), 0

    def loss() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("a model that fails")
        return (w**3).sum()

    (h,) = hvp(loss, [w], [torch.ones(3)], mode="finite_difference")
    torch.testing.assert_close(h, 6 * before, rtol=1e-4, atol=1e-5)
    assert torch.equal(w, before)
    with pytest.raises(RuntimeError, match="a model that fails"):
        hvp(loss, [w], [torch.ones(3)], mode="finite_difference")
    assert torch.equal(w, before)


def test_finite_difference_step() -> None:
    assert finite_difference_step([torch.zeros(3)]) == pytest.approx(1e-5)  # theta = 0
    assert finite_difference_step([torch.full((3,), 2.0), torch.full((5,), -2.0)]) == pytest.approx(2e-2)
    assert finite_difference_step([torch.full((3,), 2.0, dtype=torch.float64)]) == pytest.approx(2e-4)
    assert finite_difference_step([torch.empty(0)]) == pytest.approx(1e-5)


def test_bad_input() -> None:
    params, loss = cubic()
    with pytest.raises(TypeError, match="needs a function"):
        hvp(loss, params, params, mode="finite_difference")
    with pytest.raises(ValueError, match="mode must be"):
        hvp(loss, params, params, mode="forward")
    with pytest.raises(ValueError, match="n_samples"):
        hutchinson_diag(loss, params, n_samples=0)


def test_hutchinson_is_exact_for_a_diagonal_hessian() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    for n_samples in (1, 4):
        (d,) = hutchinson_diag((x**3).sum(), [x], n_samples=n_samples, seed=5)
        assert d.tolist() == [6.0, 12.0, 18.0]


def test_hutchinson_is_unbiased_and_keeps_the_sign() -> None:
    h = torch.tensor([[-2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (d,) = hutchinson_diag(lambda: x @ h @ x / 2, [x], n_samples=4000)
    torch.testing.assert_close(d, h.diag(), rtol=0, atol=5 / 4000**0.5)
