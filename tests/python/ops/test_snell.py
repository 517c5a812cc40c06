"""ops.snell_linear and ops.snell_merge against the reference and closed forms. Numbers are those of the acceptance list
of the method (arXiv:2411.01800): 1 tiny exact case, 2 gradients, 3 counts and invariances, 4 rank and merging,
5 memory, 6 learning, 7 threshold selection."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torch_ext import ops
from torch_ext.reference.ops import snell as reference

RULES = ("code", "paper", "hard", "soft", "none")
GRADS = ("detached", "exact")
linear = torch.ops.torch_ext.snell_linear.default
merge = torch.ops.torch_ext.snell_merge.default
backward = torch.ops.torch_ext.snell_linear_backward.default


def factors(
    rows: int, columns: int, rank: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random factors of the size that the initialisation has at small layers, times ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(2, rows, rank // 2, dtype=dtype, generator=generator) * 2 - 1
    b = torch.rand(2, columns, rank // 2, dtype=dtype, generator=generator) * 2 - 1
    return scale * a, scale * b


def inputs(n: int, rows: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> Tensor:
    return torch.randn(n, rows, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    wide = b.detach().double()
    return float((a.detach().double() - wide).norm() / wide.norm().clamp_min(1e-300))


# --- 1 ---------------------------------------------------------------------------------------------------------------
TINY_A = [[[0, 0], [1, 0], [0, 2]], [[1, 1], [0, 0], [2, 1]]]
TINY_B = [[[1, 1], [0, 0]], [[0, 1], [1, 0]]]
TINY = {  # sparsifier -> threshold and phi(W), scale .1, sparsity .5
    "code": (0.05, [[0, -0.01], [0, 0], [-0.00343146, 0.00343146]]),
    "paper": (0.04142136, [[0, -0.00585786], [0, 0], [-0.00100505, 0.00100505]]),
    "hard": (0.04142136, [[0, -0.1], [0, 0], [-0.05857864, 0.05857864]]),
    "soft": (0.04142136, [[0, -0.05857864], [0, 0], [-0.01715729, 0.01715729]]),
    "none": (0.0, [[0.04142136, -0.1], [0, 0], [-0.05857864, 0.05857864]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_1_tiny_exact_case(rule: Any, dtype: torch.dtype) -> None:
    a, b = torch.tensor(TINY_A, dtype=dtype), torch.tensor(TINY_B, dtype=dtype)
    t, expected = TINY[rule]
    merged = ops.snell_merge(a, b, 0.1, 0.5, sparsifier=rule)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=dtype), atol=1e-8, rtol=0)
    y, got = ops.snell_linear(torch.eye(3, dtype=dtype), a, b, 0.1, 0.5, sparsifier=rule)
    assert torch.equal(y, merged)
    assert got.item() == pytest.approx(t, abs=1e-8)
    assert got.shape == ()
    assert got.dtype == dtype


# --- the reference ---------------------------------------------------------------------------------------------------
SHAPES = [(1, 1, 2), (6, 5, 4), (17, 130, 6), (130, 17, 8), (600, 520, 8), (64, 64, 16), (40, 300, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_weights_and_threshold_are_the_bits_of_the_reference(
    rule: Any, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    a, b = factors(*shape, dtype=dtype)
    weight = reference.snell_weight(a, b, 0.1)
    for sparsity in (0.0, 0.3, 0.9, 0.999):
        expected = reference.snell_threshold(weight, sparsity, rule)
        x = inputs(3, shape[0], dtype)
        y, t = ops.snell_linear(x, a, b, 0.1, sparsity, sparsifier=rule)
        assert torch.equal(t, expected)
        merged = ops.snell_merge(a, b, 0.1, sparsity, sparsifier=rule)
        assert torch.equal(merged, reference.snell_sparsify(weight, expected, rule))
        torch.testing.assert_close(y, x @ merged)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("rule", RULES)
def test_2_gradients_are_those_of_the_reference(rule: Any, grad: Any) -> None:
    """In float64 to 1e-12; for "detached" the reference is the composed version with detach()."""
    for rows, columns, rank in [(6, 5, 4), (33, 150, 6), (520, 600, 8), (20, 30, 32)]:
        a, b = factors(rows, columns, rank, dtype=torch.float64)
        x = inputs(7, rows, torch.float64)
        leaves = [v.requires_grad_() for v in (x, a, b)]
        gy = inputs(7, columns, torch.float64, seed=3)
        y, _ = ops.snell_linear(x, a, b, 0.1, 0.7, sparsifier=rule, grad=grad)
        expected, _ = reference.snell_linear(x, a, b, 0.1, 0.7, sparsifier=rule, grad=grad)
        assert relative(y, expected) < 1e-12
        got = torch.autograd.grad(y, leaves, gy)
        want = torch.autograd.grad(expected, leaves, gy)
        for g, w in zip(got, want, strict=True):
            assert relative(g, w) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_2_exact_passes_gradcheck(rule: Any) -> None:
    a, b = (3 * v for v in factors(6, 5, 4, dtype=torch.float64))
    x = inputs(7, 6, torch.float64)
    leaves = tuple(v.requires_grad_() for v in (x, a, b))

    def branch(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.snell_linear(x, a, b, 0.1, 0.5, sparsifier=rule, grad="exact")[0]

    assert gradcheck(branch, leaves)


@pytest.mark.parametrize("rule", RULES)
def test_exact_passes_gradgradcheck(rule: Any) -> None:
    a, b = (3 * v for v in factors(4, 3, 4, dtype=torch.float64))
    x = inputs(3, 4, torch.float64)
    leaves = tuple(v.requires_grad_() for v in (x, a, b))

    def branch(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.snell_linear(x, a, b, 0.1, 0.5, sparsifier=rule, grad="exact")[0]

    assert gradgradcheck(branch, leaves)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("rule", RULES)
def test_second_derivative_is_that_of_the_reference(rule: Any, grad: Any) -> None:
    """Also of "detached", whose gradient is no gradient of the output: its constants stay constant."""
    a, b = factors(270, 9, 6, dtype=torch.float64)  # two tiles
    x = inputs(5, 270, torch.float64)
    leaves = [v.requires_grad_() for v in (x, a, b)]
    probes = [torch.randn_like(v) for v in leaves]
    results = []
    for linear_of in (ops.snell_linear, reference.snell_linear):
        y, _ = linear_of(x, a, b, 0.1, 0.6, sparsifier=rule, grad=grad)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        products = torch.autograd.grad(first, leaves, probes, retain_graph=True)
        only_a = torch.autograd.grad(first[1], leaves, probes[1])
        results.append([*products, *only_a])
    for g, w in zip(*results, strict=True):
        assert relative(g, w) < 1e-10


def test_there_is_no_third_derivative() -> None:
    a, b = (v.requires_grad_() for v in factors(4, 3, 4, dtype=torch.float64))
    y, _ = ops.snell_linear(inputs(3, 4, torch.float64), a, b, 0.1, 0.5, grad="exact")
    (first,) = torch.autograd.grad(y.sum(), [a], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), [a], create_graph=True)
    with pytest.raises(RuntimeError, match="snell_linear has no third derivative"):
        second.sum().backward()


def test_2_detached_code_is_half_the_true_gradient() -> None:
    a, b = factors(6, 5, 4, dtype=torch.float64)
    x = inputs(7, 6, torch.float64)
    leaves = [a.requires_grad_(), b.requires_grad_()]
    got = [
        torch.autograd.grad(ops.snell_linear(x, a, b, 0.1, 0.5, grad=mode)[0].sum(), leaves)
        for mode in ("detached", "exact")
    ]
    for half, whole in zip(*got, strict=True):
        torch.testing.assert_close(2 * half, whole, rtol=1e-13, atol=0)


def test_2_fused_equals_composed_at_full_size() -> None:
    """float32, 768 x 3072, rank 8: relative 1e-5, the composed version in torch's own operators."""
    a, b = factors(768, 3072, 8, scale=0.02)
    x = inputs(64, 768)
    leaves = [v.requires_grad_() for v in (x, a, b)]
    gy = inputs(64, 3072, seed=4)
    y, _ = ops.snell_linear(x, a, b, 0.1, 0.9)
    expected, _ = reference.snell_linear(x, a, b, 0.1, 0.9)
    assert relative(y, expected) < 1e-5
    got, want = torch.autograd.grad(y, leaves, gy), torch.autograd.grad(expected, leaves, gy)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-5


def test_coincident_rows_have_no_gradient_and_no_nan() -> None:
    a, b = factors(6, 5, 4, dtype=torch.float64)
    b[:, 0] = a[:, 2]
    leaves = [a.requires_grad_(), b.requires_grad_()]
    for rule in RULES:
        y, _ = ops.snell_linear(inputs(7, 6, torch.float64), a, b, 0.1, 0.2, sparsifier=rule, grad="exact")  # type: ignore[arg-type]
        expected, _ = reference.snell_linear(inputs(7, 6, torch.float64), a, b, 0.1, 0.2, sparsifier=rule, grad="exact")
        got, want = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        for g, w in zip(got, want, strict=True):
            assert torch.isfinite(g).all()
            assert relative(g, w) < 1e-12


# --- 3 ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(6, 5, 4), (100, 70, 8), (768, 3072, 8)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.995])
def test_3_counts_are_exact(shape: tuple[int, int, int], sparsity: float) -> None:
    """entries - ceil(s entries) in paper mode, entries - 1 - floor(s (entries - 1)) in code mode, without ties.

    Without ties needs float64: 2.4 million float32 weights do tie.
    """
    a, b = factors(*shape, dtype=torch.float64)
    entries = shape[0] * shape[1]
    paper = int((ops.snell_merge(a, b, 0.1, sparsity, sparsifier="paper") != 0).sum())
    assert paper == entries - math.ceil(sparsity * entries)
    code = int((ops.snell_merge(a, b, 0.1, sparsity) != 0).sum())
    assert code == entries - 1 - math.floor(sparsity * (entries - 1))


def test_3_invariances() -> None:
    a, b = factors(60, 50, 8, dtype=torch.float64)
    merged = ops.snell_merge(a, b, 0.1, 0.8)
    order = torch.randperm(60)
    assert torch.equal(ops.snell_merge(a[:, order], b, 0.1, 0.8), merged[order])
    shift = torch.randn(2, 1, 4, dtype=torch.float64)
    plain = ops.snell_merge(a, b, 0.1, 0, sparsifier="none")
    torch.testing.assert_close(ops.snell_merge(a + shift, b + shift, 0.1, 0, sparsifier="none"), plain)
    for factor in (0.5, 4.0):  # powers of two: exact
        assert torch.equal(ops.snell_merge(factor * a, factor * b, 0.1, 0, sparsifier="none"), factor * plain)
        assert torch.equal(ops.snell_merge(factor * a, factor * b, 0.1, 0.8), factor**2 * merged)
        for rule in ("hard", "soft"):
            once = ops.snell_merge(a, b, 0.1, 0.8, sparsifier=rule)  # type: ignore[arg-type]
            assert torch.equal(ops.snell_merge(factor * a, factor * b, 0.1, 0.8, sparsifier=rule), factor * once)  # type: ignore[arg-type]


# --- 4 ---------------------------------------------------------------------------------------------------------------
def test_4_full_rank_and_merging() -> None:
    a, b = factors(64, 64, 8)
    weight = ops.snell_merge(a, b, 0.1, 0, sparsifier="none")
    assert torch.linalg.matrix_rank(weight.double()) == 64
    low = torch.cat([*a.double()], 1) @ torch.cat([*b.double()], 1).t()  # LoRA from the same numbers
    assert torch.linalg.matrix_rank(low) == 8
    x = inputs(20, 64)
    for rule in RULES:
        y, _ = ops.snell_linear(x, a, b, 0.1, 0.9, sparsifier=rule)  # type: ignore[arg-type]
        assert relative(x @ ops.snell_merge(a, b, 0.1, 0.9, sparsifier=rule), y) < 1e-6  # type: ignore[arg-type]


# --- 5 ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["code", "paper"])
def test_5_memory_stays_below_the_bound(rule: Any) -> None:
    """768 x 3072: outputs and returned gradients excluded, 8 rank (in + out) bytes and two tiles of 384 x 512."""
    from torch.profiler import ProfilerActivity, profile

    rows, columns, rank, n = 768, 3072, 8, 32
    a, b = (v.requires_grad_() for v in factors(rows, columns, rank))
    x, gy = inputs(n, rows).requires_grad_(), inputs(n, columns, seed=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        y, t = ops.snell_linear(x, a, b, 0.1, 0.9, sparsifier=rule, grad="exact")
        grads = torch.autograd.grad(y, (x, a, b), gy)
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    returned = sum(4 * v.numel() for v in (y, t, *grads))
    assert returned < peak <= returned + 8 * rank * (rows + columns) + 2 * 384 * 512 * 4
    assert largest < rows * columns * 4 / 2  # nothing of the size of W


# --- 7 ---------------------------------------------------------------------------------------------------------------
def kth(weight: Tensor, sparsity: float) -> Tensor:
    return weight.abs().flatten().kthvalue(max(1, math.ceil(sparsity * weight.numel()))).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "wide", "constant", "half constant", "denormal", "zero"])
def test_7_threshold_is_kthvalue(kind: str, dtype: torch.dtype) -> None:
    a, b = factors(700, 600, 4, dtype=dtype)  # 420000 entries: more than are selected from directly
    if kind == "wide":
        a = a * torch.logspace(-12, 6, 700, dtype=dtype)[None, :, None]
    elif kind == "constant":
        a, b = torch.zeros_like(a), torch.ones_like(b) * torch.tensor([1.0, 3.0], dtype=dtype)[:, None, None]
    elif kind == "half constant":
        a[:, ::2], b[0], b[1] = 0, 1, 3
    elif kind == "denormal":
        a, b = a * 1e-17, b * 1e-17  # the squares are denormal in float32
        if dtype == torch.float64:
            a, b = a * 1e-140, b * 1e-140
    elif kind == "zero":
        a, b = torch.zeros_like(a), torch.zeros_like(b)
    weight = ops.snell_merge(a, b, 0.1, 0, sparsifier="none")
    assert torch.equal(weight, reference.snell_weight(a, b, 0.1))
    for sparsity in (1e-9, 0.25, 0.5, 0.9, 0.9999999):
        y, t = ops.snell_linear(torch.ones(1, 700, dtype=dtype), a, b, 0.1, sparsity, sparsifier="hard")
        assert torch.equal(t, kth(weight, sparsity)), sparsity
        assert torch.isfinite(y).all()
        _, t = ops.snell_linear(torch.ones(1, 700, dtype=dtype), a, b, 0.1, sparsity)
        assert torch.equal(t, reference.snell_threshold(weight, sparsity)), sparsity
    if kind == "constant":  # ties are kept out, and nothing is NaN
        assert not ops.snell_merge(a, b, 0.1, 0.9).any()


def test_7_more_than_2_to_24_entries() -> None:
    """torch.quantile refuses this size."""
    a, b = factors(5000, 5000, 4)
    weight = ops.snell_merge(a, b, 0.1, 0, sparsifier="none")
    with pytest.raises(RuntimeError, match="too large"):
        weight.quantile(0.5)
    x = inputs(2, 5000).requires_grad_()
    y, t = ops.snell_linear(x, a.requires_grad_(), b, 0.1, 0.9, sparsifier="hard")
    assert torch.equal(t, kth(weight, 0.9))
    y.sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


# --- promises of the pack --------------------------------------------------------------------------------------------
def everything(dtype: torch.dtype, rule: Any, n: int) -> list[Tensor]:
    a, b = factors(600, 530, 8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = inputs(n, 600).to(dtype)
    leaves = [v.requires_grad_() for v in (x, a, b)]
    y, t = ops.snell_linear(x, a, b, 0.1, 0.7, sparsifier=rule, grad="exact")
    return [y, t, *torch.autograd.grad(y, leaves, inputs(n, 530, seed=5).to(dtype))]


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 30, 700])
def test_threads_do_not_matter(dtype: torch.dtype, rule: str, n: int) -> None:
    one = everything(dtype, rule, n)
    torch.set_num_threads(2)
    for a, b in zip(one, everything(dtype, rule, n), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_compute_in_float32(dtype: torch.dtype) -> None:
    """x narrow, factors float32 or narrow: products in float32, one rounding at the end."""
    a, b = factors(100, 90, 8)
    x = inputs(3000, 100).to(dtype)  # more than one chunk of rows
    gy = inputs(3000, 90, seed=2).to(dtype)
    for low, high in [(a, b), (a.to(dtype), b.to(dtype))]:
        leaves = [v.clone().requires_grad_() for v in (x, low, high)]
        y, t = ops.snell_linear(*leaves, 0.1, 0.9)
        assert y.dtype == dtype
        assert t.dtype == torch.float32
        wide = [v.detach().float().requires_grad_() for v in (x, low, high)]
        expected, threshold = ops.snell_linear(*wide, 0.1, 0.9)
        assert torch.equal(t, threshold)
        torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2, atol=1e-4)
        got = torch.autograd.grad(y, leaves, gy)
        want = torch.autograd.grad(expected, wide, gy.float())
        for g, w, leaf in zip(got, want, leaves, strict=True):
            assert g.dtype == leaf.dtype
            assert relative(g, w) < (1e-5 if g.dtype == torch.float32 else 1e-2)


def test_layouts_and_leading_dimensions() -> None:
    a, b = factors(30, 40, 8, dtype=torch.float64)
    x = inputs(24, 30, torch.float64)
    gy = inputs(24, 40, torch.float64, seed=1)
    y, _ = ops.snell_linear(x, a, b, 0.1, 0.5)
    cases = {
        "transposed": x.t().contiguous().t(),
        "sliced": torch.cat([x, x], 1)[:, :30],
        "strided": torch.stack([x, x], 2).reshape(24, 60)[:, ::2],
        "leading": x.view(2, 3, 4, 30),
        "permuted": x.view(4, 6, 30).transpose(0, 1).contiguous().transpose(0, 1),
    }
    at, bt = a.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([b, b], 2)[:, :, :4]
    for name, case in cases.items():
        leaves = [v.detach().requires_grad_() for v in (case, at, bt)]
        got, _ = ops.snell_linear(*leaves, 0.1, 0.5)
        torch.testing.assert_close(got.reshape(24, 40), y, msg=name)
        for out in (gy.view_as(got), gy.view_as(got).mT.contiguous().mT, gy[:1, :1].expand_as(y).view_as(got)):
            wanted = [v.detach().requires_grad_() for v in (x, a, b)]
            reference.snell_linear(*wanted, 0.1, 0.5)[0].backward(out.reshape(24, 40))
            grads = torch.autograd.grad(got, leaves, out, retain_graph=True)
            for g, w in zip(grads, wanted, strict=True):
                assert w.grad is not None
                torch.testing.assert_close(g.reshape(w.shape), w.grad)
    vector, _ = ops.snell_linear(x[0], a, b, 0.1, 0.5)
    torch.testing.assert_close(vector, y[0])


def test_no_rows() -> None:
    a, b = (v.requires_grad_() for v in factors(30, 40, 8))
    x = torch.empty(0, 3, 30, requires_grad=True)
    y, t = ops.snell_linear(x, a, b, 0.1, 0.5)
    assert y.shape == (0, 3, 40)
    assert t > 0
    y.sum().backward()
    for leaf in (x, a, b):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def test_only_what_is_needed_is_differentiated() -> None:
    a, b = factors(30, 40, 8)
    x = inputs(5, 30)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]:
        leaves = [v.clone().requires_grad_(need) for v, need in zip((x, a, b), needs, strict=True)]
        y, t = ops.snell_linear(*leaves, 0.1, 0.5)
        assert y.requires_grad
        assert not t.requires_grad
        y.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(needs)
    assert not ops.snell_merge(a.requires_grad_(), b, 0.1, 0.5).requires_grad
    with torch.no_grad():
        assert not ops.snell_linear(x, a, b, 0.1, 0.5)[0].requires_grad


A, B = torch.ones(2, 3, 2), torch.zeros(2, 4, 2)
X = torch.ones(5, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"snell_linear: sparsity must be in \[0, 1\), got 1"),
        ({"sparsity": -0.1}, ValueError, "sparsity must be in"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be in .* got nan"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"sparsifier": "top"}, ValueError, "must be 'code', 'paper', 'hard', 'soft' or 'none', got 'top'"),
        ({"grad": "true"}, ValueError, "grad must be 'detached' or 'exact', got 'true'"),
        ({"A": A[0]}, ValueError, r"A must be \[2, in_features, rank / 2\], got \[3, 2\]"),
        ({"A": torch.ones(3, 3, 2)}, ValueError, r"A must be \[2, in_features"),
        ({"B": torch.ones(2, 4, 3)}, ValueError, r"same last dimension \(rank / 2\), got \[2, 3, 2\] and \[2, 4, 3\]"),
        ({"B": torch.ones(2, 0, 2)}, ValueError, r"B must be \[2, out_features, rank / 2\], got \[2, 0, 2\]"),
        ({"x": torch.ones(5, 4)}, ValueError, r"x must be \[..., in_features = 3\], got \[5, 4\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
        ({"x": X.long()}, TypeError, "snell_linear: x has dtype Long; supported are float32"),
        ({"A": A.to(torch.complex64)}, TypeError, "snell_linear: A has dtype ComplexFloat"),
        ({"B": B.double()}, TypeError, "A has dtype Float, B Double"),
        ({"x": X.double()}, TypeError, "x has dtype Double, A and B Float; float64 goes with float64"),
        ({"A": torch.where(A > 0, torch.nan, A)}, ValueError, "snell_linear: A holds a NaN or an infinity"),
        ({"B": B + torch.inf}, ValueError, "snell_linear: B holds a NaN or an infinity"),
        ({"x": X.to("meta")}, ValueError, "x is on meta, A and B on cpu"),
        ({"B": B.to("meta")}, ValueError, "A is on cpu, B on meta"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"x": X, "A": A, "B": B, "scale": 0.1, "sparsity": 0.5}
    ops.snell_linear(**good)
    with pytest.raises(error, match=message):
        ops.snell_linear(**{**good, **change})
    if not change.keys() & {"x", "grad"}:
        arguments = {k: v for k, v in {**good, **change}.items() if k != "x"}
        with pytest.raises(error, match=message.replace("snell_linear", "snell_merge")):
            ops.snell_merge(**arguments)


def test_nan_in_x_goes_through() -> None:
    x = X.clone()
    x[1, 2] = torch.nan
    a, b = factors(3, 4, 4)
    y, _ = ops.snell_linear(x, a, b, 0.1, 0.0, sparsifier="none")
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2, 3, 4]]).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grad", GRADS)
def test_opcheck(rule: str, grad: str) -> None:
    a, b = (v.requires_grad_() for v in factors(6, 5, 4))
    x = inputs(7, 6).view(1, 7, 6).requires_grad_()
    torch.library.opcheck(linear, (x, a, b, 0.1, 0.5), {"sparsifier": rule, "grad": grad})
    torch.library.opcheck(merge, (a.detach(), b.detach(), 0.1, 0.5), {"sparsifier": rule})
    if grad == "exact" or rule == "code":
        y, t = ops.snell_linear(x, a, b, 0.1, 0.5, sparsifier=rule, grad=grad)  # type: ignore[arg-type]
        plain = [v.detach() for v in (torch.ones_like(y), x, a, b, t)]
        for wanted in ([True, True, True], [False, True, False], [True, False, False]):
            torch.library.opcheck(backward, (*plain, 0.1, 0.5, rule, grad, wanted))


def test_compile_fullgraph_and_meta() -> None:
    torch._dynamo.reset()

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y, t = ops.snell_linear(x * 2, a, b, 0.1, 0.5)
        return y.sin() + t

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 9):
        a, b = (v.requires_grad_() for v in factors(6, 5, 4))
        x = inputs(n, 6).requires_grad_()
        out, expected = compiled(x, a, b), layer(x, a, b)
        assert torch.equal(out, expected)
        for g, w in zip(
            torch.autograd.grad(out.sum(), (x, a, b)), torch.autograd.grad(expected.sum(), (x, a, b)), strict=True
        ):
            torch.testing.assert_close(g, w)
    meta = [v.to("meta") for v in (inputs(4, 6).view(2, 2, 6).bfloat16(), *factors(6, 5, 4))]
    y, t = ops.snell_linear(*meta, 0.1, 0.5)
    assert (y.shape, y.dtype, t.shape, t.dtype) == ((2, 2, 5), torch.bfloat16, (), torch.float32)
    assert ops.snell_merge(meta[1], meta[2], 0.1, 0.5).shape == (6, 5)
    with pytest.raises(ValueError, match="sparsity must be"):
        ops.snell_merge(meta[1], meta[2], 0.1, 2.0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_cuda_weights_and_threshold_are_the_bits_of_the_cpu(rule: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        a, b = factors(*shape, dtype=dtype)
        for sparsity in (0.0, 0.3, 0.9, 0.999):
            merged = ops.snell_merge(a.cuda(), b.cuda(), 0.1, sparsity, sparsifier=rule)
            assert torch.equal(merged.cpu(), ops.snell_merge(a, b, 0.1, sparsity, sparsifier=rule))
            x = torch.ones(2, shape[0], dtype=dtype)
            t = ops.snell_linear(x.cuda(), a.cuda(), b.cuda(), 0.1, sparsity, sparsifier=rule)[1]
            assert torch.equal(t.cpu(), ops.snell_linear(x, a, b, 0.1, sparsity, sparsifier=rule)[1])


@pytest.mark.cuda
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("rule", RULES)
def test_cuda_gradients_are_those_of_the_cpu(rule: Any, grad: Any) -> None:
    for rows, columns, rank in [(33, 150, 6), (2100, 600, 8), (20, 2100, 32)]:
        a, b = factors(rows, columns, rank, dtype=torch.float64)
        x, gy = inputs(7, rows, torch.float64), inputs(7, columns, torch.float64, seed=3)
        results = []
        for device in ("cpu", "cuda"):
            leaves = [v.to(device).requires_grad_() for v in (x, a, b)]
            y, _ = ops.snell_linear(*leaves, 0.1, 0.7, sparsifier=rule, grad=grad)
            results.append([y, *torch.autograd.grad(y, leaves, gy.to(device))])
        for c, g in zip(*results, strict=True):
            assert relative(g.cpu(), c) < 1e-12
