"""Certificates of monotonicity: the toy of the acceptance list (9), and against sampled derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_ext import ops, solvers
from torch_ext.reference.solvers import monotonicity as reference

F64 = torch.float64


def toy(last: float) -> nn.Sequential:
    """relu(x0) + 2 x0 + last relu(-x1), with 2 x0 as 2 relu(x0) - 2 relu(-x0)."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    model[0].weight.data = torch.tensor([[1.0, 0], [-1, 0], [0, -1]], dtype=F64)
    model[2].weight.data = torch.tensor([[3.0, -2, last]], dtype=F64)
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    return model


def ones(rows: int = 1) -> Tensor:
    return torch.ones(rows, 2, dtype=F64)


@pytest.mark.parametrize(
    ("last", "high", "signs"), [(-1.0, [[0.0, 5], [0, 1]], [1, 1]), (1.0, [[0, 5], [-1, 0]], [1, -1])]
)
def test_9_toy(last: float, high: list[list[float]], signs: list[int]) -> None:
    model = toy(last)
    bounds = ops.local_lipschitz(model, 0 * ones(), 1.0)
    expected = torch.tensor(high, dtype=F64)
    torch.testing.assert_close(bounds.J_lo[0, 0], expected[:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(bounds.J_hi[0, 0], expected[:, 1], atol=1e-12, rtol=0)
    result = solvers.monotonicity(model, -ones(), ones())
    assert result.dtype == torch.int8
    assert result.tolist() == [[signs]]


def test_undecided_constant_and_many_boxes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    model[0].weight.data = torch.tensor([[1.0, 0], [-1, 0]], dtype=F64)
    model[2].weight.data = torch.tensor([[1.0, 1], [0, -1]], dtype=F64)  # |x0|, and -relu(-x0)
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    lo = torch.tensor([[-1.0, 0], [1, 0], [-2, 0]], dtype=F64)
    signs = solvers.monotonicity(model, lo, lo + torch.tensor([2.0, 1], dtype=F64) * 0.5)
    # Feature 1 enters nowhere: its derivative is 0, which never falls.
    assert signs[..., 0].tolist() == [[0, 1], [1, 1], [-1, 1]]
    assert signs[..., 1].tolist() == [[1, 1]] * 3


def test_certificates_hold_at_sampled_points_and_equal_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.4 + 0.1
    weights, biases = [list(model.parameters())[i::2] for i in (0, 1)]
    weights, biases = [w.detach() for w in weights], [b.detach() for b in biases]
    lo = torch.randn(20, 3, generator=generator, dtype=F64)
    hi = lo + 0.3
    signs = solvers.monotonicity(model, lo, hi)
    assert {-1, 0, 1} >= set(signs.flatten().tolist()) > {0}
    points = lo + (hi - lo) * torch.rand(30, 20, 3, generator=generator, dtype=F64)
    points.requires_grad_()
    for i, column in enumerate(model(points).unbind(-1)):
        slope = torch.autograd.grad(column.sum(), points, retain_graph=True)[0]
        assert (slope * signs[:, i] >= -1e-12).all()
    for k in range(20):
        assert torch.equal(signs[k], reference(weights, biases, lo[k], hi[k]))


def test_safe_certifies_no_more_and_messages() -> None:
    model = toy(-1.0)
    plain, safe = (solvers.monotonicity(model, -ones(), ones(), safe=s) for s in (False, True))
    assert ((safe == 0) | (safe == plain)).all()
    assert (solvers.monotonicity(model, 0.5 * ones(), ones(), safe=True)[..., 0] == 1).all()
    with pytest.raises(ValueError, match="monotonicity: boxes must be"):
        solvers.monotonicity(model, -ones()[0], ones()[0])
    with pytest.raises(ValueError, match="the box is empty"):
        solvers.monotonicity(model, ones(), -ones())
    with pytest.raises(TypeError, match=r"layer '0' \(Softmax\) has no bound"):
        solvers.monotonicity(nn.Sequential(nn.Softmax(1)), -ones(), ones())
