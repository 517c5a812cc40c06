"""M-FAC, the compiled optimizer in both languages; what it shares with every optimizer is in test_common.py.
``test_<nn>_...`` is acceptance test n of M-FAC (arXiv:2107.03356) here; ``test_bug_<n>_...`` is a defect of another
implementation that this one must not have.
"""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.optim import MFAC
from torch_ext.reference.curvature import dense_fisher, mfac_recursion
from torch_ext.reference.optim import MFACReference
from torch_ext.testing import LANGUAGES, bits, cpp_optimizer

ROOT = Path(__file__).resolve().parents[3]
both_languages = pytest.mark.parametrize("language", LANGUAGES)
F64: dict[str, Any] = {"window_format": "float64"}


def make(language: str, params: Any, **options: Any) -> Any:
    params = list(params)
    return MFAC(params, **options) if language == "python" else cpp_optimizer("MFAC", params, **options)


def leaf(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).detach().clone().requires_grad_()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


def take_step(optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """One step with these gradients and no closure."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


def set_lr(language: str, optimizer: Any, lr: float) -> None:
    if language == "python":
        optimizer.param_groups[0]["lr"] = lr
    else:
        optimizer.set_option(0, "lr", lr)


def everything(params: Any, optimizer: Any) -> Any:
    return bits([list(params), optimizer.state_dict()["state"]])


def lasting(params: Any, optimizer: Any) -> Any:
    """Bits of all that a step must leave alone if it is rejected: not the counts of rejected rows, and not the spare
    slot of the window (with its half of the error buffer), into which a row is encoded before it is judged.
    """
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for entry in state.values():
        entry.pop("global_skipped", None)
        if "window_ring" not in entry:
            continue
        ring = entry["window_ring"]
        for name in ("window_rows", "window_scales", "window_indices"):
            if entry[name].numel() > 0:
                entry[name][:, ring[1]] = 0
        if entry["window_error"].numel() > 0:
            entry["window_error"][1 - ring[8] % 2] = 0
        ring[4:6] = 0
    return bits([list(params), state])


# ---- the numbered acceptance tests


@both_languages
@pytest.mark.parametrize("window_format", ["float64", "float32", "bfloat16"])
def test_01_hand_case(language: str, window_format: str) -> None:
    x = leaf([0.0, 0.0])
    optimizer = make(language, [x], lr=0.0, num_grads=2, damping=0.5, window_format=window_format)
    take_step(optimizer, [x], [torch.tensor([1.0, 0.0], dtype=torch.float64)])
    set_lr(language, optimizer, 1.0)
    take_step(optimizer, [x], [torch.tensor([1.0, 1.0], dtype=torch.float64)])
    assert error(-x, torch.tensor([0.4, 0.8], dtype=torch.float64)) <= (1e-15 if window_format == "float64" else 1e-7)


@both_languages
@pytest.mark.parametrize(("m", "d", "damping"), [(32, 100, 1e-5), (32, 20, 1e-3), (64, 300, 1e-6)])
def test_02_the_dense_solve(language: str, m: int, d: int, damping: float) -> None:
    rows, x = randn(m, d), leaf(torch.zeros(d))
    optimizer = make(language, [x], lr=1.0, num_grads=m, damping=damping, **F64)
    for row in rows:
        with torch.no_grad():
            x.zero_()
        take_step(optimizer, [x], [row])
    dense = dense_fisher(rows, damping)
    k = m * damping * torch.eye(m, dtype=torch.float64) + rows @ rows.t()
    bound = 20 * max(float(torch.linalg.cond(dense)), float(torch.linalg.cond(k))) * 2.0**-52
    assert error(-x, torch.linalg.solve(dense, rows[-1])) <= bound
    assert error(-x, mfac_recursion(rows, rows[-1], damping)) <= 2 * bound


def test_04_no_cancellation() -> None:
    rows = randn(300, 4000)
    rows = (rows * (10 / rows.norm(dim=1, keepdim=True))).float()
    x = leaf(torch.zeros(4000), torch.float32)
    optimizer = MFAC([x], lr=1.0, num_grads=300, damping=1e-6)
    for row in rows:
        with torch.no_grad():
            x.zero_()
        take_step(optimizer, [x], [row])
    wide = rows.double()
    k = 300 * 1e-6 * torch.eye(300, dtype=torch.float64) + wide @ wide.t()
    e = torch.zeros(300, dtype=torch.float64)
    e[-1] = 300
    assert error(-x, wide.t() @ torch.linalg.solve(k, e)) <= 1e-5


@both_languages
def test_08_warmup_scaling(language: str) -> None:
    m, d, damping = 16, 40, 1e-2
    rows, x = randn(10, d), leaf(torch.zeros(d))
    optimizer = make(language, [x], lr=1.0, num_grads=m, damping=damping, warmup_scaling=True, **F64)
    for t, row in enumerate(rows, 1):
        with torch.no_grad():
            x.zero_()
        take_step(optimizer, [x], [row])
        assert error(-x, torch.linalg.solve(dense_fisher(rows[:t], damping * m / t), row)) <= 1e-12


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with open(ROOT / "examples" / "data" / "digits.csv", newline="") as file:
        rows = list(csv.reader(file))
    if not rows[0][0].isdigit():
        rows = rows[1:]
    data = torch.tensor([[float(v) for v in row] for row in rows])
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
    x, y = data[:, :64] / 16, data[:, 64].long()
    return x[:1400], y[:1400], x[1400:], y[1400:]


def train_digits(seed: int, language: str = "python", *, to_zero: bool = False, **options: Any) -> list[Tensor]:
    """Train loss and test accuracy after each of 20 epochs in batches of 100; ``to_zero``: the rate falls linearly."""
    x, y, test_x, test_y = digits(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = make(language, model.parameters(), lr=1e-2, num_grads=64, damping=1e-3, **options)
    losses, accuracies = [], []
    for epoch in range(20):
        for i, batch in enumerate(torch.randperm(1400).split(100)):
            if to_zero:
                set_lr(language, optimizer, 1e-2 * (1 - (14 * epoch + i) / 280))
            optimizer.step(lambda batch=batch: F.cross_entropy(model(x[batch]), y[batch]))
        with torch.no_grad():
            losses.append(F.cross_entropy(model(x), y).item())
            accuracies.append((model(test_x).argmax(1) == test_y).double().mean().item())
    return [torch.tensor(losses), torch.tensor(accuracies)]


def test_11_digits() -> None:
    """Medians of the last five epochs: at this rate, lr / damping = 10, an epoch in about fifty ends in a burst (train
    loss 0.03 to 0.13, gone an epoch later), and which one it is depends on the last bit of a matrix product.
    """
    runs = [train_digits(seed) for seed in range(3)]
    for loss, accuracy in runs:
        assert loss[-5:].median() <= 0.03, runs
        assert accuracy[-5:].median() >= 0.96, runs
    assert bits(train_digits(1, "cpp")) == bits(runs[1])


@pytest.mark.parametrize("window_format", ["float32", "bfloat16", "int8"])
def test_11_digits_with_a_falling_rate(window_format: str) -> None:
    """There are no bursts then: the last epoch itself counts."""
    for seed in range(3):
        loss, accuracy = train_digits(seed, to_zero=True, window_format=window_format)
        assert loss[-1] <= 0.03
        assert accuracy[-1] >= 0.96


def test_12_breast_cancer() -> None:
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float64)
    x, y = (x - x.mean(0)) / x.std(0, correction=0), torch.tensor(data.target, dtype=torch.float64)

    def objective(w: Tensor, rows: Any = slice(None)) -> Tensor:
        return F.binary_cross_entropy_with_logits(x[rows] @ w, y[rows]) + 0.005 * (w * w).sum()

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        w = leaf(torch.zeros(30))
        optimizer = MFAC([w], lr=1e-2, num_grads=32, damping=1e-2)
        for t in range(500):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t / 500)
            batch = torch.randint(len(y), (64,), generator=generator)
            optimizer.step(lambda w=w, batch=batch: objective(w, batch))
        assert float(objective(w.detach())) - 0.10241656575570418 <= 1e-3


NONFINITE: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"window_format": "float64"},
    "bfloat16": {"window_format": "bfloat16", "error_feedback": True},
    "int8": {"window_format": "int8", "momentum": 0.9},
    "topk": {"window_format": "topk", "topk": 0.1},
    "decay": {"weight_decay": 0.1, "momentum": 0.5, "dampening": 0.0},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "per group": {"blocks": "per_group", "momentum": 0.9},
}


@both_languages
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", NONFINITE)
def test_13_a_nonfinite_gradient_changes_nothing(language: str, kind: str, bad: float) -> None:
    """Window, factor, momentum and parameters keep their bits; what follows is as if nothing had been."""
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 4, "damping": 0.1, **NONFINITE[kind]}
    runs = []
    for disturbed in (False, True):
        params = [leaf(randn(30, 40)), leaf(randn(70, seed=1))]
        optimizer = make(language, [{"params": [p]} for p in params], **options)
        skips = 0
        for t in range(11):
            grads = [randn(30, 40, seed=2 * t + 5), randn(70, seed=2 * t + 6)]
            if disturbed and t in (1, 3, 4, 7):
                before = lasting(params, optimizer)
                for index in range(2):
                    broken: list[Tensor | None] = [g.clone() for g in grads]
                    target = broken[index]
                    assert target is not None
                    target.view(-1)[-1] = bad
                    take_step(optimizer, params, broken)
                    skips += 1
                    assert lasting(params, optimizer) == before
                    assert int(optimizer.skipped_steps) == skips
            take_step(optimizer, params, grads)  # type: ignore[arg-type]
        runs.append(lasting(params, optimizer))
    assert runs[0] == runs[1]


@both_languages
def test_13_a_first_gradient_that_is_not_finite(language: str) -> None:
    x = leaf(randn(5))
    optimizer = make(language, [x], lr=0.1, num_grads=4, damping=0.1)
    before = bits(x)
    take_step(optimizer, [x], [torch.full((5,), math.nan, dtype=torch.float64)])
    assert bits(x) == before
    assert int(optimizer.skipped_steps) == 1
    y = leaf(randn(5))
    other = make(language, [y], lr=0.1, num_grads=4, damping=0.1)
    for s in range(6):
        take_step(optimizer, [x], [randn(5, seed=s)])
        take_step(other, [y], [randn(5, seed=s)])
    assert bits(x) == bits(y)


RESUME: dict[str, dict[str, Any]] = {
    **NONFINITE,
    "warm-up": {"warmup_scaling": True, "warmup_steps": 9},
    "topk momentum": {"window_format": "topk", "topk": 0.05, "momentum": 0.9},
}


@pytest.mark.parametrize("stop", [1, 4, 7, 30])
@pytest.mark.parametrize("kind", RESUME)
def test_13_resume(kind: str, stop: int, tmp_path: Path) -> None:
    """Stopped before, at and after the window is full; saved in either language, resumed in either: the same bits."""
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 5, "damping": 0.05, **RESUME[kind]}

    def grads(t: int) -> list[Tensor | None]:
        return [randn(30, 40, seed=2 * t + 5), randn(70, seed=2 * t + 6)]

    straight = [leaf(randn(30, 40)), leaf(randn(70, seed=1))]
    optimizer = make("python", [{"params": [p]} for p in straight], **options)
    for t in range(stop + 12):
        take_step(optimizer, straight, grads(t))
    expected = everything(straight, optimizer)
    for first in LANGUAGES:
        for second in LANGUAGES:
            params = [leaf(randn(30, 40)), leaf(randn(70, seed=1))]
            groups = [{"params": [p]} for p in params]
            optimizer = make(first, groups, **options)
            for t in range(stop):
                take_step(optimizer, params, grads(t))
            path = tmp_path / f"{first}.pt"
            if first == "cpp":
                optimizer.save_state_dict(str(path))
            else:
                torch.save(optimizer.state_dict(), path)
            optimizer = make(second, groups)
            if second == "cpp":
                optimizer.load_state_dict_file(str(path))
            else:
                optimizer.load_state_dict(torch.load(path, weights_only=True))
            for t in range(stop, stop + 12):
                take_step(optimizer, params, grads(t))
            assert everything(params, optimizer) == expected, (first, second)


def test_13_without_the_window_it_starts_empty() -> None:
    x = leaf(randn(50))
    optimizer = MFAC([x], lr=0.1, num_grads=4, damping=0.1, momentum=0.9)
    for s in range(6):
        take_step(optimizer, [x], [randn(50, seed=s)])
    whole, small = optimizer.state_dict(), optimizer.state_dict(include_window=False)
    size = lambda d: sum(v.numel() for s in d["state"].values() for v in s.values())  # noqa: E731
    assert size(small) < 200 < size(whole)
    y = leaf(x)
    other = MFAC([y], lr=0.1, num_grads=4, damping=0.1, momentum=0.9)
    other.load_state_dict(small)
    assert other.window_count == 0
    assert optimizer.window_count == 4
    g = randn(50, seed=9)
    take_step(other, [y], [g])
    u = 4 * g / (4 * 0.1 + g @ g)
    buffer = small["state"][0]["momentum_buffer"] * 0.9 + u * 0.1
    torch.testing.assert_close(y.detach(), x.detach() - 0.1 * buffer, rtol=1e-6, atol=1e-7)
    assert other.window_count == 1


@both_languages
def test_13_damping_changes_as_if_it_had_always_been(language: str) -> None:
    """The rows stay, the factor is made anew: within its rounding the update is that of a fresh object."""
    rows = [randn(60, seed=s) for s in range(9)]
    updates = []
    for initial in (0.5, 0.02):
        x = leaf(torch.zeros(60))
        optimizer = make(language, [x], lr=1.0, num_grads=6, damping=initial, **F64)
        for t, row in enumerate(rows):
            if t == 7 and initial == 0.5:
                if language == "python":
                    optimizer.set_damping(0.02)
                else:
                    optimizer.set_option(0, "damping", 0.02)
            with torch.no_grad():
                x.zero_()
            take_step(optimizer, [x], [row])
        updates.append(-x.detach())
        assert optimizer.state_dict()["param_groups"][0]["damping"] == 0.02
    assert error(updates[0], updates[1]) <= 1e-13


@both_languages
def test_13_undefined_gradients(language: str) -> None:
    """A zero segment, and the parameter, its momentum and its count stay as they are."""
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 3, "damping": 0.2, "weight_decay": 0.1, "momentum": 0.5, **F64}
    start = [randn(4, 5), randn(6, seed=1), randn(3, seed=2)]
    ours, theirs = [leaf(p) for p in start], [leaf(p) for p in start]
    optimizer, expected = make(language, ours, **options), MFACReference(theirs, **options)
    for t in range(8):
        grads: list[Tensor | None] = [randn(4, 5, seed=3 * t), randn(6, seed=3 * t + 1), randn(3, seed=3 * t + 2)]
        grads[t % 3] = None
        before = bits(ours[t % 3])
        take_step(optimizer, ours, grads)
        expected.step(grads)
        assert bits(ours[t % 3]) == before
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    state = optimizer.state_dict()["state"]
    assert [float(state[i]["step"]) for i in range(3)] == [float(p.state["step"]) for p in expected.params]
    before = everything(ours, optimizer)
    take_step(optimizer, ours, [None, None, None])
    assert everything(ours, optimizer) == before
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("window_format", ["float32", "float64", "bfloat16", "int8", "topk"])
def test_13_thread_counts_give_the_same_bits(window_format: str) -> None:
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [leaf(randn(300, 400), torch.float32), leaf(randn(70_001, seed=1), torch.bfloat16)]
        optimizer = MFAC(params, lr=0.1, num_grads=5, damping=0.1, momentum=0.9, window_format=window_format)
        for t in range(7):
            take_step(optimizer, params, [randn(300, 400, seed=t).float(), randn(70_001, seed=t).bfloat16()])
        outcomes.append(everything(params, optimizer))
    assert outcomes[0] == outcomes[1] == outcomes[2]


# ---- against the reference

OPTIONS: dict[str, dict[str, Any]] = {
    "float64": {},
    "float32": {"window_format": "float32"},
    "bfloat16": {"window_format": "bfloat16"},
    "bfloat16 feedback": {"window_format": "bfloat16", "error_feedback": True},
    "int8": {"window_format": "int8"},
    "int8 feedback": {"window_format": "int8", "error_feedback": True},
    "topk": {"window_format": "topk", "topk": 0.05},
    "average": {"momentum": 0.8},
    "heavy ball": {"momentum": 0.8, "dampening": 0.0},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.5},
    "warm-up": {"warmup_scaling": True, "warmup_steps": 3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "per group": {"blocks": "per_group"},
}


@both_languages
@pytest.mark.parametrize("kind", OPTIONS)
def test_follows_the_reference(language: str, kind: str) -> None:
    """Two groups that differ in all that may differ, twelve steps, a window of five."""
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 5, "damping": 0.1, **F64, **OPTIONS[kind]}
    start = [randn(30, 40), randn(70, seed=1), randn(3, 5, seed=2), randn(seed=3)]
    other = {"lr": 0.05, "momentum": 0.3, "weight_decay": 0.02}

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], **other}]

    ours, theirs = [leaf(p) for p in start], [leaf(p) for p in start]
    optimizer, expected = make(language, groups(ours), **options), MFACReference(groups(theirs), **options)
    tolerance = 1e-12 if options["window_format"] == "float64" else 3e-6
    for t in range(12):
        grads: list[Tensor | None] = [randn(*p.shape, seed=10 * t + i) for i, p in enumerate(start)]
        take_step(optimizer, ours, grads)
        expected.step(grads)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    state = optimizer.state_dict()["state"]
    for i, p in enumerate(expected.params):
        assert float(state[i]["step"]) == float(p.state["step"])
        if p.options.momentum != 0:
            buffer = p.state["momentum_buffer"]
            assert state[i]["momentum_buffer"].dtype == buffer.dtype
            torch.testing.assert_close(state[i]["momentum_buffer"], buffer, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", OPTIONS)
def test_both_languages_give_the_same_bits(kind: str) -> None:
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 5, "damping": 0.1, **OPTIONS[kind]}
    outcomes = []
    for language in LANGUAGES:
        params = [leaf(randn(30, 40), torch.float32), leaf(randn(70, seed=1)), leaf(randn(9, seed=2), torch.bfloat16)]
        optimizer = make(language, [{"params": params[:1]}, {"params": params[1:], "lr": 0.2}], **options)
        for t in range(12):
            take_step(optimizer, params, [randn(*p.shape, seed=3 * t + i).to(p.dtype) for i, p in enumerate(params)])
        outcomes.append((bits(params), bits(optimizer.state_dict())))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_half_precision_parameters(dtype: torch.dtype, momentum: float) -> None:
    """Window, momentum and u are float32; only the parameter is rounded, once a step."""
    options: dict[str, Any] = {
        "lr": 0.1,
        "num_grads": 4,
        "damping": 0.1,
        "momentum": momentum,
        "window_format": "float32",
    }
    ours, theirs = leaf(randn(50), dtype), leaf(randn(50), dtype)
    optimizer, expected = MFAC([ours], **options), MFACReference([theirs], **options)
    for t in range(8):
        g = randn(50, seed=t).to(dtype)
        take_step(optimizer, [ours], [g])
        expected.step([g])
        ulp = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=ulp, atol=1e-6)
        assert ours.dtype == dtype
    if momentum:
        assert optimizer.state_dict()["state"][0]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
@pytest.mark.parametrize("own_gradient", [False, True])
def test_layouts_give_the_same_bits(layout: str, own_gradient: bool) -> None:
    outcomes = []
    for kind in ("contiguous", layout):
        start, wide = randn(6, 4, 3, 5), torch.zeros(6, 4, 3, 11, dtype=torch.float64)
        if kind == "channels_last":
            p = start.contiguous(memory_format=torch.channels_last)
        elif kind == "transposed":
            p = start.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        elif kind == "sliced":
            p = wide[..., 1::2]
            p.copy_(start)
        else:
            p = start
        p = p.detach().requires_grad_()
        strides = p.stride()
        optimizer = MFAC([p], lr=0.1, num_grads=4, damping=0.1, momentum=0.5, weight_decay=0.1)
        for t in range(6):
            g = randn(6, 4, 3, 5, seed=t)
            p.grad = torch.empty_like(p).copy_(g) if own_gradient else g
            optimizer.step()
        assert p.stride() == strides
        assert kind != "sliced" or float(wide[..., ::2].abs().sum()) == 0.0
        outcomes.append(everything([p], optimizer))
    assert outcomes[0] == outcomes[1]


# ---- what else it offers


def test_precondition_is_the_dense_inverse() -> None:
    params = [leaf(randn(3, 4)), leaf(randn(5, seed=1))]
    optimizer = MFAC(params, lr=0.1, num_grads=4, damping=0.3, **F64)
    rows = []
    for t in range(6):
        grads = [randn(3, 4, seed=t), randn(5, seed=t + 50)]
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
        take_step(optimizer, params, list(grads))
    x = [randn(3, 4, seed=90), randn(5, seed=91)]
    y = optimizer.precondition(x)
    assert [t.shape for t in y] == [t.shape for t in x]
    expected = torch.linalg.solve(dense_fisher(torch.stack(rows[-4:]), 0.3), torch.cat([t.reshape(-1) for t in x]))
    assert error(torch.cat([t.reshape(-1) for t in y]), expected) <= 1e-12
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.precondition(x[:1])


@both_languages
def test_closures(language: str) -> None:
    """(bug 5) A closure may return the loss, or call backward as in torch; without one .grad is read."""
    outcomes = []
    for form in ("returns", "backward", "grad"):
        x = leaf(randn(10))
        optimizer = make(language, [x], lr=0.1, num_grads=4, damping=0.1)

        def loss(x: Tensor = x) -> Tensor:
            return (x**4).sum() + (x * x).sum()

        def backward(x: Tensor = x) -> Tensor:
            x.grad = None
            value = loss(x)
            value.backward()
            return value

        for _ in range(6):
            if form == "grad":
                backward()
                assert optimizer.step() is None
            else:
                value = optimizer.step(loss if form == "returns" else backward)
                assert not value.requires_grad
        outcomes.append(everything([x], optimizer))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_memory_is_reported() -> None:
    params = [leaf(randn(1000, 100), torch.float32)]
    sizes = {}
    for window_format in ("float64", "float32", "bfloat16", "int8", "topk"):
        optimizer = MFAC(params, num_grads=16, window_format=window_format)
        take_step(optimizer, params, [torch.ones(1000, 100)])
        sizes[window_format] = optimizer.memory_bytes
    cell = 17 * 98 * 1024
    assert 8 * cell <= sizes["float64"] <= 8.1 * cell
    assert 4 * cell <= sizes["float32"] <= 4.1 * cell
    assert 2 * cell <= sizes["bfloat16"] <= 2.1 * cell
    assert cell <= sizes["int8"] <= 1.1 * cell
    assert sizes["topk"] < sizes["int8"]


# ---- defects of other implementations


@both_languages
def test_bug_1_any_number_of_rows_on_the_cpu(language: str) -> None:
    """The published optimizer needs a GPU, and m <= 1024 in multiples of 32."""
    for m in (1, 3, 33, 1025):
        x = leaf(torch.zeros(30))
        optimizer = make(language, [x], lr=1.0, num_grads=m, damping=0.1, **F64)
        rows = randn(5, 30)
        for row in rows:
            with torch.no_grad():
                x.zero_()
            take_step(optimizer, [x], [row])
        assert error(-x, torch.linalg.solve(dense_fisher(rows[-m:], 0.1, m), rows[-1])) <= 1e-12


def test_bug_4_group_options_count() -> None:
    """Momentum and decay of one group used to hold for all."""
    a, b, c, d = (leaf(randn(5, seed=i // 2)) for i in range(4))
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 3, "damping": 0.3, "blocks": "per_group", **F64}
    optimizer = MFAC([{"params": [a], "momentum": 0.9, "weight_decay": 0.1}, {"params": [c]}], **options)
    alone = MFAC([b], **{**options, "momentum": 0.9, "weight_decay": 0.1})
    plain = MFAC([d], **options)
    for t in range(5):
        g, h = randn(5, seed=t + 10), randn(5, seed=t + 20)
        take_step(optimizer, [a, c], [g, h])
        take_step(alone, [b], [g])
        take_step(plain, [d], [h])
    assert bits(a) == bits(b)
    assert bits(c) == bits(d)


@both_languages
def test_bug_8_decoupled_decay_is_scaled_by_the_learning_rate(language: str) -> None:
    x = leaf([2.0, -4.0])
    optimizer = make(
        language, [x], lr=0.25, num_grads=3, damping=1.0, weight_decay=0.5, decoupled_weight_decay=True, **F64
    )
    take_step(optimizer, [x], [torch.zeros(2, dtype=torch.float64)])
    assert x.tolist() == [2.0 * (1 - 0.125), -4.0 * (1 - 0.125)]


@both_languages
def test_bug_heads_that_take_turns(language: str) -> None:
    """Another implementation left out missing gradients, so that the flat size changed with the head in use."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(6, 8).double(), [nn.Linear(8, 2).double(), nn.Linear(8, 3).double()]
    params = [*trunk.parameters(), *heads[0].parameters(), *heads[1].parameters()]
    optimizer = make(language, params, lr=0.05, num_grads=8, damping=0.05)
    x = randn(20, 6)

    @torch.no_grad()
    def total() -> float:
        return sum(float((head(torch.tanh(trunk(x))) ** 2).mean()) for head in heads)

    before = total()
    for t in range(60):
        head = heads[t % 2]
        for p in params:
            p.grad = None
        (head(torch.tanh(trunk(x))) ** 2).mean().backward()
        idle = bits(list(heads[1 - t % 2].parameters()))
        optimizer.step()
        assert bits(list(heads[1 - t % 2].parameters())) == idle
    assert total() < 0.05 * before


def test_bug_9_zero_weights_are_trained() -> None:
    """Another implementation took weights that start at zero for pruned ones and froze them."""
    x = leaf(torch.zeros(4))
    take_step(MFAC([x], lr=1.0, num_grads=2, damping=0.1), [x], [torch.ones(4, dtype=torch.float64)])
    assert bool((x != 0).all())


# ---- bad input


@both_languages
def test_gradients_that_cannot_be_used(language: str) -> None:
    p, q = leaf(randn(3)), leaf(randn(4))
    optimizer = make(language, [p, q], num_grads=3)
    q.grad = torch.ones(4, dtype=torch.float64).to_sparse()
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"(?i)parameter 1.*sparse|sparse.*parameter 1"):
        optimizer.step()
    z = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    z.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="complex"):
        make(language, [z], num_grads=3).step()


@both_languages
def test_a_window_that_does_not_fit(language: str) -> None:
    """The message gives the bytes and what would fit."""
    x = torch.zeros(2_000_000, requires_grad=True)
    x.grad = torch.ones_like(x)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)num_grads|window_format") as caught:
        make(language, [x], num_grads=10_000_000).step()
    assert any(word in str(caught.value) for word in ("GB", "GiB", "TB", "TiB", "bytes"))


@both_languages
@pytest.mark.parametrize("other", [{"num_grads": 6}, {"window_format": "bfloat16"}, {"window_format": "topk"}], ids=str)
def test_a_checkpoint_of_another_window(language: str, other: dict[str, Any]) -> None:
    """Options and window belong together: edited ones are refused and nothing changes."""
    x = leaf(randn(40))
    source = MFAC([x], num_grads=4, damping=0.1)
    for s in range(6):
        take_step(source, [x], [randn(40, seed=s)])
    saved = copy.deepcopy(source.state_dict())
    saved["param_groups"][0].update(other)
    optimizer = make(language, [x], num_grads=4, damping=0.1)
    take_step(optimizer, [x], [randn(40, seed=20)])
    before = everything([x], optimizer)
    with pytest.raises((ValueError, RuntimeError), match=r"MFAC|window"):
        optimizer.load_state_dict(saved)
    assert everything([x], optimizer) == before


@both_languages
def test_a_checkpoint_of_parameters_of_another_size(language: str) -> None:
    x, y = leaf(randn(40)), leaf(randn(1500))
    source = MFAC([x], num_grads=4, damping=0.1)
    take_step(source, [x], [randn(40)])
    with pytest.raises((ValueError, RuntimeError), match=r"MFAC|window"):
        make(language, [y], num_grads=4, damping=0.1).load_state_dict(source.state_dict())


# ---- the operators


def test_opcheck() -> None:
    params = [leaf(randn(30, 40), torch.float32), leaf(randn(70), torch.bfloat16)]
    optimizer = MFAC(params, lr=0.1, num_grads=3, damping=0.1, momentum=0.5)
    for t in range(4):
        take_step(optimizer, params, [randn(30, 40, seed=t).float(), randn(70, seed=t).bfloat16()])
    state = [optimizer.state[p] for p in params]
    tensors = [p.detach() for p in params]
    grads = [p.grad for p in params]
    coefficients = torch.randn(4, dtype=torch.float64)
    check = torch.library.opcheck
    for update in (None, torch.randn(1270)):
        check(
            torch.ops.torch_ext.mfac_update_.default,
            (tensors, [s["momentum_buffer"] for s in state], [s["step"] for s in state]),
            {
                "grads": grads,
                **{name: state[0][f"window_{name}"] for name in ("rows", "scales", "indices", "ring")},
                "coefficients": coefficients,
                "update": update,
                "format": "float32",
                "lr": [0.1, 0.1],
                "momentum": [0.5, 0.5],
                "dampening": [0.5, 0.5],
                "weight_decay": [0.0, 0.1],
            },
        )
    check(
        torch.ops.torch_ext.mfac_flatten.default,
        (grads, tensors),
        {"weight_decay": [0.1, 0.0], "negate": True, "grad_scale": None, "padded_numel": 2048, "format": "float32"},
    )


@pytest.mark.cuda
@pytest.mark.parametrize("kind", OPTIONS)
def test_cuda_follows_the_cpu(kind: str) -> None:
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 5, "damping": 0.1, **F64, **OPTIONS[kind]}
    here = [leaf(randn(30, 40), torch.float32), leaf(randn(70, seed=1))]
    there = [p.detach().cuda().requires_grad_() for p in here]
    a, b = (MFAC([{"params": p[:1]}, {"params": p[1:]}], **options) for p in (here, there))
    for t in range(12):
        grads = [randn(30, 40, seed=2 * t).float(), randn(70, seed=2 * t + 1)]
        take_step(a, here, list(grads))
        take_step(b, there, [g.cuda() for g in grads])
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=3e-6, atol=3e-6)


@pytest.mark.cuda
def test_cuda_step_does_not_wait_for_the_device() -> None:
    p = torch.randn(3000, device="cuda", requires_grad=True)
    optimizer = MFAC([p], lr=0.1, num_grads=4, damping=0.1, momentum=0.9)
    for _ in range(6):
        p.grad = torch.randn_like(p)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
