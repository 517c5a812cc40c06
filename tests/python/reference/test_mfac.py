"""The reference M-FAC and its window against dense matrices and closed forms. ``test_<n>`` is acceptance test n of
M-FAC (arXiv:2107.03356) on the reference; the compiled window and optimizer run the same list.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_ext.reference.curvature import FisherWindowReference, dense_fisher, mfac_recursion
from torch_ext.reference.curvature.fisher_window import kept_per_tile, stored_row
from torch_ext.reference.optim import MFACReference

EPS = 2.0**-52


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).detach().clone().requires_grad_()


def filled(rows: Tensor, damping: float, window_format: str = "float64", **options: Any) -> FisherWindowReference:
    window = FisherWindowReference(len(rows), rows.size(1), damping, window_format, **options)
    for row in rows:
        assert window.push(row)
    return window


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- the window


def test_1_hand_case() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    window = filled(rows, 0.5)
    assert window.gram().tolist() == [[1.0, 1.0], [1.0, 2.0]]
    assert dense_fisher(rows, 0.5).tolist() == [[1.5, 0.5], [0.5, 1.0]]
    torch.testing.assert_close(
        window.coefficients() / 2, torch.tensor([-0.2, 0.4], dtype=torch.float64), rtol=0, atol=1e-15
    )
    for u in (window.solve_newest(), window.ihvp(rows[-1]), mfac_recursion(rows, rows[-1], 0.5)):
        torch.testing.assert_close(u, torch.tensor([0.4, 0.8], dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("m", "d", "damping"), [(32, 100, 1e-5), (32, 20, 1e-3), (64, 300, 1e-6)])
@pytest.mark.parametrize("kind", ["random", "zero rows", "permuted"])
def test_2_three_ways_and_the_dense_solve(m: int, d: int, damping: float, kind: str) -> None:
    rows = randn(m, d)
    if kind == "zero rows":
        rows[::3] = 0
        rows[-1] = randn(d, seed=1)
    expected = torch.linalg.solve(dense_fisher(rows, damping), rows[-1])
    if kind == "permuted":  # the newest stays the newest; the recursion takes any order
        rows = torch.cat([rows[:-1][torch.randperm(m - 1, generator=torch.Generator().manual_seed(2))], rows[-1:]])
    k = m * damping * torch.eye(m).double() + rows @ rows.t()
    bound = 20 * max(float(torch.linalg.cond(dense_fisher(rows, damping))), float(torch.linalg.cond(k))) * EPS
    window = filled(rows, damping)
    for u in (window.solve_newest(), window.ihvp(rows[-1]), mfac_recursion(rows, rows[-1], damping)):
        assert error(u, expected) <= bound


def test_4_the_published_formula_cancels_and_ours_does_not() -> None:
    rows = randn(1024, 1000) * (10 / 1000**0.5)
    rows = rows.float()
    exact = filled(rows.double(), 1e-6).solve_newest()
    assert error(filled(rows, 1e-6, "float32").solve_newest().float(), exact) <= 1e-5
    assert error(mfac_recursion(rows, rows[-1], 1e-6), exact) >= 1e-3


def test_5_low_precision() -> None:
    m, d = 64, 2000
    rows = (0.9**0.5 * randn(d) + 0.1**0.5 * randn(m, d, seed=1)) / d**0.5
    exact = filled(rows, 1e-6).solve_newest()
    for window_format, least in (("bfloat16", 0.9999), ("int8", 0.999)):
        window = filled(rows, 1e-6, window_format)
        assert torch.cosine_similarity(window.solve_newest(), exact, dim=0) >= least
        assert torch.cosine_similarity(window.ihvp(rows[-1]), exact, dim=0) <= 0.5  # the raw row, amplified


def test_7_limits() -> None:
    g, damping = randn(50), 0.3
    expected = g / (damping + g @ g)
    for rows in (g[None], g.expand(7, 50)):
        torch.testing.assert_close(filled(rows, damping).solve_newest(), expected, rtol=1e-13, atol=0)
    rows = randn(5, 50)
    u = filled(rows, 1e9).solve_newest()
    assert error(u, rows[-1] / 1e9) <= float(rows[-1] @ rows[-1]) / 1e9


@pytest.mark.parametrize("window_format", ["float64", "float32", "bfloat16", "int8", "topk"])
def test_rows_are_a_queue(window_format: str) -> None:
    window = FisherWindowReference(3, 1500, 0.1, window_format, topk=1.0)
    rows = randn(5, 1500)
    assert window.gram().shape == (0, 0)
    torch.testing.assert_close(window.ihvp(rows[0]), rows[0] / 0.1)
    for t, row in enumerate(rows):
        assert window.push(row)
        assert window.count == min(t + 1, 3)
    tolerance = {"float64": 0.0, "float32": 1e-7, "bfloat16": 2.0**-8, "int8": 1 / 127, "topk": 2.0**-8}[window_format]
    assert bool(((window.matrix - rows[2:]).abs() <= tolerance * rows[2:].abs().max()).all())
    before = window.matrix
    for bad in (float("nan"), float("inf"), -float("inf")):
        row = rows[0].clone()
        row[1200] = bad
        assert not window.push(row)
        assert torch.equal(window.matrix, before)


def test_int8_blocks_have_their_own_scale() -> None:
    row = torch.cat([torch.full((256,), 127.0), torch.full((256,), 1e-3), torch.zeros(256), torch.tensor([-3.0])])
    assert torch.equal(stored_row(row, "int8").float(), row)
    tiny = torch.full((256,), 1e-44)  # the scale is not a normal number
    assert bool(stored_row(tiny, "int8").isfinite().all())
    assert bool((stored_row(tiny, "int8") - tiny).abs().max() <= 1e-44)


def test_topk_keeps_the_largest_of_every_tile_and_the_rest_for_later() -> None:
    assert [kept_per_tile(k) for k in (1e-9, 0.01, 0.5, 1.0)] == [1, 11, 512, 1024]
    row = torch.zeros(2048)
    row[:20] = torch.arange(20.0) + 1
    row[1500] = -4.0
    window = FisherWindowReference(2, 2048, 0.1, "topk")
    window.push(row)
    kept = window.matrix[0]
    assert kept.nonzero().reshape(-1).tolist() == [*range(9, 20), 1500]
    window.push(torch.zeros(2048))
    assert window.matrix[1].nonzero().reshape(-1).tolist() == [*range(9)]
    assert float(window.matrix.sum()) == float(row.sum())
    assert float(window.error.abs().sum()) == 0.0


def test_topk_ties_keep_the_first_columns() -> None:
    row = torch.ones(1024)
    assert stored_row(row, "topk").nonzero().reshape(-1).tolist() == list(range(11))


@pytest.mark.parametrize("window_format", ["bfloat16", "int8", "topk"])
def test_error_feedback_loses_nothing(window_format: str) -> None:
    window = FisherWindowReference(50, 300, 0.1, window_format, topk=0.05, error_feedback=True)
    rows = randn(40, 300).float()
    for row in rows:
        window.push(row)
    torch.testing.assert_close(window.matrix.sum(0) + window.error.double(), rows.double().sum(0), rtol=0, atol=1e-4)


# ---- the optimizer


def plain_steps(p: Tensor, grads: list[Tensor], m: int, damping: float, lr: float) -> Tensor:
    """The method by its definition: a dense Fisher matrix of the last m gradients."""
    seen: list[Tensor] = []
    for g in grads:
        seen = [*seen, g][-m:]
        p = p - lr * torch.linalg.solve(dense_fisher(torch.stack(seen), damping, m), g)
    return p


def test_steps_by_definition() -> None:
    p = leaf(randn(12))
    grads = [randn(12, seed=s) for s in range(1, 10)]
    optimizer = MFACReference([p], lr=0.1, num_grads=4, damping=0.2, window_format="float64")
    start = p.detach().clone()
    for g in grads:
        optimizer.step([g])
    torch.testing.assert_close(p.detach(), plain_steps(start, grads, 4, 0.2, 0.1), rtol=1e-12, atol=1e-13)
    assert optimizer.params[0].state["step"].item() == 9.0
    assert optimizer.window_count == 4


def test_8_warmup_scaling_is_another_damping_and_an_average_over_what_is_there() -> None:
    m, damping = 8, 0.3
    rows = [randn(12, seed=s) for s in range(1, 5)]
    p = leaf(torch.zeros(12))
    optimizer = MFACReference([p], lr=1.0, num_grads=m, damping=damping, window_format="float64", warmup_scaling=True)
    for t, g in enumerate(rows, 1):
        before = p.detach().clone()
        optimizer.step([g])
        f = dense_fisher(torch.stack(rows[:t]), damping * m / t)
        torch.testing.assert_close(before - p.detach(), torch.linalg.solve(f, g), rtol=1e-12, atol=1e-12)


def test_warmup_steps_use_one_row_alone() -> None:
    m, damping = 4, 0.3
    p = leaf(torch.zeros(6))
    optimizer = MFACReference([p], lr=1.0, num_grads=m, damping=damping, window_format="float64", warmup_steps=2)
    rows = [randn(6, seed=s) for s in range(3)]
    for t, g in enumerate(rows):
        before = p.detach().clone()
        optimizer.step([g])
        if t < 2:
            expected = m * g / (m * damping + g @ g)
        else:
            expected = torch.linalg.solve(dense_fisher(torch.stack(rows), damping, m), g)
        torch.testing.assert_close(before - p.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dampening", [None, 0.0, 0.25])
def test_momentum(dampening: float | None) -> None:
    g, p = randn(5), leaf(torch.zeros(5))
    options: dict[str, Any] = {"num_grads": 3, "damping": 0.5, "window_format": "float64"}
    optimizer = MFACReference([p], lr=0.5, momentum=0.8, dampening=dampening, **options)
    weight = 1 - (0.8 if dampening is None else dampening)
    v, q, window = torch.zeros(5).double(), torch.zeros(5).double(), FisherWindowReference(3, 5, 0.5, "float64")
    for _ in range(4):
        optimizer.step([g])
        window.push(g)
        v = 0.8 * v + weight * window.solve_newest()
        q = q - 0.5 * v
    torch.testing.assert_close(p.detach(), q, rtol=1e-13, atol=1e-14)


def test_weight_decay_is_in_the_window_or_beside_it() -> None:
    start, g = randn(5), randn(5, seed=1)
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 3, "damping": 0.5, "window_format": "float64"}
    a, b, c = (leaf(start) for _ in range(3))
    MFACReference([a], weight_decay=0.3, **options).step([g])
    MFACReference([b], **options).step([g + 0.3 * start])
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    MFACReference([c], weight_decay=0.3, decoupled_weight_decay=True, **options).step([g])
    u = 3 * g / (3 * 0.5 + g @ g)
    torch.testing.assert_close(c.detach(), start * (1 - 0.03) - 0.1 * u, rtol=1e-13, atol=0)


def test_missing_gradients_are_zero_segments_and_parameters_left_alone() -> None:
    a, b = leaf(randn(3)), leaf(randn(4, seed=1))
    optimizer = MFACReference(
        [a, b], lr=0.1, num_grads=3, damping=0.5, window_format="float64", weight_decay=0.1, momentum=0.5
    )
    optimizer.step([randn(3), randn(4)])
    before, buffer = b.detach().clone(), optimizer.params[1].state["momentum_buffer"].clone()
    optimizer.step([randn(3, seed=2), None])
    assert torch.equal(b.detach(), before)
    assert torch.equal(optimizer.params[1].state["momentum_buffer"], buffer)
    assert bool((optimizer.windows[0].matrix[-1, 3:] == 0).all())
    assert [float(p.state["step"]) for p in optimizer.params] == [2.0, 1.0]
    optimizer.step([None, None])
    assert optimizer.window_count == 2


def test_blocks_per_group_are_separate_optimizers() -> None:
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 3, "damping": 0.5, "window_format": "float64"}
    a, b, c, d = leaf(randn(3)), leaf(randn(4)), leaf(randn(3)), leaf(randn(4))
    joint = MFACReference([{"params": [a]}, {"params": [b], "lr": 0.2}], blocks="per_group", **options)
    first, second = MFACReference([c], **options), MFACReference([d], **{**options, "lr": 0.2})
    for s in range(5):
        g, h = randn(3, seed=s), randn(4, seed=s + 50)
        joint.step([g, h])
        first.step([g])
        second.step([h])
    assert torch.equal(a, c)
    assert torch.equal(b, d)


def test_a_row_that_is_not_finite_changes_nothing() -> None:
    a, b = leaf(randn(3)), leaf(randn(4))
    for blocks in ("global", "per_group"):
        groups = [{"params": [a]}, {"params": [b]}]
        optimizer = MFACReference(groups, lr=0.1, num_grads=3, damping=0.5, momentum=0.5, blocks=blocks)
        optimizer.step([randn(3), randn(4)])
        before = [a.detach().clone(), b.detach().clone()]
        rows = [w.matrix for w in optimizer.windows.values()]
        optimizer.step([randn(3), torch.tensor([0.0, float("inf"), 0.0, 0.0])])
        assert optimizer.global_skipped == 1
        assert all(torch.equal(x, y) for x, y in zip(before, [a.detach(), b.detach()], strict=True))
        assert all(torch.equal(x, w.matrix) for x, w in zip(rows, optimizer.windows.values(), strict=True))
        assert [float(p.state["step"]) for p in optimizer.params] == [1.0, 1.0]


def test_another_damping_is_a_fresh_window_with_it() -> None:
    rows = randn(6, 9)
    window = filled(rows, 0.1)
    window.damping = 0.7
    torch.testing.assert_close(window.solve_newest(), filled(rows, 0.7).solve_newest(), rtol=0, atol=0)


def test_maximize_of_the_negative_is_equal() -> None:
    a, b = leaf(randn(6)), leaf(randn(6))
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 3, "damping": 0.5, "weight_decay": 0.1}
    first, second = MFACReference([a], **options), MFACReference([b], maximize=True, **options)
    for s in range(5):
        first.step([randn(6, seed=s)])
        second.step([-randn(6, seed=s)])
    assert torch.equal(a, b)


def test_precondition_is_the_dense_inverse() -> None:
    a, b = leaf(randn(2, 3)), leaf(randn(4))
    optimizer = MFACReference([a, b], num_grads=3, damping=0.5, window_format="float64")
    rows = []
    for s in range(2):
        g = [randn(2, 3, seed=s), randn(4, seed=s + 9)]
        rows.append(torch.cat([x.reshape(-1) for x in g]))
        optimizer.step(g)
    x = [randn(2, 3, seed=20), randn(4, seed=21)]
    y = optimizer.precondition(x)
    expected = torch.linalg.solve(dense_fisher(torch.stack(rows), 0.5, 3), torch.cat([t.reshape(-1) for t in x]))
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in y]), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"damping": 0.0}, "damping"),
        ({"num_grads": 0}, "num_grads"),
        ({"window_format": "fp8"}, "window_format"),
        ({"topk": 0.0}, "topk"),
        ({"error_feedback": True}, "error_feedback"),
        ({"momentum": 1.0}, "momentum"),
        ({"dampening": 2.0}, "dampening"),
        ({"blocks": "layer"}, "blocks"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_bad_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"MFAC: {word} must"):
        MFACReference([leaf([1.0])], **options)
