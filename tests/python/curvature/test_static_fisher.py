"""curvature.StaticFisher: acceptance test 9 of M-FAC, the published recursion, layouts, dtypes, bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_ext.curvature import StaticFisher
from torch_ext.reference.curvature import static_fisher as reference

EPS = 2.0**-52


def gradients(m: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max() / b.abs().max())


#: (m, d, damping, block): wide blocks, narrow ones, both in one matrix (the tail), and the sizes of the M-FAC tests.
CASES = [
    (8, 60, 1e-3, None),
    (32, 100, 1e-5, None),
    (32, 20, 1e-3, None),
    (64, 300, 1e-6, None),
    (1, 5, 0.1, None),
    (5, 1, 0.1, None),
    (16, 100, 1e-3, 30),
    (16, 100, 1e-3, 7),
    (16, 100, 1e-3, 20),
    (16, 90, 1e-3, 30),
    (30, 90, 1e-3, 30),
    (30, 100, 1e-2, 1),
    (30, 100, 1e-3, 1000),
    (200, 450, 1e-2, 400),
]


@pytest.mark.parametrize(("m", "d", "damping", "block"), CASES)
def test_9_equals_the_dense_inverse(m: int, d: int, damping: float, block: int | None) -> None:
    """Diagonal, elements and products; blocks that do not divide d. An explicit inverse is exact to 200 cond eps."""
    g = gradients(m, d)
    dense = reference.fisher(g, damping, block)
    inverse = torch.linalg.inv(dense)
    bound = 200 * EPS * float(torch.linalg.cond(dense))
    fisher = StaticFisher(g, damping, block)
    assert relative(fisher.diag(), inverse.diagonal()) < bound
    x = gradients(3, d, seed=1)
    assert relative(fisher.mul(x), x @ inverse) < bound
    for i in (0, d // 3, d - 1):
        for j in (0, d // 2, d - 1):
            assert abs(fisher.element(i, j) - float(inverse[i, j])) < bound * float(inverse.abs().max())
    assert fisher.diag().dtype == torch.float64
    assert (fisher.num_grads, fisher.dim, fisher.block) == (m, d, d if block is None else min(block, d))


def test_9_the_two_forms_agree() -> None:
    """The same 40 columns as one block of B > m, and padded with zero gradients to B <= m."""
    g = gradients(30, 40)
    wide = StaticFisher(g, 1e-2)
    narrow = StaticFisher(torch.cat([g, torch.zeros(10, 40, dtype=torch.float64)]), 1e-2 * 3 / 4)  # 1/40, not 1/30
    assert (wide.factor.shape, narrow.factor.shape) == ((1, 30, 30), (1, 40, 40))
    x = gradients(2, 40, seed=1)
    torch.testing.assert_close(wide.diag() * 4 / 3, narrow.diag(), rtol=1e-11, atol=0)
    torch.testing.assert_close(wide.mul(x) * 4 / 3, narrow.mul(x), rtol=1e-11, atol=1e-11)
    assert wide.element(3, 17) * 4 / 3 == pytest.approx(narrow.element(3, 17), rel=1e-10)


@pytest.mark.parametrize(("m", "d", "damping"), [(8, 60, 1e-3), (32, 100, 1e-5), (64, 300, 1e-3), (1, 7, 0.1)])
def test_9_rows_are_those_of_the_published_recursion(m: int, d: int, damping: float) -> None:
    """W_i / sqrt(damping) == h_i / sqrt(n_i), and L_ii^2 / damping == n_i."""
    g = gradients(m, d)
    h, n = reference.recursion(g, damping)
    fisher = StaticFisher(g, damping)
    assert relative(fisher.rows() / damping**0.5, h / n.sqrt()[:, None]) < 1e-14
    assert relative(fisher.factor[0].diagonal() ** 2 / damping, n) < 1e-14


@pytest.mark.parametrize("block", [None, 30, 7])
def test_rows_give_the_inverse(block: int | None) -> None:
    g = gradients(12, 100)
    fisher = StaticFisher(g, 1e-2, block)
    w, width = fisher.rows(), block or 100
    number = torch.arange(100) // width
    product = torch.where(number[:, None] == number[None, :], w.T @ w, 0.0)
    expected = (torch.eye(100, dtype=torch.float64) - product) / 1e-2
    assert relative(expected, reference.inverse(g, 1e-2, block)) < 1e-11


def test_all_gradients_are_used() -> None:
    """The authors' program stops before the last gradient: its last row stays zero, and m = 1 collects nothing."""
    g = gradients(4, 9)
    fisher = StaticFisher(g, 0.1)
    assert relative(fisher.diag(), reference.inverse(g, 0.1).diagonal()) < 1e-13
    without_last = torch.cat([g[:3], torch.zeros(1, 9, dtype=torch.float64)])
    assert relative(StaticFisher(without_last, 0.1).diag(), reference.inverse(g, 0.1).diagonal()) > 1e-3
    one = StaticFisher(g[:1], 0.1)
    expected = (1 - g[0] ** 2 / (0.1 + g[0] @ g[0])) / 0.1  # Sherman and Morrison
    assert relative(one.diag(), expected) < 1e-14
    x = gradients(1, 9, seed=1)[0]
    assert relative(one.mul(x), (x - g[0] * (g[0] @ x) / (0.1 + g[0] @ g[0])) / 0.1) < 1e-14


def test_hand_case() -> None:
    """damping .5, g1 = (1, 0), g2 = (1, 1): F = [[1.5, .5], [.5, 1]], determinant 1.25."""
    fisher = StaticFisher(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64), 0.5)
    assert relative(fisher.diag(), torch.tensor([0.8, 1.2], dtype=torch.float64)) < 1e-15
    assert fisher.element(0, 1) == pytest.approx(-0.4, rel=1e-15)
    g2 = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert relative(fisher.mul(g2), torch.tensor([0.4, 0.8], dtype=torch.float64)) < 1e-15


def test_zero_and_equal_gradients() -> None:
    zero = StaticFisher(torch.zeros(3, 8, dtype=torch.float64), 0.25)
    assert torch.equal(zero.diag(), torch.full((8,), 4.0, dtype=torch.float64))
    g = gradients(1, 20).expand(6, 20)  # expanded: not even a memory of its own
    expected = reference.inverse(g, 1e-3)
    assert relative(StaticFisher(g, 1e-3).diag(), expected.diagonal()) < 1e-11


def test_diagonal_never_falls_below_its_bound() -> None:
    """Where 1 - sum W^2 is all rounding the diagonal is still positive: [F^-1]_ii >= 1 / F_ii."""
    g = 1e6 * gradients(6, 40)
    fisher = StaticFisher(g, 1e-4)
    bound = 1 / (1e-4 + (g**2).sum(0) / 6)
    assert bool((fisher.diag() >= bound * (1 - 1e-15)).all())
    assert min(fisher.element(i, i) for i in range(40)) >= float(bound.min()) * (1 - 1e-15)


@pytest.mark.parametrize("block", [None, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, block: int | None) -> None:
    """Arithmetic is float64: the result is that of the stored gradients, rounded once."""
    g = gradients(8, 37, dtype=dtype)
    exact, fisher = StaticFisher(g.double(), 1e-2, block), StaticFisher(g, 1e-2, block)
    assert fisher.diag().dtype == torch.float32
    assert torch.equal(fisher.diag(), exact.diag().float())
    x = gradients(2, 37, seed=1, dtype=dtype)
    assert torch.equal(fisher.mul(x), exact.mul(x.double()).to(dtype))
    assert torch.equal(fisher.rows(), exact.rows().float())


@pytest.mark.parametrize("block", [None, 5, 16])
def test_layouts(block: int | None) -> None:
    g = gradients(8, 37)
    plain = StaticFisher(g, 1e-2, block)
    sliced = torch.stack([g, g], -1)[..., 0]
    for other in (g.t().contiguous().t(), sliced):
        fisher = StaticFisher(other, 1e-2, block)
        assert relative(fisher.diag(), plain.diag()) < 1e-13
        assert relative(fisher.rows(), plain.rows()) < 1e-13
    x = gradients(6, 37, seed=1)
    assert torch.equal(plain.mul(x.view(2, 3, 37)), plain.mul(x).view(2, 3, 37))
    assert relative(plain.mul(x.t().contiguous().t()), plain.mul(x)) < 1e-14
    assert plain.mul(x[0]).shape == (37,)
    assert plain.mul(x[:0]).shape == (0, 37)


def test_many_pieces_equal_one() -> None:
    """Larger than the work space: a wide block in pieces of columns, many blocks in several batches."""
    g = gradients(64, 150_000, dtype=torch.float32)
    whole = StaticFisher(g, 1e-2)
    x = gradients(1, 150_000, seed=1)[0]
    wide = g.double()
    k = wide @ wide.T + 0.64 * torch.eye(64, dtype=torch.float64)
    expected = (x - wide.T @ torch.linalg.solve(k, wide @ x)) / 1e-2
    assert relative(whole.mul(x), expected) < 1e-11
    blocks = StaticFisher(g, 1e-2, 50)
    for b in (0, 1499, 2999):
        alone = StaticFisher(g[:, 50 * b : 50 * b + 50], 1e-2)
        torch.testing.assert_close(blocks.diag()[50 * b : 50 * b + 50], alone.diag(), rtol=1e-6, atol=0)


def test_does_not_write_its_arguments() -> None:
    g, x = gradients(8, 60), gradients(1, 60, seed=1)[0]
    before, x_before = g.clone(), x.clone()
    for block in (None, 7):
        fisher = StaticFisher(g, 1e-3, block)
        fisher.diag(), fisher.mul(x), fisher.rows(), fisher.element(0, 0), fisher.element(0, 1)
        assert torch.equal(g, before)
        assert torch.equal(x, x_before)


def test_copy_and_pickle() -> None:
    fisher = StaticFisher(gradients(8, 37), 1e-2, 10)
    for other in (copy.deepcopy(fisher), pickle.loads(pickle.dumps(fisher))):
        assert torch.equal(other.diag(), fisher.diag())
        assert other.block == 10
    assert repr(fisher) == "StaticFisher(num_grads=8, dim=37, damping=0.01, block=10)"


def test_gradients_with_a_graph() -> None:
    g = gradients(8, 20).requires_grad_()
    fisher = StaticFisher(g, 1e-2)
    assert not fisher.diag().requires_grad
    assert not fisher.mul(gradients(1, 20)[0].requires_grad_()).requires_grad


@pytest.mark.parametrize("block", [None, 5, 16])
@pytest.mark.parametrize("name", ["factor", "diag", "mul", "element", "rows"])
def test_opcheck(name: str, block: int | None) -> None:
    g = gradients(8, 37, dtype=torch.float32)
    fisher = StaticFisher(g, 1e-2, block)
    held = (g, fisher.factor, fisher.tail_factor, 1e-2, block)
    arguments = {
        "factor": (g, 1e-2, block),
        "diag": held,
        "mul": (gradients(2, 37, seed=1), *held),
        "element": (*held, 3, 4),
        "rows": (g, 1e-2, block),
    }[name]
    torch.library.opcheck(getattr(torch.ops.torch_ext, f"static_fisher_{name}").default, arguments)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda g: StaticFisher(g, 0.0), ValueError, "damping must be positive, got 0"),
        (lambda g: StaticFisher(g, -1.0), ValueError, "damping must be positive, got -1"),
        (lambda g: StaticFisher(g, NAN), ValueError, "damping must be positive, got nan"),
        (lambda g: StaticFisher(g, INF), ValueError, "damping must be positive, got inf"),
        (lambda g: StaticFisher(g, 0.1, 0), ValueError, "block must be at least 1"),
        (lambda g: StaticFisher(g[0], 0.1), ValueError, r"must be \[m, d\].*got \[12\]"),
        (lambda g: StaticFisher(g[:0], 0.1), ValueError, r"at least one gradient.*got \[0, 12\]"),
        (lambda g: StaticFisher(g[:, :0], 0.1), ValueError, "at least one gradient and one weight"),
        (lambda g: StaticFisher(g.long(), 0.1), TypeError, "StaticFisher: gradients has dtype Long"),
        (lambda g: StaticFisher(g.cfloat(), 0.1), TypeError, "StaticFisher: gradients has dtype ComplexFloat"),
        (lambda g: StaticFisher(g.to_sparse(), 0.1), RuntimeError, "gradients must be a dense tensor|static_fisher"),
        (lambda g: StaticFisher(g * NAN, 0.1), ValueError, "a gradient holds NaN or infinity"),
        (lambda g: StaticFisher(g / 0, 0.1, 2), ValueError, "a gradient holds NaN or infinity"),
        (lambda g: StaticFisher(1e12 * torch.ones(3, 9), 1e-12), ValueError, "vanishes in float64.*larger damping"),
        (lambda g: StaticFisher(g, 0.1).mul(g[0, :5]), ValueError, r"x must be \[..., 12\], got \[5\]"),
        (lambda g: StaticFisher(g, 0.1).mul(g[0].long()), TypeError, "StaticFisher.mul: x has dtype Long"),
        (lambda g: StaticFisher(g, 0.1).element(0, 12), IndexError, r"\(0, 12\) is outside the matrix of 12 x 12"),
        (lambda g: StaticFisher(g, 0.1).element(-1, 0), IndexError, r"\(-1, 0\) is outside"),
    ],
)
def test_bad_input(make: Callable[[Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(gradients(4, 12))


def test_a_factor_of_other_gradients_is_refused() -> None:
    fisher = StaticFisher(gradients(4, 12), 0.1)
    fisher.gradients = gradients(5, 12)
    with pytest.raises(ValueError, match="the factor does not belong to these gradients"):
        fisher.diag()


def test_small_blocks_cost_no_dispatch_each() -> None:
    """A hundred thousand blocks call as many operators as a few do (sparseml needed a path of its own for them)."""

    def operators(blocks: int) -> int:
        g = torch.ones(4, 8 * blocks)
        with torch.profiler.profile() as profile:
            StaticFisher(g, 0.1, 8).diag()
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))

    assert operators(100_000) <= operators(100) + 20


@pytest.mark.cuda
@pytest.mark.parametrize("block", [None, 5, 16])
def test_cuda_equals_cpu(block: int | None) -> None:
    g, x = gradients(8, 37), gradients(2, 37, seed=1)
    a, b = StaticFisher(g, 1e-2, block), StaticFisher(g.cuda(), 1e-2, block)
    torch.testing.assert_close(a.diag(), b.diag().cpu(), rtol=1e-12, atol=0)
    torch.testing.assert_close(a.mul(x), b.mul(x.cuda()).cpu(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(a.rows(), b.rows().cpu(), rtol=1e-11, atol=1e-12)
    assert a.element(1, 2) == pytest.approx(b.element(1, 2), rel=1e-11)
