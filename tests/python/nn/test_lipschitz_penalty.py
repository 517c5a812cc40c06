"""The penalty: its value, that it owns nothing, and training with it (8)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torch_ext import ops
from torch_ext.nn import LipschitzPenalty


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 72), nn.ReLU(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 10))


def test_value_and_what_it_owns() -> None:
    model = classifier()
    penalty = LipschitzPenalty(model, 0.1, outputs=[1, 2], backward="recurjac")
    x = torch.rand(5, 64)
    bounds = ops.local_lipschitz(model, x, 0.1, outputs=[1, 2], backward="recurjac")
    assert torch.equal(penalty(x), bounds.L.amax(1).mean())
    assert list(penalty.parameters()) == []
    assert penalty.model is model
    assert repr(penalty) == "LipschitzPenalty(eps=0.1, outputs=[1, 2], backward='recurjac')"
    clone = copy.deepcopy(nn.ModuleList([model, penalty]))
    assert clone[1].model is clone[0]


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_eps_is_checked(eps: float) -> None:
    with pytest.raises(ValueError, match="LipschitzPenalty: eps must be a finite number >= 0"):
        LipschitzPenalty(classifier(), eps)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    data, target = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(data / 16).float(), torch.tensor(target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return x[train], y[train], x[test], y[test]


def trained(weight: float, steps: int = 200) -> tuple[float, float]:
    """Mean bound over the test rows, and test accuracy."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(8)
    model = classifier()
    penalty = LipschitzPenalty(model, 0.05)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(8)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        if weight > 0:
            loss = loss + weight * penalty(x[rows[:16]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(penalty(test_x[:100])), float((model(test_x).argmax(1) == test_y).double().mean())


def test_8_training_with_the_penalty_lowers_the_bound() -> None:
    """The bound must fall at least threefold, at less than three points of accuracy."""
    with torch.random.fork_rng():
        plain, penalised = trained(0.0), trained(0.01)
    assert penalised[0] * 3 <= plain[0], (plain, penalised)
    assert penalised[1] > plain[1] - 0.03, (plain, penalised)
