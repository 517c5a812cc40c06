"""curvature.FisherWindow and its operators. ``test_<nn>_...`` is acceptance test n of M-FAC (arXiv:2107.03356) here;
``test_bug_<n>_...`` is a defect of another implementation that this one must not have.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_ext.curvature import FisherWindow
from torch_ext.reference.curvature import FisherWindowReference, dense_fisher, mfac_recursion
from torch_ext.reference.curvature.fisher_window import stored_row
from torch_ext.testing import bits

EPS = 2.0**-52
FORMATS = ("float32", "float64", "bfloat16", "int8", "topk")
#: What two computations of the same product with a window of this format may differ by.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-6, "int8": 2e-6, "topk": 2e-6}
#: The same for products of rows: exact in float64 but for bfloat16, which adds 32 products at a time in float32.
GRAM_TOLERANCE = {**dict.fromkeys(FORMATS, 1e-13), "bfloat16": 1e-6}
op = torch.ops.torch_ext


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(rows: Tensor, damping: float, window_format: str = "float64", **options: Any) -> FisherWindow:
    window = FisherWindow(options.pop("num_grads", len(rows)), rows.size(1), damping, window_format, **options)
    for row in rows:
        window.push(row)
    return window


def reference(rows: Tensor, damping: float, window_format: str = "float64", **options: Any) -> FisherWindowReference:
    window = FisherWindowReference(options.pop("num_grads", len(rows)), rows.size(1), damping, window_format, **options)
    for row in rows:
        window.push(row)
    return window


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def correlated(count: int, d: int, correlation: float, seed: int = 0) -> Tensor:
    """Rows of N(0,1) entries that share a part."""
    common, own = randn(d, seed=seed), randn(count, d, seed=seed + 1)
    return correlation**0.5 * common + (1 - correlation) ** 0.5 * own


# ---- the numbered acceptance tests


@pytest.mark.parametrize("window_format", ["float64", "float32", "bfloat16"])
def test_01_hand_case(window_format: str) -> None:
    window = filled(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 0.5, window_format)
    assert window.count == 2
    assert window.gram().tolist() == [[1.0, 1.0], [1.0, 2.0]]
    assert window.gram().dtype == torch.float64
    dtype = torch.float64 if window_format == "float64" else torch.float32
    for u in (window.solve_newest(), window.ihvp(torch.tensor([1.0, 1.0]))):
        assert u.dtype == dtype
        torch.testing.assert_close(u, torch.tensor([0.4, 0.8], dtype=dtype))
    assert error(window.solve_newest(), torch.tensor([0.4, 0.8], dtype=torch.float64)) <= (
        1e-15 if window_format == "float64" else 1e-7
    )


@pytest.mark.parametrize(("m", "d", "damping"), [(32, 100, 1e-5), (32, 20, 1e-3), (64, 300, 1e-6)])
@pytest.mark.parametrize("kind", ["random", "zero rows", "permuted"])
def test_02_three_ways_and_the_dense_solve(m: int, d: int, damping: float, kind: str) -> None:
    rows = randn(m, d)
    if kind == "zero rows":
        rows[::3] = 0
        rows[-1] = randn(d, seed=1)
    dense = dense_fisher(rows, damping)
    expected, x = torch.linalg.solve(dense, rows[-1]), randn(d, seed=5)
    if kind == "permuted":
        rows = torch.cat([rows[:-1][torch.randperm(m - 1, generator=torch.Generator().manual_seed(2))], rows[-1:]])
    k = m * damping * torch.eye(m, dtype=torch.float64) + rows @ rows.t()
    bound = 20 * max(float(torch.linalg.cond(dense)), float(torch.linalg.cond(k))) * EPS
    window = filled(rows, damping)
    for u in (window.solve_newest(), window.ihvp(rows[-1]), mfac_recursion(rows, rows[-1], damping)):
        assert error(u, expected) <= bound
    assert error(window.ihvp(x), torch.linalg.solve(dense, x)) <= bound


SLIDING: dict[str, tuple[int, float, Any]] = {
    "correlated": (400, 1e-6, lambda: correlated(2000, 400, 0.99)),
    "more rows than columns": (40, 1e-3, lambda: randn(2000, 40)),
    "decaying": (400, 1e-6, lambda: randn(2000, 400) * torch.logspace(0, -3, 2000, dtype=torch.float64)[:, None]),
}


@pytest.mark.parametrize("refactor_every", [-1, 0])
@pytest.mark.parametrize("kind", SLIDING)
def test_03_sliding_window(kind: str, refactor_every: int) -> None:
    """2000 rows through a window of 64; every 100th update against a factorization from scratch."""
    m = 64
    d, damping, make = SLIDING[kind]
    rows = make()
    window = RawWindow(m, d, damping, "float64", refactor_every=refactor_every)
    for t, row in enumerate(rows):
        u = window.step(row)
        if t % 100 == 99:
            expected = reference(rows[max(0, t + 1 - m) : t + 1], damping, num_grads=m).solve_newest()
            assert error(u, expected) <= 1e-11, t


def test_04_no_cancellation() -> None:
    """The published formula loses 4 digits here in its own float32."""
    rows = randn(1024, 4000)
    rows = (rows * (10 / rows.norm(dim=1, keepdim=True))).float()
    exact = reference(rows.double(), 1e-6).solve_newest()
    assert error(filled(rows, 1e-6, "float32").solve_newest(), exact) <= 1e-5


@pytest.mark.parametrize(("window_format", "least"), [("bfloat16", 0.9999), ("int8", 0.999)])
def test_05_low_precision(window_format: str, least: float) -> None:
    rows = correlated(64, 2000, 0.9) / 2000**0.5
    exact = reference(rows, 1e-6).solve_newest()
    u = filled(rows, 1e-6, window_format).solve_newest()
    assert torch.cosine_similarity(u.double(), exact, dim=0) >= least


@pytest.mark.parametrize("window_format", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("power", [-9, 5])
def test_06_scaling_the_rows_scales_the_update_exactly(window_format: str, power: int) -> None:
    c = 2.0**power
    rows = randn(40, 1500)
    a, b = filled(rows, 0.01, window_format), filled(c * rows, 0.01 * c**2, window_format)
    assert torch.equal(a.solve_newest() / c, b.solve_newest())
    assert torch.equal(a.gram() * c**2, b.gram())


def test_06_permuting_the_columns_permutes_the_update() -> None:
    rows = randn(40, 1500)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(3))
    a, b = filled(rows, 1e-3).solve_newest(), filled(rows[:, order], 1e-3).solve_newest()
    assert error(b, a[order]) <= 1e-12


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_06_columns_over_simulated_ranks(ranks: int) -> None:
    """Each holds a slice of the columns; only the products with the rows are added up."""
    m, d, damping = 24, 5000, 1e-3
    rows = randn(60, d)
    whole = RawWindow(m, d, damping, "float64")
    cuts = [range(r * d // ranks, (r + 1) * d // ranks) for r in range(ranks)]
    parts = [RawWindow(m, len(cut), damping, "float64") for cut in cuts]
    for row in rows:
        expected = whole.step(row)
        for part, cut in zip(parts, cuts, strict=True):
            part.products(row[cut.start : cut.stop])
        total = torch.stack([part.dots for part in parts]).sum(0)
        for part in parts:
            part.dots.copy_(total)
            part.commit()
        assert error(torch.cat([part.combine() for part in parts]), expected) <= 1e-12
        assert all(torch.equal(part.coefficients, parts[0].coefficients) for part in parts)


def test_07_limits() -> None:
    g, damping = randn(3000), 0.3
    expected = g / (damping + g @ g)
    bound = 20 * (1 + float(g @ g) / damping) * EPS  # the condition of K where all rows are equal
    for rows in (g[None], g.expand(7, 3000)):
        assert error(filled(rows, damping).solve_newest(), expected) <= bound
    rows = randn(5, 3000)
    norm = float(rows[-1] @ rows[-1])
    for large in (1e6, 1e9):
        u = filled(rows, large).solve_newest()
        assert error(u, rows[-1] / large) <= norm / large


def test_08_warmup_scaling() -> None:
    """u t/m with 1/m is what damping m/t lambda and an average over the t rows there give."""
    m, d, damping = 16, 300, 1e-3
    rows = randn(40, d)
    scaled, plain = (RawWindow(m, d, damping, "float64", warmup_scaling=flag) for flag in (True, False))
    for t, row in enumerate(rows, 1):
        u, v = scaled.step(row), plain.step(row)
        if t < m:
            assert error(u, reference(rows[:t], damping * m / t).solve_newest()) <= 1e-12
        else:
            assert torch.equal(u, v)


# ---- the formats


@pytest.mark.parametrize("window_format", FORMATS)
@pytest.mark.parametrize("d", [1, 5, 255, 256, 257, 1023, 1024, 1025, 3000])
def test_equals_the_reference(window_format: str, d: int) -> None:
    """Rows are encoded to the same bits, so the products differ by their rounding only."""
    m = 9
    rows, x = randn(25, d), randn(d, seed=7)
    rows[3] = 0
    ours, expected = FisherWindow(m, d, 0.5, window_format), FisherWindowReference(m, d, 0.5, window_format)
    assert ours.count == 0
    torch.testing.assert_close(ours.ihvp(x).double(), x / 0.5, rtol=1e-6, atol=0)
    for t, row in enumerate(rows):
        ours.push(row)
        expected.push(row)
        assert ours.count == expected.count == min(t + 1, m)
        tolerance = TOLERANCE[window_format]
        gram_tolerance = GRAM_TOLERANCE[window_format]
        torch.testing.assert_close(ours.gram(), expected.gram(), rtol=gram_tolerance, atol=gram_tolerance * d)
        if expected.matrix[-1].abs().max() > 0:
            assert error(ours.solve_newest(), expected.solve_newest()) <= 10 * tolerance
        else:
            assert ours.solve_newest().abs().max() == 0
        assert error(ours.ihvp(x), expected.ihvp(x)) <= 20 * d * tolerance


@pytest.mark.parametrize("window_format", FORMATS)
def test_rows_are_stored_as_the_reference_encodes_them(window_format: str) -> None:
    """A window with one row gives it back: u = q m / (m lambda + q.q)."""
    for seed in range(5):
        row = randn(2500, seed=seed) * torch.logspace(-6, 6, 2500, dtype=torch.float64).flip(0)
        stored = stored_row(row.float() if window_format != "float64" else row, window_format).double()
        window = filled(row[None], 1e-3, window_format)
        assert float(window.gram()) == pytest.approx(float(stored @ stored), rel=1e-6)
        u = window.solve_newest().double() * (1e-3 + stored @ stored)
        torch.testing.assert_close(u, stored, rtol=1e-6, atol=0)


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window_format", FORMATS)
def test_rows_of_any_floating_dtype(window_format: str, source: torch.dtype) -> None:
    rows = randn(6, 1100, dtype=source)
    a, b = filled(rows, 0.1, window_format), filled(rows.double(), 0.1, window_format)
    assert torch.equal(a.solve_newest(), b.solve_newest())


@pytest.mark.parametrize("window_format", FORMATS)
def test_rows_of_any_layout(window_format: str) -> None:
    rows = randn(6, 1100)
    a, b = FisherWindow(4, 1100, 0.1, window_format), FisherWindow(4, 1100, 0.1, window_format)
    wide = torch.zeros(6, 2201, dtype=torch.float64)
    wide[:, 1::2] = rows
    for row, strided in zip(rows, wide[:, 1::2], strict=True):
        a.push(row)
        b.push(strided)
    assert torch.equal(a.solve_newest(), b.solve_newest())
    assert torch.equal(a.ihvp(rows[0]), a.ihvp(wide[0, 1::2]))


@pytest.mark.parametrize("window_format", ["bfloat16", "int8", "topk"])
def test_error_feedback(window_format: str) -> None:
    rows = randn(30, 2100)
    options: dict[str, Any] = {"topk": 0.05, "error_feedback": True, "num_grads": 8}
    ours, expected = filled(rows, 0.1, window_format, **options), reference(rows, 0.1, window_format, **options)
    tolerance = GRAM_TOLERANCE[window_format]
    torch.testing.assert_close(ours.gram(), expected.gram(), rtol=tolerance, atol=tolerance * 2100)
    assert error(ours.solve_newest(), expected.solve_newest()) <= 1e-5


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("window_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_13_a_row_that_is_not_finite_changes_nothing(window_format: str, error_feedback: bool, bad: float) -> None:
    if error_feedback and window_format in ("float32", "float64"):
        pytest.skip("nothing is lost in this format")
    rows = randn(12, 1300)
    options: dict[str, Any] = {"error_feedback": error_feedback}
    a, b = (FisherWindow(5, 1300, 0.1, window_format, **options) for _ in range(2))
    for t, row in enumerate(rows):
        for column in (0, 700, 1299) if t in (0, 3, 8, 9) else ():
            broken = row.clone()
            broken[column] = bad
            b.push(broken)
            if t:
                assert b.count == a.count
                assert torch.equal(a.gram(), b.gram())
        a.push(row)
        b.push(row)
        assert torch.equal(a.solve_newest(), b.solve_newest())
        assert torch.equal(a.ihvp(row), b.ihvp(row))
        assert torch.equal(a.gram(), b.gram())


@pytest.mark.parametrize("window_format", FORMATS)
def test_13_thread_counts_give_the_same_bits(window_format: str) -> None:
    rows = randn(20, 150_000, dtype=torch.float32)
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        window = filled(rows, 0.01, window_format, num_grads=8)
        outcomes.append(bits([window.gram(), window.solve_newest(), window.ihvp(rows[0])]))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_copies_go_on_alike() -> None:
    """No state hidden in an object: a copy and a pickle are windows of their own."""
    rows = randn(20, 1300)
    window = filled(rows[:11], 0.1, "bfloat16", num_grads=6)
    others = [copy.deepcopy(window), pickle.loads(pickle.dumps(window))]
    for row in rows[11:]:
        for w in (window, *others):
            w.push(row)
    for other in others:
        assert bits([other.gram(), other.solve_newest()]) == bits([window.gram(), window.solve_newest()])
    others[0].push(rows[0])
    assert not torch.equal(others[0].gram(), window.gram())


@pytest.mark.parametrize("window_format", FORMATS)
def test_13_state_dict_goes_on_alike(window_format: str, tmp_path: Path) -> None:
    rows = randn(20, 1300)
    window = filled(rows[:11], 0.1, window_format, num_grads=6)
    torch.save(window.state_dict(), tmp_path / "window.pt")
    other = FisherWindow(6, 1300, 0.1, window_format)
    other.load_state_dict(torch.load(tmp_path / "window.pt", weights_only=True))
    for row in rows[11:]:
        window.push(row)
        other.push(row)
    assert bits([window.gram(), window.solve_newest()]) == bits([other.gram(), other.solve_newest()])


def test_13_state_of_another_damping() -> None:
    """The rows are taken over, the factor is not: as if the window had always had its own damping."""
    rows = randn(12, 20)
    source, fresh = filled(rows[:9], 0.1, num_grads=4), filled(rows[:9], 0.9, num_grads=4)
    window = FisherWindow(4, 20, 0.9, "float64")
    window.load_state_dict(source.state_dict())
    assert error(window.solve_newest(), fresh.solve_newest()) <= 1e-13
    assert error(window.ihvp(rows[0]), fresh.ihvp(rows[0])) <= 1e-13
    for row in rows[9:]:
        window.push(row)
        fresh.push(row)
        assert error(window.solve_newest(), fresh.solve_newest()) <= 1e-13


@pytest.mark.parametrize(
    "other", [{"num_grads": 5}, {"dim": 3000}, {"dim": 1400}, {"window_format": "bfloat16"}], ids=str
)
def test_state_of_another_window_is_refused(other: dict[str, Any]) -> None:
    options: dict[str, Any] = {"num_grads": 4, "dim": 1300, "damping": 0.1, "window_format": "float32"}
    source, window = FisherWindow(**{**options, **other}), FisherWindow(**options)
    window.push(randn(1300))
    before = bits(window.state_dict())
    with pytest.raises(ValueError, match="FisherWindow"):
        window.load_state_dict(source.state_dict())
    assert bits(window.state_dict()) == before


# ---- defects of other implementations


@pytest.mark.parametrize("m", [1, 2, 31, 33, 100, 1025])
def test_bug_1_any_number_of_rows_on_the_cpu(m: int) -> None:
    """The published code needs a GPU and m <= 1024, a multiple of 32."""
    rows = randn(min(m, 40), 60)
    expected = torch.linalg.solve(dense_fisher(rows, 0.1, m), rows[-1])
    assert error(filled(rows, 0.1, num_grads=m).solve_newest(), expected) <= 1e-11


def test_bug_2_cancellation_of_the_published_formula() -> None:
    """Rows of norm 10, damping 1e-6, all in float32: the published recursion is wrong in the second digit."""
    rows = randn(256, 4000)
    rows = (rows * (10 / rows.norm(dim=1, keepdim=True))).float()
    exact = reference(rows.double(), 1e-6).solve_newest()
    published = error(mfac_recursion(rows, rows[-1], 1e-6), exact)
    ours = error(filled(rows, 1e-6, "float32").solve_newest(), exact)
    assert ours <= 1e-6
    assert published >= 1000 * ours


def test_bug_3_the_factor_is_updated_not_made_anew() -> None:
    """The published code factorizes an m x m matrix at every step."""
    m = 16
    window = RawWindow(m, 50, 0.1, "float64")
    for row in randn(400, 50):
        window.step(row)
    refactors = int(window.state["ring"][7])
    assert 1 <= refactors <= 1 + 400 // (16 * m)


def test_bug_6_all_rows_count() -> None:
    """Another collector left the last of the m rows zero, and with m = 1 collected nothing."""
    for m in (1, 2, 5):
        rows = randn(m, 10)
        window = filled(rows, 0.1)
        assert window.count == m
        torch.testing.assert_close(window.gram(), rows @ rows.t(), rtol=1e-13, atol=1e-13)


# ---- bad input


def test_bad_input() -> None:
    for options, word in (
        ({"num_grads": 0}, "num_grads"),
        ({"dim": 0}, "dim"),
        ({"damping": 0.0}, "damping"),
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"damping": float("inf")}, "damping"),
        ({"window_format": "fp8"}, "window_format"),
        ({"window_format": "topk", "topk": 0.0}, "topk"),
        ({"window_format": "topk", "topk": 1.5}, "topk"),
        ({"error_feedback": True}, "error_feedback"),
    ):
        with pytest.raises(ValueError, match=word):
            FisherWindow(**{"num_grads": 4, "dim": 3, "damping": 0.1, **options})
    window = FisherWindow(4, 3, 0.1)
    with pytest.raises((ValueError, RuntimeError), match=r"4|dim"):
        window.push(torch.ones(4))
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?i)complex|floating"):
        window.push(torch.ones(3, dtype=torch.complex64))
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?i)sparse"):
        window.push(torch.ones(3).to_sparse())
    with pytest.raises((ValueError, RuntimeError), match=r"row|empty|push"):
        window.solve_newest()
    with pytest.raises(ValueError, match=r"(?i)bytes|GiB|GB|TB|TiB"):
        FisherWindow(1024, 10**12, 0.1)


# ---- the operators


class RawWindow:
    """The operators on a window's tensors, with the arguments that FisherWindow does not offer."""

    def __init__(
        self,
        m: int,
        d: int,
        damping: float,
        window_format: str,
        *,
        warmup_scaling: bool = False,
        warmup_steps: int = 0,
        refactor_every: int = -1,
    ) -> None:
        self.state = FisherWindow(m, d, damping, window_format).state_dict()
        self.d, self.damping, self.format = d, damping, window_format
        self.options = {
            "warmup_scaling": warmup_scaling,
            "warmup_steps": warmup_steps,
            "refactor_every": refactor_every,
        }
        self.dots, self.coefficients = (torch.zeros(m + 1, dtype=torch.float64) for _ in range(2))  # by slot

    def stored(self, *names: str) -> list[Tensor]:
        return [self.state[name] for name in names]

    def products(self, row: Tensor) -> None:
        op.fisher_window_dots_(
            *self.stored("rows", "scales", "indices", "error"),
            self.dots,
            self.state["ring"],
            grads=[row],
            params=[row],
            weight_decay=[0.0],
            negate=False,
            grad_scale=None,
            format=self.format,
        )

    def commit(self) -> None:
        op.fisher_window_commit_(
            *self.stored("gram", "factor", "ring"), self.coefficients, self.dots, self.damping, **self.options
        )

    def combine(self) -> Tensor:
        result: Tensor = op.fisher_window_combine(
            *self.stored("rows", "scales", "indices"), self.coefficients, self.state["ring"], self.d, self.format
        )
        return result

    def step(self, row: Tensor) -> Tensor:
        self.products(row)
        self.commit()
        return self.combine()


@pytest.mark.parametrize("window_format", FORMATS)
def test_opcheck(window_format: str) -> None:
    window = RawWindow(3, 1100, 0.1, window_format)
    for row in randn(5, 1100):
        window.step(row)
    rows, ring = window.stored("rows", "scales", "indices"), window.state["ring"]
    x, format_only = randn(1100, dtype=torch.float32), {"format": window_format}
    grads = [randn(40, 25, dtype=torch.float32), None, randn(90, dtype=torch.bfloat16)]
    params = [randn(40, 25, dtype=torch.float32), randn(10), randn(90, dtype=torch.bfloat16)]
    many = {
        "grads": grads,
        "params": params,
        "weight_decay": [0.1, 0.0, 0.2],
        "negate": True,
        "grad_scale": None,
        **format_only,
    }
    factors = window.stored("gram", "factor")
    check = torch.library.opcheck
    check(op.fisher_window_dots_.default, (*rows, window.state["error"], window.dots, ring), many)
    check(op.fisher_window_commit_.default, (*factors, ring, window.coefficients, window.dots, 0.1), window.options)
    check(op.fisher_window_combine.default, (*rows, window.coefficients, ring, 1100), format_only)
    check(op.fisher_window_project.default, (*rows, ring, x), format_only)
    check(op.fisher_window_solve_.default, (*factors, ring, None, 0.1))
    check(op.fisher_window_solve_.default, (*factors, ring, window.dots[:4].clone(), 0.1))
    check(op.fisher_window_residual.default, (*rows, window.coefficients, ring, x, 0.1), format_only)
    check(op.fisher_window_gram.default, (window.state["gram"], ring, 3))


def test_operators_write_through_autograds_version_counter() -> None:
    window = RawWindow(3, 100, 0.1, "float32")
    versions = [window.state[name]._version for name in ("rows", "gram", "factor", "ring")]
    window.step(randn(100))
    assert all(window.state[n]._version > v for n, v in zip(("rows", "gram", "factor", "ring"), versions, strict=True))


@pytest.mark.parametrize("window_format", FORMATS)
def test_a_row_in_pieces_is_the_row(window_format: str) -> None:
    """Gradients of any shape and dtype, weight decay, a sign, gaps: as the row that they make together."""
    a, b = RawWindow(3, 2500, 0.1, window_format), RawWindow(3, 2500, 0.1, window_format)
    for t in range(5):
        pieces = [randn(30, 40, seed=t), randn(300, seed=t + 10).float(), randn(1000, seed=t + 20)]
        params = [randn(30, 40, seed=t + 30), randn(300, seed=t + 40).float(), randn(1000, seed=t + 50)]
        grads: list[Tensor | None] = [pieces[0].t().contiguous().t(), pieces[1], None if t == 2 else pieces[2]]
        a_row = [-pieces[0] + 0.5 * params[0], (-pieces[1]).double(), torch.zeros(1000) if t == 2 else -pieces[2]]
        op.fisher_window_dots_(
            *b.stored("rows", "scales", "indices", "error"),
            b.dots,
            b.state["ring"],
            grads=grads,
            params=params,
            weight_decay=[0.5, 0.0, 0.0],
            negate=True,
            grad_scale=None,
            format=window_format,
        )
        b.commit()
        assert torch.equal(a.step(torch.cat([part.reshape(-1).double() for part in a_row])), b.combine())


# ---- on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("kind", SLIDING)
def test_03_sliding_window_on_the_gpu(kind: str) -> None:
    """The factor is K^-1 with one step of refinement there."""
    m = 64
    d, damping, make = SLIDING[kind]
    rows = make()
    window = FisherWindow(m, d, damping, "float64", device="cuda")
    for t, row in enumerate(rows.cuda()):
        window.push(row)
        if t % 100 == 99:
            expected = reference(rows[max(0, t + 1 - m) : t + 1], damping, num_grads=m).solve_newest()
            assert error(window.solve_newest().cpu(), expected) <= 1e-11, t


@pytest.mark.cuda
@pytest.mark.parametrize("window_format", FORMATS)
def test_rows_have_the_same_bits_on_the_gpu(window_format: str) -> None:
    rows = randn(12, 3000)
    here, there = FisherWindow(5, 3000, 0.1, window_format), FisherWindow(5, 3000, 0.1, window_format, device="cuda")
    for row in rows:
        here.push(row)
        there.push(row.cuda())
    for name in ("rows", "scales", "indices", "error"):
        assert torch.equal(here.state_dict()[name], there.state_dict()[name].cpu()), name
    assert error(there.gram().cpu(), here.gram()) <= 1e-12
    assert error(there.solve_newest().cpu(), here.solve_newest()) <= 1e-6
    moved = here.to("cuda")
    assert error(moved.solve_newest().cpu(), there.solve_newest().cpu()) <= 1e-6


@pytest.mark.cuda
def test_13_a_row_that_is_not_finite_changes_nothing_on_the_gpu() -> None:
    rows = randn(9, 2000).cuda()
    a, b = FisherWindow(4, 2000, 0.1, device="cuda"), FisherWindow(4, 2000, 0.1, device="cuda")
    for t, row in enumerate(rows):
        if t in (0, 3, 6):
            b.push(row * float("nan"))
        a.push(row)
        b.push(row)
        assert bits([a.gram(), a.solve_newest()]) == bits([b.gram(), b.solve_newest()])
