"""AdaHessian, the compiled optimizer in both languages. ``test_<nn>_...`` is acceptance test n of arXiv:2006.00719's
implementation here; ``test_bug_<n>_...`` is a bug of another implementation that this one must not have.
"""

from __future__ import annotations

import copy
import csv
import gc
import math
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import curvature, ops
from torch_ext.optim import AdaHessian
from torch_ext.reference.optim import AdaHessianReference
from torch_ext.testing import LANGUAGES, bits, cpp_optimizer

ROOT = Path(__file__).resolve().parents[3]
both_languages = pytest.mark.parametrize("language", LANGUAGES)


def make(language: str, params: Any, **options: Any) -> Any:
    params = list(params)
    return AdaHessian(params, **options) if language == "python" else cpp_optimizer("AdaHessian", params, **options)


def leaf(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).detach().clone().requires_grad_()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quadratic(x: Tensor, a: Any, c: Any = 0.0) -> Callable[[], Tensor]:
    return lambda: ((x - c) ** 2 * a / 2).sum()


def mlp(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A small tanh network with a regression loss on ten rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x, y = randn(10, 5, seed=1, dtype=dtype), randn(10, 3, seed=2, dtype=dtype)

    def loss(rows: slice = slice(None)) -> Tensor:
        return F.mse_loss(model(x[rows]), y[rows])

    return model, loss


def values(model: nn.Module) -> Any:
    return bits(list(model.parameters()))


def state(optimizer: Any, index: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = optimizer.state_dict()["state"][index]
    return found


# ---- the numbered acceptance tests


@both_languages
def test_01_one_step_newton(language: str) -> None:
    a = torch.tensor([1e-3, 1.0, 50.0, 1e4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for draw in range(200):
        exact = draw < 100
        x0, c = (
            torch.randint(-20, 21, (4,), generator=generator).double()
            if exact
            else torch.randn(4, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        x = leaf(x0)
        make(language, [x], lr=1.0, betas=(0, 0), eps=0.0).step(quadratic(x, a, c))
        error = (x.detach() - c).abs()
        largest = torch.maximum(x0.abs(), c.abs())
        ulp = torch.nextafter(largest, torch.full_like(largest, math.inf)) - largest
        assert bool((error <= (0 if exact else 4 * ulp)).all())


@both_languages
def test_02_conditioning_invariance(language: str) -> None:
    largest = []
    for condition in (1.0, 1e3, 1e6):
        x = leaf(torch.ones(20))
        a = torch.logspace(0, math.log10(condition), 20, dtype=torch.float64)
        optimizer = make(language, [x], lr=0.15, eps=0.0)
        for _ in range(200):
            optimizer.step(quadratic(x, a))
        largest.append(float(x.detach().abs().max()))
    assert largest[0] == pytest.approx(9.3475e-7, rel=1e-4)
    assert largest[1:] == pytest.approx([largest[0]] * 2, rel=1e-11)


@both_languages
@pytest.mark.parametrize(("z", "d", "expected"), [((1, -1), (1, 2), (0.9, -0.9)), ((1, 1), (3, 4), (29 / 30, -0.95))])
def test_03_hand_case(language: str, z: tuple[int, int], d: tuple[int, int], expected: tuple[float, float]) -> None:
    h = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    seed = next(s for s in range(99) if ops.rademacher_(torch.zeros(2), s, 0).tolist() == list(z))
    x = leaf([1.0, -1.0])
    optimizer = make(language, [x], lr=0.1, eps=0.0, seed=seed)
    optimizer.step(lambda: x @ h @ x / 2)
    torch.testing.assert_close(x.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    v_hat = state(optimizer)["exp_hessian_diag_sq"] / (1 - 0.999)
    torch.testing.assert_close(v_hat.sqrt(), torch.tensor(d, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_04_estimator_moments(n_samples: int) -> None:
    """One probe of a block-diagonal problem is 200000 independent draws of a 6 x 6 one."""
    draws, n = 200_000, 6
    a = randn(n, n, seed=3)
    h = a @ a.t()
    x = torch.zeros(draws, n, dtype=torch.float64, requires_grad=True)
    (d,) = curvature.hutchinson_diag(((x @ h) * x).sum() / 2, [x], n_samples=n_samples, seed=1)
    diagonal = h.diag()
    second = diagonal**2 + ((h**2).sum(1) - diagonal**2) / n_samples
    for sample, expected in ((d, diagonal), (d**2, second)):
        standard_error = sample.std(0) / draws**0.5
        assert bool(((sample.mean(0) - expected).abs() <= torch.maximum(0.01 * expected, 5 * standard_error)).all())


def breast_cancer() -> tuple[Tensor, Tensor]:
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0, correction=0), torch.tensor(data.target, dtype=torch.float64)


def logistic(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x @ w, y) + 0.005 * (w * w).sum()


def test_05_hvp_oracle() -> None:
    x, y = breast_cancer()
    w = leaf(torch.linspace(-0.3, 0.3, 30, dtype=torch.float64))
    z = ops.rademacher_(torch.empty(30, dtype=torch.float64), 1, 0)
    p = torch.sigmoid(x @ w.detach())
    expected = x.t() @ ((p * (1 - p)) * (x @ z)) / len(y) + 0.01 * z
    for mode, tolerance in (("double_backward", 1e-12), ("finite_difference", 1e-6)):
        (actual,) = curvature.hvp(lambda: logistic(w, x, y), [w], [z], mode=mode)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@both_languages
def test_06_convergence(language: str) -> None:
    x, y = breast_cancer()
    optimum = 0.10241656575570418
    at_50 = []
    for seed in range(5):
        w = leaf(torch.zeros(30))
        optimizer = make(language, [w], seed=seed)
        gap = {}
        for t in range(1, 501):
            optimizer.step(lambda w=w: logistic(w, x, y))
            if t in (50, 100, 200, 500):
                gap[t] = float(logistic(w.detach(), x, y)) - optimum
        at_50.append(gap[50])
        assert gap[100] <= 1e-2
        assert gap[200] <= 5e-4
        assert abs(gap[500]) <= 1e-8
    assert sorted(at_50)[2] <= 2e-2


@both_languages
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_07_loss_scale_invariance(language: str, power: float) -> None:
    start = randn(30)
    plain, scaled, told = leaf(start), leaf(start), leaf(start)
    a, b, c = (make(language, [w], eps=0.0, hessian_power=power) for w in (plain, scaled, told))

    def loss(w: Tensor) -> Tensor:
        return (w**4).sum() + torch.tanh(w).prod() + (w * w).sum()

    for t in range(20):
        a.step(lambda: loss(plain))
        b.step(lambda: loss(scaled) * 1024)
        c.step(lambda: loss(told) * 1024, loss_scale=1024)
        if power == 1:
            assert bits(plain) == bits(scaled)
        elif t == 0:
            factor = 1024 ** (1 - power)
            torch.testing.assert_close(scaled.detach() - start, (plain.detach() - start) * factor, rtol=1e-11, atol=0)
        assert bits(plain) == bits(told)


@both_languages
def test_08_negative_curvature(language: str) -> None:
    x = leaf([0.1])
    make(language, [x], lr=1.0, betas=(0, 0), eps=0.0).step(lambda: -(x * x).sum())
    assert x.tolist() == [0.2]


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with open(ROOT / "examples" / "data" / "digits.csv", newline="") as file:
        rows = list(csv.reader(file))
    if not rows[0][0].isdigit():
        rows = rows[1:]
    data = torch.tensor([[float(v) for v in row] for row in rows])
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
    x, y = data[:, :64] / 16, data[:, 64].long()
    return x[:1400], y[:1400], x[1400:], y[1400:]


def train_digits(seed: int, language: str = "python", **options: Any) -> tuple[float, float]:
    """Final train loss and test accuracy of 20 epochs in batches of 100."""
    x, y, test_x, test_y = digits(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = make(language, model.parameters(), lr=0.15, **options)
    for _ in range(20):
        for batch in torch.randperm(1400).split(100):
            optimizer.step(lambda batch=batch: F.cross_entropy(model(x[batch]), y[batch]))
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
        return F.cross_entropy(model(x), y).item(), accuracy


def test_09_digits() -> None:
    rows = [train_digits(seed, linear_averaging="row") for seed in range(3)]
    assert all(accuracy >= 0.96 for _, accuracy in rows), rows
    assert all(loss <= 0.03 for loss, _ in rows), rows
    lazy = [train_digits(seed, linear_averaging="row", update_each=5) for seed in range(3)]
    assert all(accuracy >= 0.96 for _, accuracy in lazy), lazy
    assert abs(sum(a for _, a in rows) - sum(a for _, a in lazy)) / 3 <= 0.005
    assert train_digits(1, "cpp", linear_averaging="row") == rows[1]


SHAPES: list[tuple[tuple[int, ...], dict[str, Any], list[int]]] = [
    ((7,), {"linear_averaging": "row"}, [7]),
    ((5, 64), {}, [5, 64]),
    ((5, 64), {"linear_averaging": "row"}, [5, 1]),
    ((5, 64), {"linear_averaging": "block", "block_size": 16}, [5, 4]),
    ((3, 2, 5), {}, [3, 2, 1]),
    ((3, 2, 3, 3), {}, [3, 2, 1, 1]),
    ((3, 2, 3, 3), {"average_conv": False}, [3, 2, 3, 3]),
    ((2, 2, 3, 4, 5), {}, [2, 2, 1, 1, 1]),
    ((2, 1, 2, 1, 2, 2), {}, [2, 1, 2, 1, 2, 2]),
]


@both_languages
@pytest.mark.parametrize("averaging", ["abs_mean", "signed_mean"])
@pytest.mark.parametrize(("shape", "options", "reduced"), SHAPES, ids=str)
def test_10_averaging_shapes(
    language: str, shape: tuple[int, ...], options: dict[str, Any], reduced: list[int], averaging: str
) -> None:
    """The reduced v gives what the formula written with a full v gives; another parameter comes first (bug 3)."""
    first, p = leaf([1.0, 2.0]), leaf(randn(*shape))
    optimizer = make(language, [first, p], averaging=averaging, **options)
    full, m, v = p.detach().clone(), torch.zeros(shape).double(), torch.zeros(shape).double()
    length = math.prod(shape) // math.prod(reduced)
    for t in range(1, 6):
        h, b = randn(*shape, seed=2 * t), randn(*shape, seed=2 * t + 1)  # a diagonal Hessian of both signs
        optimizer.step(lambda h=h, b=b: (h * p * p / 2 + b * p).sum() + (first**2).sum())
        blocks = h.reshape(-1, length)
        d = blocks.abs().mean(1, keepdim=True) if averaging == "abs_mean" else blocks.mean(1, keepdim=True).abs()
        m = 0.9 * m + 0.1 * (h * full + b)
        v = 0.999 * v + 0.001 * d.expand_as(blocks).reshape(shape) ** 2
        full = full - 0.15 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-4)
        torch.testing.assert_close(p.detach(), full, rtol=1e-9, atol=1e-10)
    assert list(state(optimizer, 1)["exp_hessian_diag_sq"].shape) == reduced


@both_languages
def test_10_non_dividing_block_names_the_parameter(language: str) -> None:
    params = [leaf([1.0]), leaf(torch.ones(4, 6))]
    optimizer = make(language, params, linear_averaging="block", block_size=4)
    with pytest.raises(ValueError, match=r"block_size 4 does not divide the rows of parameter 1 \(shape \[4, 6\]\)"):
        optimizer.step(lambda: sum((p * p).sum() for p in params))


@both_languages
def test_11_linearity(language: str) -> None:
    """Micro-batches of 2, 3 and 5 rows, weighted by their share, are one batch of ten."""
    whole, parts = mlp(), mlp()
    options = {"n_samples": 2, "update_each": 2, "linear_averaging": "row", "averaging": "signed_mean"}
    a, b = make(language, whole[0].parameters(), **options), make(language, parts[0].parameters(), **options)
    for _ in range(6):
        a.step(lambda: whole[1]())
        batches = [(slice(0, 2), 0.2), (slice(2, 5), 0.3), (slice(5, 10), 0.5)]
        if language == "cpp":
            b.step(None, accumulate=[(parts[1](rows), weight) for rows, weight in batches])
        else:
            for rows, weight in batches:
                b.accumulate(parts[1](rows), weight)
            assert b.step() is None
    for p, q in zip(whole[0].parameters(), parts[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_12_determinism(tmp_path: Path) -> None:
    """1 and 2 threads, save and load inside a period of update_each=5, C++ and Python: the same bits."""
    outcomes = []
    for language, threads, resume in (
        ("python", 1, False),
        ("python", 2, False),
        ("python", 1, True),
        ("cpp", 1, False),
        ("cpp", 2, True),
    ):
        torch.set_num_threads(threads)
        model, loss = mlp(torch.float32)
        optimizer = make(language, model.parameters(), update_each=5, seed=3)
        for t in range(23):
            if resume and t == 12:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = make(language, model.parameters())
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            optimizer.step(lambda loss=loss: loss())
        outcomes.append((values(model), bits(optimizer.state_dict())))
    assert all(outcome == outcomes[0] for outcome in outcomes)


@both_languages
def test_13_no_leak(language: str) -> None:
    """A new model each step: after a warm-up memory does not grow (a kept graph would hold 2 MB each time)."""
    x = torch.randn(2000, 64)

    def train_one(form: str) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        optimizer = make(language, model.parameters())
        if form == "grad":
            (model(x) ** 2).mean().backward(create_graph=True)
            optimizer.step()
        else:
            optimizer.step(lambda: (model(x) ** 2).mean())
        assert all(p.grad is not None and p.grad.grad_fn is None for p in model.parameters())

    gc.collect()
    gc.disable()  # no cycle collector, as in C++
    try:
        for form in ("grad", "closure"):
            for _ in range(20):
                train_one(form)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(100):
                train_one(form)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    finally:
        gc.enable()


class Witness:
    """Put into the metadata of a graph node, it lives as long as the node."""


def node_named(node: Any, name: str) -> Any:
    """The first node of that name in the graph behind ``node``."""
    waiting = [node]
    while waiting:
        node = waiting.pop(0)
        if node.name() == name:
            return node
        waiting += [following for following, _ in node.next_functions if following is not None]
    raise AssertionError(f"no {name}")


@both_languages
@pytest.mark.parametrize("form", ["grad", "backward in the closure", "closure", "skipped", "raising"])
def test_13_the_graph_dies_with_the_step(language: str, form: str) -> None:
    model, loss = mlp()
    optimizer = make(language, model.parameters())
    seen: list[weakref.ref[Witness]] = []

    def watched() -> Tensor:
        value = loss()
        if form == "skipped":
            value = value * math.inf
        witness = Witness()
        node_named(value.grad_fn, "TanhBackward0").metadata["witness"] = witness  # the graph of the gradient keeps it
        seen.append(weakref.ref(witness))
        return value

    def backward() -> Tensor:
        value = watched()
        value.backward(create_graph=True)
        return value.detach()

    gc.collect()
    gc.disable()
    try:
        if form == "raising":
            backward()
            assert seen[0]() is not None  # the graph hangs in .grad
            with pytest.raises(ValueError, match="hessian has 1 tensors"):
                optimizer.step(hessian=[torch.ones(1)])
        elif form in ("grad", "skipped"):
            backward()
            optimizer.step()
        else:
            optimizer.step(watched if form == "closure" else backward)
        assert seen[0]() is None
    finally:
        gc.enable()
    assert all(p.grad is not None and p.grad.grad_fn is None for p in model.parameters())


@both_languages
def test_14_linear_loss_and_undefined_gradients(language: str) -> None:
    x, unused, linear = leaf([2.0]), leaf([5.0]), leaf([1.0])
    optimizer = make(language, [unused, x, linear], weight_decay=0.1)
    optimizer.step(lambda: (x**2).sum() + 1e-3 * linear.sum())
    assert unused.tolist() == [5.0]
    assert linear.item() == pytest.approx(1 - 0.15 * (1e-3 / 1e-4 + 0.1), rel=1e-12)  # D = 0, denominator = eps
    only = leaf([1.0])
    optimizer = make(language, [only])  # every gradient is constant: nothing to differentiate twice
    optimizer.step(lambda: 1e-3 * only.sum())
    assert only.item() == pytest.approx(1 - 0.15 * 1e-3 / 1e-4, rel=1e-12)


@both_languages
def test_14_linear_parameter_on_the_grad_path(language: str) -> None:
    """A gradient without a graph beside one that has it is zero curvature, not an error."""
    x, linear = leaf([2.0]), leaf([1.0])
    ((x**2).sum() + 1e-3 * linear.sum()).backward(create_graph=True)
    assert linear.grad is not None
    assert linear.grad.grad_fn is None
    make(language, [x, linear]).step()
    assert linear.item() == pytest.approx(1 - 0.15 * 1e-3 / 1e-4, rel=1e-12)


@both_languages
def test_14_sparse_embedding(language: str) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = make(language, embedding.parameters())
    with pytest.raises(RuntimeError, match=r"sparse gradients: parameter 0 .*sparse=False"):
        optimizer.step(lambda: (embedding(torch.tensor([1])) ** 2).sum())


@both_languages
@pytest.mark.parametrize("form", ["grad", "closure"])
def test_14_backward_without_create_graph(language: str, form: str) -> None:
    model, loss = mlp()
    optimizer = make(language, model.parameters(), update_each=2)

    def backward() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def step() -> None:
        if form == "grad":
            backward()
        optimizer.step(backward if form == "closure" else None)

    before = values(model)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*is_second_order"):
        step()
    assert values(model) == before
    assert not optimizer.state_dict()["state"]
    optimizer.step(loss)  # the refresh; now a plain backward is right
    step()
    assert state(optimizer)["step"].item() == 2
    with pytest.raises(RuntimeError, match="create_graph"):
        step()


@both_languages
def test_14_half_overflow_is_skipped(language: str) -> None:
    p = leaf([300.0, 1.0], torch.float16)
    optimizer = make(language, [p])
    optimizer.step(lambda: (p.float() ** 2).sum() * 2.0**16, loss_scale=2.0**16)
    assert p.tolist() == [300.0, 1.0]
    assert optimizer.skipped_steps.item() == 1
    optimizer.step(lambda: (p.float() ** 2).sum() * 2.0**4, loss_scale=2.0**4)
    assert p.tolist() != [300.0, 1.0]
    assert (optimizer.skipped_steps.item(), state(optimizer)["step"].item()) == (1, 1)


@both_languages
@pytest.mark.parametrize("options", [{}, {"n_samples": 3}, {"linear_averaging": "row", "averaging": "signed_mean"}])
def test_14_hvp_modes_agree(language: str, options: dict[str, Any]) -> None:
    results = []
    for mode in ("double_backward", "finite_difference"):
        model, loss = mlp()
        optimizer = make(language, model.parameters(), hvp=mode, **options)
        optimizer.step(lambda loss=loss: loss())
        results.append([state(optimizer, i)["exp_hessian_diag_sq"].sqrt() for i in range(4)])
    largest = max(float(v.max()) for v in results[0])
    for exact, close in zip(*results, strict=True):
        torch.testing.assert_close(close, exact, rtol=0, atol=1e-6 * largest)


# ---- the kernel against the reference, to the bit

BIT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.01, "maximize": True, "max_update": 0.3},
    {"hessian_power": 0.5, "eps": 1e-3},
    {"hessian_power": 0.0, "betas": (0.5, 0.9)},
    {"linear_averaging": "row"},
    {"linear_averaging": "row", "averaging": "signed_mean", "update_each": 2},
    {"linear_averaging": "block", "block_size": 5},
    {"average_conv": False, "weight_decay": 0.1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", BIT_OPTIONS, ids=str)
def test_kernel_equals_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    """With gradients and Hessian diagonals from outside; sizes with every kind of remainder; three layouts."""
    shapes = [(1,), (7,), (130,), (3, 5), (2, 35), (2, 1025), (3, 2, 3, 3), (2, 2, 40), ()]
    start = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    reference = AdaHessianReference([leaf(s, dtype) for s in start], **options)
    transposed = [s.t().contiguous().t().requires_grad_() if s.dim() == 2 else leaf(s, dtype) for s in start]
    spaced = [torch.stack([s, s], -1)[..., 0].requires_grad_() for s in start]
    variants = [[leaf(s, dtype) for s in start], transposed, spaced]
    optimizers = [AdaHessian(params, **options) for params in variants]
    for t in range(4):
        grads = [randn(*shape, seed=100 * t + i, dtype=dtype) for i, shape in enumerate(shapes)]
        hessian = [randn(*shape, seed=100 * t + 50 + i, dtype=dtype) for i, shape in enumerate(shapes)]
        reference.step(grads, hessian=hessian)
        for params, optimizer in zip(variants, optimizers, strict=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step(hessian=hessian)
            assert bits(params) == bits(reference.tensors)
    for params, optimizer in zip(variants, optimizers, strict=True):
        for p, expected in zip(params, reference.params, strict=True):
            mine = {k: v for k, v in optimizer.state[p].items() if not k.startswith("global_")}
            assert bits(mine) == bits({k: expected.state[k] for k in mine})


def test_general_power_is_close_to_the_reference() -> None:
    p, q = leaf(randn(500), torch.float32), leaf(randn(500), torch.float32)
    optimizer, reference = AdaHessian([p], hessian_power=0.7), AdaHessianReference([q], hessian_power=0.7)
    for t in range(5):
        p.grad, h = randn(500, seed=t, dtype=torch.float32), randn(500, seed=t + 9, dtype=torch.float32)
        reference.step([p.grad], hessian=[h])
        optimizer.step(hessian=[h])
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("update_each", [1, 3])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_closure_step_equals_the_reference(update_each: int, n_samples: int) -> None:
    """Differentiation included: probes, Hutchinson sums, refresh counts."""
    model, loss = mlp()
    twin, twin_loss = mlp()
    optimizer = AdaHessian(model.parameters(), update_each=update_each, n_samples=n_samples, seed=11)
    reference = AdaHessianReference(list(twin.parameters()), update_each=update_each, n_samples=n_samples, seed=11)
    for _ in range(7):
        value = optimizer.step(lambda: loss())
        assert bits(value) == bits(reference.step_closure(lambda: twin_loss()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# ---- bugs of other implementations


@pytest.mark.parametrize("world", [2, 4, 8])
def test_bug_2_probes_are_balanced_and_uncorrelated(world: int) -> None:
    """Not the sign of a sum over ranks with ties at +1 (mean 0.27 to 0.5): one probe, known to all by its key."""
    z = ops.rademacher_(torch.empty(400_000), seed=world, stream=0)
    assert abs(z.mean().item()) < 5 / 400_000**0.5
    assert abs((z[1:] * z[:-1]).mean().item()) < 5 / 400_000**0.5


@both_languages
def test_bug_4_groups_and_missing_gradients_stay_paired(language: str) -> None:
    """Two groups with an unused parameter in each: every tensor gets its own gradient and curvature."""
    a, unused, b, c, idle = leaf([1.0]), leaf([[9.0]]), leaf([1.0, 2.0]), leaf([[3.0], [4.0]]), leaf([5.0] * 3)
    groups = [{"params": [unused, a, b]}, {"params": [idle, c], "lr": 0.5}]
    optimizer = make(language, groups, betas=(0.0, 0.0), eps=0.0, lr=1.0)
    optimizer.step(lambda: (a**2).sum() + 5 * (b**2).sum() + 70 * (c**2).sum())
    assert a.tolist() == [0.0]
    assert b.tolist() == [0.0, 0.0]
    assert c.tolist() == [[1.5], [2.0]]
    assert (unused.item(), idle.tolist()) == (9.0, [5.0] * 3)


@both_languages
def test_bug_5_the_graph_is_not_retained(language: str) -> None:
    model, loss = mlp()
    kept: list[Tensor] = []

    def closure() -> Tensor:
        kept.append(loss())
        return kept[-1]

    make(language, model.parameters(), n_samples=3).step(closure)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        kept[0].backward()


@both_languages
def test_bug_6_closures_run_with_gradients_and_leave_none_behind(language: str) -> None:
    model, loss = mlp()
    optimizer = make(language, model.parameters())

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        return loss()

    with torch.no_grad():
        value = optimizer.step(closure)
    assert not value.requires_grad
    assert all(p.grad is not None and not p.grad.requires_grad for p in model.parameters())
    assert set(vars(next(model.parameters()))) == set()  # nothing hangs on the parameter itself


@both_languages
def test_bug_7_early_steps_of_lazy_curvature_are_not_longer(language: str) -> None:
    """A quadratic has the same D at each refresh, so update_each may not change a step at all."""
    lengths = []
    for update_each in (1, 5):
        x = leaf([1.0, -2.0])
        optimizer = make(language, [x], update_each=update_each)
        path = []
        for _ in range(12):
            optimizer.step(quadratic(x, torch.tensor([3.0, 0.2], dtype=torch.float64)))
            path.append(x.detach().clone())
        lengths.append(torch.stack(path))
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-12, atol=1e-14)


# ---- the forms of a closure


def reference_steps(steps: int = 6, **options: Any) -> Any:
    model, loss = mlp()
    optimizer = AdaHessian(model.parameters(), **options)
    for _ in range(steps):
        optimizer.step(lambda: loss())
    return values(model)


@pytest.mark.parametrize("options", [{}, {"update_each": 3}, {"hvp": "finite_difference"}], ids=str)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("convention", ["timm", "lightning", "torch", "returns loss"])
def test_closure_conventions(convention: str, set_to_none: bool, options: dict[str, Any]) -> None:
    model, loss = mlp()
    optimizer = AdaHessian(model.parameters(), **options)
    assert hasattr(optimizer, "is_second_order")  # how timm finds out

    def lightning() -> Tensor:  # forward, zero_grad, backward, a detached loss
        value = loss()
        optimizer.zero_grad(set_to_none=set_to_none)
        value.backward(create_graph=optimizer.is_second_order)
        return value.detach().clone()

    def usual() -> Tensor:  # torch's documentation
        optimizer.zero_grad(set_to_none=set_to_none)
        value = loss()
        value.backward(create_graph=optimizer.is_second_order)
        return value

    def returns_loss() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        return loss()

    for _ in range(6):
        if convention == "timm":
            if optimizer.param_groups[0]["hvp"] == "finite_difference":
                pytest.skip("finite differences need a closure")
            optimizer.zero_grad(set_to_none=set_to_none)
            loss().backward(create_graph=optimizer.is_second_order)
            optimizer.step()
        else:
            closure = {"lightning": lightning, "torch": usual, "returns loss": returns_loss}[convention]
            assert isinstance(optimizer.step(closure), Tensor)
    assert values(model) == reference_steps(**options)


@both_languages
def test_closure_may_return_nothing_after_backward(language: str) -> None:
    model, loss = mlp()
    optimizer = make(language, model.parameters())

    def closure() -> None:
        optimizer.zero_grad()
        loss().backward(create_graph=True)

    assert optimizer.step(closure) is None
    assert values(model) == reference_steps(1)


@both_languages
@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda p: None, "does the closure return it"),
        (lambda p: p * 2, r"the loss must be one number, got shape \[2\]"),
        (lambda p: torch.zeros(()), "graph|require"),
        (lambda p: (p * p).sum().detach(), "graph|require"),
    ],
)
def test_closure_that_gives_no_loss(language: str, closure: Callable[[Tensor], Any], message: str) -> None:
    p = leaf([1.0, 2.0])
    optimizer = make(language, [p])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(lambda: closure(p))
    assert p.tolist() == [1.0, 2.0]
    assert not optimizer.state_dict()["state"]


def test_is_second_order() -> None:
    model, loss = mlp()
    optimizer = AdaHessian(model.parameters(), update_each=3)
    flags = []
    for _ in range(7):
        flags.append(optimizer.is_second_order)
        optimizer.step(lambda: loss())
    assert flags == [True, False, False] * 2 + [True]
    lazy = AdaHessian(model.parameters(), hvp="finite_difference")
    assert not lazy.is_second_order
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdaHessian(model.parameters())
    other.load_state_dict(saved)
    assert other.is_second_order == optimizer.is_second_order is False


@both_languages
def test_steps_between_refreshes_are_first_order(language: str) -> None:
    """Their closure may contain an op that has no second derivative."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return (x * x).sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

    x = leaf([1.0, -2.0])
    optimizer = make(language, [x], update_each=3)
    optimizer.step(lambda: (x * x).sum())
    second = state(optimizer)["exp_hessian_diag_sq"].clone()
    for _ in range(2):
        optimizer.step(lambda: Once.apply(x))
        assert bits(state(optimizer)["exp_hessian_diag_sq"]) == bits(second)
    with pytest.raises(RuntimeError, match=r"(?s)once_differentiable.*finite_difference"):
        optimizer.step(lambda: Once.apply(x) ** 2)


# ---- the other inputs of a step


@both_languages
def test_curvature_closure(language: str) -> None:
    x, h = leaf([1.0, -2.0]), torch.tensor([2.0, 8.0], dtype=torch.float64)
    optimizer = make(language, [x], lr=1.0, eps=0.0, update_each=2)
    calls: list[int] = []

    def sub_batch() -> Tensor:
        calls.append(1)
        return quadratic(x, 2 * h)()

    optimizer.step(quadratic(x, h), curvature_closure=sub_batch)
    assert x.tolist() == [0.5, -1.0]
    optimizer.step(quadratic(x, h), curvature_closure=sub_batch)
    assert len(calls) == 1  # the second step refreshes nothing

    model, loss = mlp()
    optimizer = make(language, model.parameters())

    def plain() -> None:  # with a curvature closure, the main one needs no graph
        optimizer.zero_grad()
        loss().backward()

    optimizer.step(plain, curvature_closure=lambda: loss(slice(0, 3)))
    assert all(p.grad is not None for p in model.parameters())


@both_languages
def test_external_hessian(language: str) -> None:
    """Instead of the estimate, at any step, whole or reduced; not divided by loss_scale; None is no curvature."""
    h = torch.tensor([[2.0, 8.0], [1.0, 3.0]], dtype=torch.float64)
    x, y, z = (leaf([[1.0, -2.0], [3.0, 0.5]]) for _ in range(3))
    a, b = make(language, [x], eps=0.0), make(language, [y], eps=0.0)
    for _ in range(3):
        a.step(quadratic(x, h))
        b.step(lambda: quadratic(y, h)() * 1024, hessian=[h], loss_scale=1024)
    assert bits([x, state(a)]) == bits([y, state(b)])

    options = {"linear_averaging": "row", "eps": 0.0}
    c, d = make(language, [x := leaf(z), idle := leaf([1.0])], **options), make(language, [z], **options)
    c.step(lambda: quadratic(x, h)() + 1e-3 * idle.sum(), hessian=[h, None])
    d.step(quadratic(z, h), hessian=[h.mean(1, keepdim=True)])
    assert bits(x) == bits(z)
    assert not bool(state(c, 1)["exp_hessian_diag_sq"].any())

    x = leaf([1.0])
    optimizer = make(language, [x], update_each=5)
    optimizer.step(quadratic(x, 2.0))
    optimizer.step(quadratic(x, 2.0), hessian=[torch.full((1,), 6.0, dtype=torch.float64)])
    assert state(optimizer)["bias_products"].tolist() == pytest.approx([0.81, 0.999**10])


@both_languages
@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        ([torch.ones(2)], "hessian has 1 tensors, the optimizer 2 parameters"),
        ([torch.ones(3), torch.ones(2)], r"hessian of parameter 0 \(shape \[2\]\) has shape \[3\]"),
        ([torch.ones(2), torch.ones(1, 2)], r"hessian of parameter 1 \(shape \[2\]\) has shape \[1, 2\]"),
    ],
)
def test_external_hessian_that_does_not_fit(language: str, hessian: list[Tensor], message: str) -> None:
    params = [leaf([1.0, 2.0], torch.float32), leaf([3.0, 4.0], torch.float32)]
    optimizer = make(language, params)
    before = bits(params)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: sum((p * p).sum() for p in params), hessian=hessian)
    assert bits(params) == before
    assert not optimizer.state_dict()["state"]


@both_languages
@pytest.mark.parametrize("where", ["estimate", "external"])
def test_non_finite_curvature_is_skipped(language: str, where: str) -> None:
    x, y = leaf([0.0, 1.0]), leaf([2.0])
    optimizer = make(language, [x, y])
    if where == "estimate":  # |x|^1.5 has gradient 0 and infinite curvature at 0
        optimizer.step(lambda: (x.abs() ** 1.5).sum() + (y**2).sum())
    else:
        inf = torch.tensor([math.inf, 1.0], dtype=torch.float64)
        optimizer.step(lambda: (x**2).sum() + (y**2).sum(), hessian=[inf, None])
    assert (x.tolist(), y.tolist()) == ([0.0, 1.0], [2.0])
    assert optimizer.skipped_steps.item() == 1
    assert state(optimizer, 1)["bias_products"].tolist() == [1.0, 1.0]
    optimizer.step(lambda: (x**2).sum() + (y**2).sum())
    assert y.item() < 2.0


@both_languages
def test_huge_curvature_does_not_freeze_the_parameter(language: str) -> None:
    """D = 1e30 in float32: its square overflows, v saturates and decays again."""
    x = leaf([1.0], torch.float32)
    optimizer = make(language, [x], betas=(0.0, 0.1))
    optimizer.step(lambda: ((x - 1) ** 2).sum() * 5e29)
    assert x.item() == 1.0
    for _ in range(60):
        optimizer.step(lambda: (x * x).sum())
    assert bool(state(optimizer)["exp_hessian_diag_sq"].isfinite().all())
    assert abs(x.item()) < 0.5


@both_languages
def test_max_update(language: str) -> None:
    x = leaf([1.0, 1.0])
    make(language, [x], max_update=2.0).step(lambda: x[0] * 3 + x[1] ** 2 / 2)
    assert x.tolist() == pytest.approx([1 - 0.15 * 2, 1 - 0.15 / (1 + 1e-4)], rel=1e-12)


@both_languages
def test_zero_curvature_and_zero_gradient_with_eps_0(language: str) -> None:
    x = leaf([1.0, 0.0])
    make(language, [x], eps=0.0).step(lambda: (x**2).sum() * 0)
    assert x.tolist() == [1.0, 0.0]


@both_languages
def test_loss_scale_on_the_grad_path(language: str) -> None:
    model, loss = mlp()
    optimizer = make(language, model.parameters())
    (loss() * 64).backward(create_graph=True)
    optimizer.step(None, loss_scale=64.0)
    assert values(model) == reference_steps(1)


def test_accumulate_errors_leave_a_clean_optimizer() -> None:
    model, loss = mlp()
    optimizer = AdaHessian(model.parameters())
    optimizer.accumulate(loss(), 0.5)
    with pytest.raises(RuntimeError, match=r"accumulate\(\) was called: step\(\) takes its sums and no closure"):
        optimizer.step(lambda: loss())
    with pytest.raises(RuntimeError):
        optimizer.accumulate(torch.zeros(()))  # discards the sums
    optimizer.step(lambda: loss())
    assert values(model) == reference_steps(1)
    assert all(p.grad is not None for p in model.parameters())
    lazy = AdaHessian(model.parameters(), hvp="finite_difference")
    with pytest.raises(RuntimeError, match=r"accumulate\(\) takes a loss, hvp=\"finite_difference\" needs a closure"):
        lazy.accumulate(loss())


def test_accumulate_leaves_grad_alone_and_is_first_order_between_refreshes() -> None:
    model, loss = mlp()
    optimizer = AdaHessian(model.parameters(), update_each=2)
    for _ in range(4):
        optimizer.accumulate(loss())
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert values(model) == reference_steps(4, update_each=2)


@both_languages
def test_late_parameter_waits_for_the_next_refresh(language: str) -> None:
    x, late = leaf([1.0]), leaf([1.0])
    optimizer = make(language, [x], update_each=3)
    optimizer.step(lambda: (x**2).sum())
    optimizer.add_param_group({"params": [late]})
    for _ in range(2):
        optimizer.step(lambda: (x**2).sum() + (late**2).sum())
        assert late.item() == 1.0
    optimizer.step(lambda: (x**2).sum() + (late**2).sum())
    assert late.item() == pytest.approx(1 - 0.15, rel=1e-3)  # bias corrections of its own first step
    assert state(optimizer, 1)["step"].item() == 1
    assert state(optimizer, 0)["step"].item() == 4


# ---- models without second derivatives


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).reshape(2, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


@both_languages
def test_flash_attention_names_the_remedy(language: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 8, 16)

    def loss() -> Tensor:
        return (model(x) ** 2).mean()

    optimizer = make(language, model.parameters())
    before = values(model)
    with pytest.raises(RuntimeError, match=r"(?s)scaled_dot_product.*math backend.*hvp=\"finite_difference\""):
        optimizer.step(loss)
    assert values(model) == before
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        optimizer.step(loss)
    lazy = make(language, model.parameters(), lr=0.01, hvp="finite_difference")
    start = loss().item()
    for _ in range(5):
        lazy.step(loss)
    assert loss().item() < start


def test_compiled_model_names_the_remedy() -> None:
    model, loss = mlp()
    compiled = torch.compile(loss, backend="aot_eager")
    optimizer = AdaHessian(model.parameters())
    before = values(model)
    with pytest.raises(RuntimeError, match=r"(?s)double backward.*uncompiled model.*hvp=\"finite_difference\""):
        optimizer.step(compiled)
    assert values(model) == before
    lazy = AdaHessian(model.parameters(), hvp="finite_difference")
    start = loss().item()
    for _ in range(5):
        lazy.step(compiled)
    assert loss().item() < start


@both_languages
def test_finite_difference_needs_a_closure_and_wide_parameters(language: str) -> None:
    p = leaf([1.0])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"finite_difference.*needs a closure"):
        make(language, [p], hvp="finite_difference").step()
    q = leaf([1.0], torch.bfloat16)
    with pytest.raises(TypeError, match=r"finite_difference needs float32 or float64 parameters.*parameter 0"):
        make(language, [q], hvp="finite_difference").step(lambda: (q * q).sum())
    assert q.item() == 1.0


@both_languages
def test_finite_difference_replays_dropout_and_restores_parameters(language: str) -> None:
    """The shifted evaluations see the same masks, and a closure that fails there leaves the exact parameters."""
    model, x = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 1)).double(), randn(8, 6)
    optimizer = make(language, model.parameters(), hvp="finite_difference")
    for _ in range(3):
        optimizer.step(lambda: (model(x) ** 2).mean())
    # the loss is quadratic in the last bias: curvature exactly 2 if the masks are equal
    bias = make(language, [model[2].bias], hvp="finite_difference")
    bias.step(lambda: (model(x) ** 2).mean())
    v_hat = state(bias)["exp_hessian_diag_sq"] / (1 - 0.999)
    assert v_hat.sqrt().item() == pytest.approx(2.0, rel=1e-6)

    calls: list[int] = []

    def fails_later() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("third evaluation")
        return (model(x) ** 2).mean()

    before = bits([list(model.parameters()), optimizer.state_dict()])
    with pytest.raises(KeyError, match="third evaluation"):
        optimizer.step(fails_later)
    assert bits([list(model.parameters()), optimizer.state_dict()]) == before


def test_convolutions_and_batch_norm_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 2), nn.LayerNorm(2)
    )
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 2
    model = model.to(memory_format=torch.channels_last)
    optimizer = AdaHessian(model.parameters(), linear_averaging="row")
    losses = [optimizer.step(lambda: F.cross_entropy(model(x), y)).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert list(optimizer.state[model[0].weight]["exp_hessian_diag_sq"].shape) == [4, 1, 1, 1]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", BIT_OPTIONS, ids=str)
def test_cuda_equals_cpu_to_the_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A hundred updates from given gradients and Hessian diagonals; mixed devices in one optimizer are bucketed."""
    start = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(1030,), (3, 35), (2, 2050), (3, 2, 3, 3)])]
    cpu, gpu = [leaf(s, dtype) for s in start], [s.cuda().requires_grad_() for s in start]
    alone, mixed = AdaHessian(cpu, **options), AdaHessian([*gpu, extra := leaf([1.0])], **options)
    for t in range(100):
        hessian = [randn(*s.shape, seed=9 * t + i, dtype=dtype) for i, s in enumerate(start)]
        for i, (p, q) in enumerate(zip(cpu, gpu, strict=True)):
            p.grad = randn(*p.shape, seed=7 * t + i, dtype=dtype)
            q.grad = p.grad.cuda()
        extra.grad = torch.ones_like(extra)
        alone.step(hessian=hessian)
        mixed.step(hessian=[*(h.cuda() for h in hessian), None])
    assert bits(cpu) == bits(gpu)
    assert mixed.skipped_steps.device.type == "cuda"


@pytest.mark.cuda
def test_cuda_step_does_not_wait_for_the_device() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1)).cuda()
    x = torch.randn(8, 20, device="cuda")
    optimizer = AdaHessian(model.parameters(), linear_averaging="row", update_each=2, n_samples=2)
    optimizer.step(lambda: (model(x) ** 2).mean())  # makes the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step(lambda: (model(x) ** 2).mean())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_cuda_state_follows_the_parameter() -> None:
    """model.to(device) after construction, and a CPU state_dict into a CUDA optimizer."""
    model, loss = mlp()
    optimizer = AdaHessian(model.parameters(), update_each=3)
    for _ in range(2):
        optimizer.step(lambda: loss())
    saved = copy.deepcopy(optimizer.state_dict())
    gpu = copy.deepcopy(model).cuda()
    x, y = randn(10, 5, seed=1).cuda(), randn(10, 3, seed=2).cuda()
    other = AdaHessian(gpu.parameters())
    other.load_state_dict(saved)
    for _ in range(4):
        optimizer.step(lambda: loss())
        other.step(lambda: F.mse_loss(gpu(x), y))
    for p, q in zip(model.parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-9, atol=1e-11)
    model.cuda()
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert all(v.is_cuda for k, v in optimizer.state[model[0].weight].items() if k != "global_calls")
