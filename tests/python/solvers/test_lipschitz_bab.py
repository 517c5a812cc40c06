"""Branch and bound: exact one-dimensional constants (5), monotone in the nodes, and what each split reaches."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ext import ops, solvers
from torch_ext.reference.ops import exact_1d
from torch_ext.reference.solvers import lipschitz_bab as reference
from torch_ext.reference.solvers import pattern_maximum

F64 = torch.float64


def drawn(seed: int, *sizes: int) -> tuple[nn.Sequential, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights, biases, layers = [], [], []
    for a, b in pairwise(sizes):
        linear = nn.Linear(a, b, dtype=F64)
        linear.weight.data = torch.randn(b, a, generator=generator, dtype=F64) * (2 / a) ** 0.5
        linear.bias.data = 0.3 * torch.randn(b, generator=generator, dtype=F64)
        weights.append(linear.weight.data)
        biases.append(linear.bias.data)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]), weights, biases


def box(centre: Any, radius: float) -> tuple[Tensor, Tensor]:
    centre = torch.as_tensor(centre, dtype=F64)
    return centre - radius, centre + radius


@pytest.mark.parametrize(
    ("sizes", "radius", "count"),
    [((1, 16, 16, 3), 0.5, 60), ((1, 32, 32, 32, 3), 0.1, 40), ((1, 32, 32, 32, 3), 0.5, 40)],
)
def test_5_reaches_the_exact_constant_in_one_dimension(sizes: tuple[int, ...], radius: float, count: int) -> None:
    centres = torch.randn(count, 1, generator=torch.Generator().manual_seed(5), dtype=F64)
    most = 0
    for seed in range(count):
        model, weights, biases = drawn(seed, *sizes)
        lo, hi = box(centres[seed], radius)
        upper, lower, nodes = solvers.lipschitz_bab(model, lo, hi, max_nodes=200)
        exact = exact_1d(weights, biases, float(lo), float(hi))
        assert exact * (1 - 1e-12) <= upper <= exact * (1 + 1e-6) + 1e-300
        assert exact * (1 - 2e-6) <= lower <= exact * (1 + 1e-12)
        most = max(most, nodes)
    assert most <= 200


def test_5_monotone_along_the_search_and_any_time() -> None:
    model, _weights, _biases = drawn(1, 2, 12, 12, 2)
    lo, hi = box([0.2, -0.1], 1.0)
    root = ops.local_lipschitz(model, torch.zeros(1, 2, dtype=F64) + (lo + hi)[None] / 2, 1.0).L.max()
    before = (math.inf, 0.0)
    for nodes in (1, 2, 3, 5, 9, 17, 33, 65, 129, 301):
        upper, lower, used = solvers.lipschitz_bab(model, lo, hi, max_nodes=nodes)
        assert used <= nodes
        assert lower <= upper
        assert upper <= before[0]
        assert lower >= before[1]
        before = upper, lower
        if nodes == 1:
            assert upper == pytest.approx(float(root.detach()), rel=1e-12)
    assert before[0] < 0.7 * float(root.detach())


def test_equals_the_reference() -> None:
    for seed in range(4):
        model, weights, biases = drawn(seed, 2, 8, 8, 2)
        lo, hi = box([0.3, 0.1], 0.5)
        expected = reference(weights, biases, lo, hi, max_nodes=400, tol=1e-3)
        result = solvers.lipschitz_bab(model, lo, hi, max_nodes=800, tol=1e-3)
        # Batches look at more boxes than one at a time does, so only what both enclose is the same.
        assert result.lower <= expected[0] * (1 + 1e-12)
        assert expected[1] <= result.upper * (1 + 1e-12)
        root = solvers.lipschitz_bab(model, lo, hi, max_nodes=1)
        assert root == pytest.approx(reference(weights, biases, lo, hi, max_nodes=1), rel=1e-12)


def test_activation_split_reaches_the_largest_pattern_not_the_constant() -> None:
    gaps = []
    for seed in range(6):
        model, weights, biases = drawn(seed, 2, 5, 5, 2)
        lo, hi = box([0.1, 0.2], 0.6)
        expected = pattern_maximum(weights, biases, lo, hi)
        upper, lower, _nodes = solvers.lipschitz_bab(model, lo, hi, split="activation", max_nodes=5000, tol=0)
        assert upper == pytest.approx(expected, rel=1e-9)
        assert lower <= upper
        exact = solvers.lipschitz_bab(model, lo, hi, max_nodes=3000)
        assert exact.lower <= upper * (1 + 1e-12)
        gaps.append(upper / exact.upper)
    assert max(gaps) > 1.01  # some pattern does not occur in the box


def test_one_output_and_a_hand_made_constant() -> None:
    model, _weights, _biases = drawn(3, 2, 8, 3)
    lo, hi = box([0.0, 0.0], 0.5)
    single = [solvers.lipschitz_bab(model, lo, hi, output=i, max_nodes=2000).upper for i in range(3)]
    whole = solvers.lipschitz_bab(model, lo, hi, max_nodes=2000).upper
    assert whole == pytest.approx(max(single), rel=1e-5)


@pytest.mark.parametrize("split", ["input", "activation"])
def test_a_linear_net_needs_one_node(split: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2, dtype=F64))
    expected = float(model[0].weight.detach().abs().sum(1).max())
    result = solvers.lipschitz_bab(model, -torch.ones(3, dtype=F64), torch.ones(3, dtype=F64), split=split)
    assert result == pytest.approx((expected, expected, 1), rel=1e-12)


def test_smooth_nets_close_the_gap_and_images_pass() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        smooth = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)).double()
        conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double()
    lo, hi = box([0.0], 1.0)
    grid = torch.linspace(-1, 1, 20001, dtype=F64)[:, None].requires_grad_()
    slopes = torch.autograd.grad(smooth(grid).sum(), grid)[0].abs().max()
    result = solvers.lipschitz_bab(smooth, lo, hi, max_nodes=4000, tol=1e-3)
    assert float(slopes) <= result.upper <= float(slopes) * 1.002
    image = torch.zeros(1, 4, 4, dtype=F64)
    assert solvers.lipschitz_bab(conv, image - 0.1, image + 0.1, max_nodes=9).nodes <= 9


def test_limits_of_time_and_width() -> None:
    model, _, _ = drawn(0, 4, 32, 32, 3)
    lo, hi = box([0.0] * 4, 1.0)
    assert solvers.lipschitz_bab(model, lo, hi, max_seconds=0.0).nodes == 1
    point = torch.full((4,), 0.3, dtype=F64)
    upper, lower, nodes = solvers.lipschitz_bab(model, point, point)
    assert upper == pytest.approx(lower, rel=1e-12)
    assert nodes == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "both"}, 'split must be "input" or "activation", got "both"'),
        ({"max_nodes": 0}, "max_nodes must be at least 1, got 0"),
        ({"max_seconds": -1.0}, "max_seconds must be >= 0, got -1"),
        ({"tol": -1.0}, "tol must be a finite number >= 0"),
        ({"output": 3}, r"outputs must be in \[0, 3\), got 3"),
        ({"lo": torch.ones(4, dtype=F64)}, "the box is empty or holds NaN"),
        ({"hi": torch.ones(5, dtype=F64)}, "lo and hi must have one shape"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    model, _, _ = drawn(0, 4, 8, 3)
    arguments = {"lo": torch.zeros(4, dtype=F64), "hi": torch.full((4,), 0.5, dtype=F64), **options}
    with pytest.raises(ValueError, match=message):
        solvers.lipschitz_bab(model, **arguments)


def test_activation_split_of_a_smooth_net_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with pytest.raises(ValueError, match="split=\"activation\" needs ReLU or LeakyReLU, layer '1' is smooth"):
        solvers.lipschitz_bab(model, *box([0.0, 0.0], 1.0), split="activation")
    with pytest.raises(TypeError, match=r"layer '1' \(Softmax\) has no bound"):
        solvers.lipschitz_bab(nn.Sequential(nn.Linear(2, 2), nn.Softmax(0)).double(), *box([0.0, 0.0], 1.0))
