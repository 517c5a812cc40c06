"""curvature.obs_prune: acceptance test 10 of M-FAC (exact on a quadratic loss), masks, lists, schedule, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_ext import curvature
from torch_ext.curvature import StaticFisher, obs_prune, sparsity_schedule
from torch_ext.reference.curvature import obs_prune as reference
from torch_ext.reference.curvature import sparsity_schedule as reference_schedule
from torch_ext.reference.curvature import static_fisher

UPDATES = ["joint", "independent"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(m: int, d: int, damping: float, block: int | None, seed: int = 0) -> tuple[Tensor, StaticFisher, Tensor]:
    g = randn(m, d, seed=seed)
    return randn(d, seed=seed + 1), StaticFisher(g, damping, block), static_fisher.fisher(g, damping, block)


def loss_increase(before: Tensor, after: Tensor, hessian: Tensor) -> Tensor:
    """Of a quadratic loss with its minimum at ``before``."""
    delta = after - before
    return 0.5 * delta @ hessian @ delta


#: (m, d, damping, block): wide, narrow, both.
CASES = [(8, 60, 1e-3, None), (40, 30, 1e-3, None), (16, 100, 1e-2, 30), (16, 100, 1e-2, 7), (1, 7, 0.1, None)]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("m", "d", "damping", "block"), CASES)
def test_10_a_single_weight(m: int, d: int, damping: float, block: int | None, update: str) -> None:
    """Raises the loss by w_i^2 / (2 [F^-1]_ii), the least of all weights; both updates are then the same."""
    w, fisher, dense = problem(m, d, damping, block)
    rho = w**2 / (2 * torch.linalg.inv(dense).diagonal())
    pruned, mask, predicted = obs_prune(w, fisher, 1 / d, update=update)
    i = int(rho.argmin())
    assert (~mask).nonzero().flatten().tolist() == [i]
    assert pruned[i] == 0
    for value in (loss_increase(w, pruned, dense), predicted):
        torch.testing.assert_close(value, rho[i], rtol=1e-10, atol=0)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("m", "d", "damping", "block"), CASES)
def test_10_joint_is_the_optimum(m: int, d: int, damping: float, block: int | None, sparsity: float) -> None:
    """Loss .5 w_S^T [F^-1]_SS^-1 w_S (1e-10), no slope left in any kept weight, zeros exact."""
    w, fisher, dense = problem(m, d, damping, block)
    pruned, mask, predicted = obs_prune(w, fisher, sparsity)
    s = (~mask).nonzero().flatten()
    assert s.numel() == round(sparsity * d)
    assert torch.equal(pruned[s], torch.zeros(s.numel(), dtype=torch.float64))
    inverse = torch.linalg.inv(dense)
    expected = 0.5 * w[s] @ torch.linalg.solve(inverse[s][:, s], w[s])
    for value in (loss_increase(w, pruned, dense), predicted):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    slope = dense @ (pruned - w)
    assert float(slope[mask].abs().max()) < 1e-11 * float(slope.abs().max())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("m", "d", "damping", "block"), CASES)
def test_equals_the_reference(m: int, d: int, damping: float, block: int | None, update: str) -> None:
    w, fisher, dense = problem(m, d, damping, block, seed=5)
    before = torch.rand(d, generator=torch.Generator().manual_seed(0)) > 0.3
    for mask in (None, before):
        got = obs_prune(w, fisher, 0.6, mask=mask, update=update)
        expected = reference(w, dense, 0.6, mask=mask, update=update)
        assert torch.equal(got.mask, expected[1])
        torch.testing.assert_close(got.w, expected[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(got.predicted_loss_increase, expected[2], rtol=1e-9, atol=0)


def test_10_joint_never_loses_to_independent() -> None:
    """For the same set, over 40 problems; and both predictions are the loss that comes true."""
    for seed in range(40):
        w, fisher, dense = problem(8 + seed, 60, 10.0 ** -(seed % 4), [None, 13, 5][seed % 3], seed)
        losses = {}
        for update in UPDATES:
            pruned, mask, predicted = obs_prune(w, fisher, 0.4, update=update)
            losses[update] = loss_increase(w, pruned, dense)
            torch.testing.assert_close(predicted, losses[update], rtol=1e-9, atol=0)
            magnitude = torch.where(mask, w, 0.0)  # the same set, the others left alone
            assert losses["joint"] <= loss_increase(w, magnitude, dense)
        assert losses["joint"] <= losses["independent"]


def test_10_interactions_within_the_set_count() -> None:
    """d = 60, a third pruned: the update of the authors' program, which ignores them, loses several times as much."""
    w, fisher, dense = problem(30, 60, 1e-3, None)
    joint, independent = (obs_prune(w, fisher, 1 / 3, update=update) for update in UPDATES)
    magnitude = torch.where(w.abs() > w.abs().kthvalue(20).values, w, 0.0)
    assert 3 * joint.predicted_loss_increase < independent.predicted_loss_increase
    assert 3 * joint.predicted_loss_increase < loss_increase(w, magnitude, dense)


def test_10_exactly_m_gradients_count() -> None:
    """Each one of m = 3 changes the result, the last too."""
    g, w = randn(3, 9), randn(9, seed=1)
    before = obs_prune(w, StaticFisher(g, 1e-2), 0.5).w
    for i in range(3):
        changed = g.clone()
        changed[i] = 0
        assert not torch.allclose(obs_prune(w, StaticFisher(changed, 1e-2), 0.5).w, before, rtol=1e-6)


@pytest.mark.parametrize("update", UPDATES)
def test_lists_compare_scores_over_layers(update: str) -> None:
    """Two layers are one weight with a block-diagonal Fisher matrix."""
    shapes, ds = [(4, 6), (2, 3, 3)], [24, 18]
    g = [randn(10, d, seed=i) for i, d in enumerate(ds)]
    w = [randn(*shape, seed=7 + i) * (1 + 3 * i) for i, shape in enumerate(shapes)]
    dense = torch.block_diag(*(static_fisher.fisher(x, 1e-2) for x in g))
    expected = reference(torch.cat([x.flatten() for x in w]), dense, 0.5, update=update)
    got = obs_prune(w, [StaticFisher(x, 1e-2) for x in g], 0.5, update=update)
    assert [x.shape for x in got.w] == [x.shape for x in w]
    assert torch.equal(torch.cat([x.flatten() for x in got.mask]), expected[1])
    torch.testing.assert_close(torch.cat([x.flatten() for x in got.w]), expected[0], rtol=1e-9, atol=1e-11)
    zeros = [int((~x).sum()) for x in got.mask]
    assert sum(zeros) == 21
    assert zeros[0] > zeros[1]  # the smaller weights are in the first


@pytest.mark.parametrize("update", UPDATES)
def test_gradual_pruning_through_masks(update: str) -> None:
    w, fisher, _ = problem(8, 60, 1e-2, None)
    mask: Tensor | None = None
    for sparsity in sparsity_schedule(0.8, 4):
        kept = mask
        w, mask, _ = obs_prune(w, fisher, sparsity, mask=mask, update=update)
        assert kept is None or not bool((mask & ~kept).any())  # never comes back
        assert int((~mask).sum()) == round(sparsity * 60)
        assert torch.equal(w[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    assert int((~mask).sum()) == 48


def test_what_happens_to_be_zero_is_not_pruned() -> None:
    """Masks are explicit: the authors' program takes every zero at construction, such as a new bias, for pruned."""
    w, fisher, _ = problem(8, 20, 1e-2, None)
    w[3] = 0
    alive = torch.ones(20, dtype=torch.bool)
    pruned, mask, _ = obs_prune(w, fisher, 0.0, mask=alive)
    assert torch.equal(pruned, w)
    assert bool(mask.all())
    w[3], w[5] = 1e-3, 0.0
    before = alive.clone()
    before[3] = False  # pruned although its value is not zero: taken as zero
    pruned, mask, _ = obs_prune(w, fisher, 2 / 20, mask=before)
    assert (~mask).nonzero().flatten().tolist() == [3, 5]  # a zero costs nothing, so it is the next to go
    expected = w.clone()
    expected[3] = 0
    assert torch.equal(pruned, expected)


def test_ties_go_in_order() -> None:
    fisher = StaticFisher(torch.zeros(1, 8, dtype=torch.float64), 1.0)
    w = torch.tensor([1.0, -1, 2, 1, 1, -1, 1, 1], dtype=torch.float64)
    for count in range(8):
        mask = obs_prune(w, fisher, count / 8).mask
        assert (~mask).nonzero().flatten().tolist() == [0, 1, 3, 4, 5, 6, 7][:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    g, w = randn(8, 40, dtype=dtype), randn(5, 8, seed=1, dtype=dtype)
    got = obs_prune(w, StaticFisher(g, 1e-2), 0.5)
    exact = obs_prune(w.double(), StaticFisher(g.double(), 1e-2), 0.5)
    assert got.w.dtype == dtype
    assert torch.equal(got.mask, exact.mask)
    assert torch.equal(got.w, exact.w.to(dtype))
    assert bool((got.w[~got.mask] == 0).all())


def test_layouts_and_arguments_are_left_alone() -> None:
    w = randn(5, 8)
    fisher = StaticFisher(randn(8, 40, seed=1), 1e-2)
    mask = randn(5, 8, seed=2) > -1
    expected = obs_prune(w, fisher, 0.5, mask=mask)
    other, other_mask = w.t().contiguous().t().requires_grad_(), mask.t().contiguous().t()
    got = obs_prune(other, fisher, 0.5, mask=other_mask)
    assert torch.equal(got.w, expected.w)
    assert torch.equal(got.mask, expected.mask)
    assert not got.w.requires_grad
    assert torch.equal(other, w)
    assert torch.equal(other_mask, mask)
    untouched = obs_prune(w, fisher, 0.0)
    untouched.w.zero_()
    assert bool((w != 0).all())


def test_schedule() -> None:
    for sparsity, n, initial in [(0.95, 16, 0.0), (0.9, 1, 0.5), (0.5, 3, 0.5), (0.0, 2, 0.0)]:
        got = sparsity_schedule(sparsity, n, initial=initial)
        assert got == pytest.approx(reference_schedule(sparsity, n, initial=initial), abs=1e-14)
        assert got[-1] == sparsity
        kept = [1 - initial, *(1 - s for s in got)]
        ratios = [b / a for a, b in itertools.pairwise(kept)]
        assert ratios == pytest.approx([ratios[0]] * n, rel=1e-12)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool, update: str) -> None:
    fishers = [StaticFisher(randn(6, 20, dtype=torch.float32), 1e-2), StaticFisher(randn(6, 9), 1e-2, 4)]
    weights = [randn(4, 5, dtype=torch.float32), randn(9)]
    masks = [torch.ones(w.shape, dtype=torch.bool) for w in weights] if masked else []
    torch.library.opcheck(
        torch.ops.torch_ext.obs_prune.default,
        (
            weights,
            [f.gradients for f in fishers],
            [f.factor for f in fishers],
            [f.tail_factor for f in fishers],
            [f.damping for f in fishers],
            [f.block for f in fishers],
            0.5,
            masks,
            update,
        ),
    )


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w, f: obs_prune(w, f, 1.0), ValueError, r"sparsity must be in \[0, 1\).*got 1"),
        (lambda w, f: obs_prune(w, f, -0.1), ValueError, "sparsity must be in"),
        (lambda w, f: obs_prune(w, f, float("nan")), ValueError, "sparsity must be in"),
        (lambda w, f: obs_prune(w, f, 0.5, update="all"), ValueError, 'update must be "joint" or "indep.*got "all"'),
        (lambda w, f: obs_prune(w[:5], f, 0.5), ValueError, r"weight 0 \(shape \[5\]\) has 5 elements.*12 columns"),
        (lambda w, f: obs_prune([w, w], [f], 0.5), ValueError, "fisher has 1 tensors, expected 2"),
        (lambda w, f: obs_prune([], [], 0.5), ValueError, "no weights to prune"),
        (lambda w, f: obs_prune([w, w / 0], [f, f], 0.5), ValueError, r"weight 1 \(shape \[12\]\) holds NaN or inf"),
        (lambda w, f: obs_prune(w.long(), f, 0.5), TypeError, r"weight 0 \(shape \[12\]\) has dtype Long"),
        (lambda w, f: obs_prune(w, f, 0.5, mask=ones(5)), ValueError, r"the mask of weight 0.*has shape \[5\]"),
        (lambda w, f: obs_prune(w, f, 0.5, mask=[ones(12)] * 2), ValueError, "mask has 2 tensors, expected 1"),
        (lambda w, f: obs_prune(w, f, 0.5, mask=ones(12).int()), TypeError, "must be bool.*got Int"),
        (lambda w, f: obs_prune(w, f, 0.5, mask=~ones(12)), ValueError, "0.5 is below that of the given masks, 1"),
        (lambda w, f: obs_prune(w, [w], 0.5), TypeError, "fisher must be a StaticFisher or a list of them, got"),
        (lambda w, f: sparsity_schedule(0.5, 0), ValueError, "recomputations must be at least 1, got 0"),
        (lambda w, f: sparsity_schedule(0.5, 2, initial=0.6), ValueError, "got initial 0.6 and sparsity 0.5"),
    ],
)
def test_bad_input(call: Callable[[Tensor, StaticFisher], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(randn(12, seed=1), StaticFisher(randn(4, 12), 0.1))


@pytest.mark.cuda
@pytest.mark.parametrize("update", UPDATES)
def test_cuda_equals_cpu(update: str) -> None:
    g, w, mask = randn(8, 37), randn(37, seed=1), randn(37, seed=2) > -1
    a = obs_prune(w, StaticFisher(g, 1e-2), 0.6, mask=mask, update=update)
    b = obs_prune(w.cuda(), curvature.StaticFisher(g.cuda(), 1e-2), 0.6, mask=mask.cuda(), update=update)
    assert torch.equal(a.mask, b.mask.cpu())
    torch.testing.assert_close(a.w, b.w.cpu(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(a.predicted_loss_increase, b.predicted_loss_increase.cpu(), rtol=1e-10, atol=0)
