"""Data parallelism over Gloo: 2 and 4 processes that each see a part of the batch against one that sees all of it.

``test_bug_1`` in effect: gradient and Hz are averaged before anything that is not linear, and the average is used.
"""

from __future__ import annotations

import copy
import faulthandler
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import _C
from torch_ext.nn import eggroll_convert
from torch_ext.optim import MFAC, AdaHessian, Eggroll, MeZO
from torch_ext.testing import bits

ROWS, STEPS = 12, 7
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "row, lazy": {"linear_averaging": "row", "update_each": 3, "n_samples": 2},
    "signed mean": {"linear_averaging": "row", "averaging": "signed_mean"},
    "finite difference": {"hvp": "finite_difference"},
    "micro-batches": {},
}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(ROWS, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    return x.to(dtype), y.to(dtype)


def train(kind: str, rows: slice, group: Any) -> list[Tensor]:
    model, (x, y) = network(), data()
    x, y = x[rows], y[rows]
    optimizer = AdaHessian(
        model[:3].parameters(), process_group=group, **OPTIONS[kind]
    )  # the last layer is not trained
    for _ in range(STEPS):
        if kind == "micro-batches":
            for part in range(len(x)):
                optimizer.accumulate(F.mse_loss(model(x[part : part + 1]), y[part : part + 1]), 1 / len(x))
            optimizer.step()
        else:
            optimizer.step(lambda: F.mse_loss(model(x), y))
    return [p.detach() for p in model.parameters()]


def run_ranks(check: Callable[..., None], world: int, folder: Path, *arguments: Any) -> None:
    store = folder / "store"
    torch.multiprocessing.spawn(start_rank, (world, str(store), check, arguments), nprocs=world)


def start_rank(rank: int, world: int, store: str, check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a crash says where
    torch.set_num_threads(1)
    meeting = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world)
    check(rank, world, *arguments)
    meeting.set(f"finished {rank}", "yes")  # nobody hangs up while another still listens
    meeting.wait([f"finished {other}" for other in range(world)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not through the teardown of Gloo and of the store, which under load has aborted a finished rank


def check_parts(rank: int, world: int) -> None:
    share = ROWS // world
    for kind in OPTIONS:
        parts = train(kind, slice(rank * share, (rank + 1) * share), dist.group.WORLD)
        whole = train(kind, slice(None), None)
        tolerance = 1e-7 if kind == "finite difference" else 1e-12
        for a, b in zip(parts, whole, strict=True):
            error = float((a - b).abs().max() / b.abs().max())
            assert error <= tolerance, f"{kind}: {error}"
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, bits(parts))
        assert all(g == gathered[0] for g in gathered), f"{kind}: the ranks have drifted apart"


@pytest.mark.parametrize("world", [2, 4])
def test_parts_equal_the_whole(world: int, tmp_path: Path) -> None:
    run_ranks(check_parts, world, tmp_path)


def check_rules(rank: int, world: int) -> None:
    group = dist.group.WORLD
    p = torch.full((2,), 1.0 + rank, dtype=torch.float64, requires_grad=True)
    q = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    # integers average without any error; dtypes are mixed; nothing of the input is written
    sent = [torch.full((3,), float(rank + 1)), torch.full((2, 2), float(rank), dtype=torch.float64)]
    kept = copy.deepcopy(sent)
    received = _C.all_reduce_mean(sent, group)
    assert bits(sent) == bits(kept)
    assert received[0].tolist() == [(world + 1) / 2] * 3
    assert received[1].tolist() == [[(world - 1) / 2] * 2] * 2
    half = _C.all_reduce_mean([torch.ones(4, dtype=torch.bfloat16)], group)
    assert half[0].dtype == torch.float32

    # one rank's infinite gradient skips the step of all
    with torch.no_grad():
        p.fill_(1.0)
    optimizer = AdaHessian([p, q], process_group=group)
    factor = float("inf") if rank == world - 1 else 1.0
    optimizer.step(lambda: (p**2).sum() * factor + (q**2).sum())
    assert optimizer.skipped_steps.item() == 1
    assert p.tolist() == [1.0, 1.0]
    optimizer.step(lambda: (p**2).sum() + (q**2).sum())
    assert p[0].item() < 1.0

    # the group is no option: not saved, not pickled, shared by deepcopy
    saved = optimizer.state_dict()
    assert "process_group" not in saved["param_groups"][0]
    assert "process_group" not in optimizer.defaults
    twin_params, twin = copy.deepcopy(([p, q], optimizer))
    assert twin.process_group is optimizer.process_group is group
    twin.step(lambda: sum((t**2).sum() for t in twin_params))

    (p, q), unpickled = pickle.loads(pickle.dumps(([p, q], optimizer)))

    def loss() -> Tensor:
        return (p**2).sum() + (q**2).sum()

    assert unpickled.process_group is None
    before = bits([p, q])
    for broken in (unpickled, copy.deepcopy(([p, q], unpickled))[1], pickle.loads(pickle.dumps(unpickled))):
        assert broken.process_group is None
    with pytest.raises(RuntimeError, match=r"was distributed when it was pickled: set opt\.process_group"):
        unpickled.step(loss)
    assert bits([p, q]) == before
    unpickled.process_group = group
    unpickled.step(loss)
    unpickled.process_group = None  # from here on it runs alone
    unpickled.step(loss)
    assert p[0].item() < 1.0


def test_rules(tmp_path: Path) -> None:
    run_ranks(check_rules, 2, tmp_path)


def check_averaged_by_ddp(rank: int, world: int) -> None:
    """Between refreshes gradients that DistributedDataParallel has averaged may be used as they are."""
    x, y = data()
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    model, other = network(), network()
    wrapped = nn.parallel.DistributedDataParallel(other)
    a = AdaHessian(model.parameters(), update_each=100, process_group=dist.group.WORLD)
    b = AdaHessian(other.parameters(), update_each=100, process_group=dist.group.WORLD)
    a.step(lambda: F.mse_loss(model(x[share]), y[share]))
    b.step(lambda: F.mse_loss(other(x[share]), y[share]))
    for _ in range(3):
        a.step(lambda: F.mse_loss(model(x[share]), y[share]))
        b.zero_grad()
        F.mse_loss(wrapped(x[share]), y[share]).backward()
        b.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_gradients_averaged_by_ddp_stay_right(tmp_path: Path) -> None:
    run_ranks(check_averaged_by_ddp, 2, tmp_path)


# ---- M-FAC: every process keeps a slice of the window's columns; only the products of the rows are added up

MFAC_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.05},
    "heavy ball, decoupled decay": {
        "momentum": 0.5,
        "dampening": 0.0,
        "weight_decay": 0.05,
        "decoupled_weight_decay": True,
    },
    "warm-up": {"warmup_scaling": True, "warmup_steps": 2},
    "per group": {"blocks": "per_group"},
    "float32": {"window_format": "float32"},
    "bfloat16": {"window_format": "bfloat16", "error_feedback": True},
    "int8": {"window_format": "int8"},
    "topk": {"window_format": "topk", "topk": 0.1},
}
#: A narrow window rounds gradients that differ in their last bits to values that differ in theirs.
MFAC_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "int8": 3e-2, "topk": 3e-2}


def wide_network() -> nn.Module:
    """2,471 parameters: slices of 2 and 4 processes cut tiles and parameters in the middle."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 97), nn.Tanh(), nn.Linear(97, 19), nn.Tanh(), nn.Linear(19, 3), nn.Linear(3, 3)
    ).double()


def train_mfac(kind: str, rows: slice, group: Any, steps: int = 9) -> tuple[list[Tensor], MFAC]:
    model, (x, y) = wide_network(), data()
    x, y = x[rows], y[rows]
    trained = [*model[:5].parameters()]  # the last layer is not trained
    options = {"lr": 0.02, "num_grads": 4, "damping": 0.05, "window_format": "float64", **MFAC_OPTIONS[kind]}
    optimizer = MFAC([{"params": trained[:2]}, {"params": trained[2:], "lr": 0.01}], process_group=group, **options)
    for _ in range(steps):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    return [p.detach() for p in model.parameters()], optimizer


def check_mfac_parts(rank: int, world: int) -> None:
    share = ROWS // world
    for kind in MFAC_OPTIONS:
        parts, optimizer = train_mfac(kind, slice(rank * share, (rank + 1) * share), dist.group.WORLD)
        whole, single = train_mfac(kind, slice(None), None)
        assert optimizer.window_count == single.window_count == 4
        for a, b in zip(parts, whole, strict=True):
            error = float((a - b).abs().max() / b.abs().max())
            assert error <= MFAC_TOLERANCE.get(kind, 1e-12), f"{kind}: {error}"
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, bits(parts))
        assert all(g == gathered[0] for g in gathered), f"{kind}: the ranks have drifted apart"


@pytest.mark.parametrize("world", [2, 4])
def test_mfac_parts_equal_the_whole(world: int, tmp_path: Path) -> None:
    run_ranks(check_mfac_parts, world, tmp_path)


def mfac_on_integers(share: slice, world: int, group: Any) -> tuple[list[Tensor], MFAC]:
    """Gradients that are small integers: means, products and their sums are exact in any order."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randint(-3, 4, (12, 4, 40_000), generator=generator).double()
    p, q = (
        torch.zeros(31_000, dtype=torch.float64, requires_grad=True),
        torch.zeros(9000, dtype=torch.float64, requires_grad=True),
    )
    optimizer = MFAC([p, q], lr=0.5, num_grads=5, damping=0.5, window_format="float64", process_group=group)
    for rows in table:
        mean = rows[share].mean(0)
        p.grad, q.grad = mean[:31_000].clone(), mean[31_000:].clone()
        optimizer.step()
    return [p.detach(), q.detach()], optimizer


def check_mfac_integers(rank: int, world: int) -> None:
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    parts, optimizer = mfac_on_integers(share, world, dist.group.WORLD)
    whole, single = mfac_on_integers(slice(None), world, None)
    assert bits(parts) == bits(whole)
    assert optimizer.memory_bytes < single.memory_bytes * (1.2 / world)  # each holds its part of the columns


@pytest.mark.parametrize("world", [2, 4])
def test_mfac_on_integers_has_the_bits_of_one_process(world: int, tmp_path: Path) -> None:
    run_ranks(check_mfac_integers, world, tmp_path)


def check_mfac_rules(rank: int, world: int) -> None:
    group = dist.group.WORLD
    start = torch.linspace(-1.0, 1.0, 3000, dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.1, "num_grads": 3, "damping": 0.1, "momentum": 0.5, "process_group": group}
    p = start.clone().requires_grad_()
    optimizer = MFAC([p], **options)

    def step(optimizer: MFAC, p: Tensor, t: int, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(100 * t + rank)
        p.grad = torch.randn(3000, generator=generator, dtype=torch.float64) * factor
        optimizer.step()

    for t in range(5):
        step(optimizer, p, t)

    # one rank's infinite gradient skips the step of all: parameters, momentum, window
    before = bits(p)
    step(optimizer, p, 5, float("inf") if rank == world - 1 else 1.0)
    assert int(optimizer.skipped_steps) == 1
    assert bits(p) == before

    # a state_dict holds this rank's part and goes on with the same bits in the same group
    saved = copy.deepcopy(optimizer.state_dict())
    q = p.detach().clone().requires_grad_()
    resumed = MFAC([q], **options)
    resumed.load_state_dict(saved)
    twin_p, twin = copy.deepcopy((p, optimizer))
    assert twin.process_group is group
    for t in range(6, 10):
        for o, x in ((optimizer, p), (resumed, q), (twin, twin_p)):
            step(o, x, t)
    assert bits(p) == bits(q) == bits(twin_p)

    # a parameter without a gradient on any rank is left alone
    a, b = start.clone().requires_grad_(), start.clone().requires_grad_()
    other = MFAC([a, b], **options)
    for t in range(4):
        b.grad = None
        step(other, a, t)
    assert torch.equal(b.detach(), start)
    assert not torch.equal(a.detach(), start)

    unpickled_p, unpickled = pickle.loads(pickle.dumps((p, optimizer)))
    with pytest.raises(RuntimeError, match=r"was distributed when it was pickled: set opt\.process_group"):
        step(unpickled, unpickled_p, 10)


def test_mfac_rules(tmp_path: Path) -> None:
    run_ranks(check_mfac_rules, 2, tmp_path)


# ---- populations: values are gathered, and every process makes the same update

EGGROLL_CASES: dict[str, dict[str, Any]] = {
    "rademacher": {"noise": "rademacher"},
    "binomial16, ranks": {"noise": "binomial16", "shaping": "centered_rank"},
    "binomial64, sign": {"noise": "binomial64", "shaping": "sign"},
    "rademacher, sharded": {"noise": "rademacher", "shaping": "sign", "momentum": 0.5},
    "gaussian": {},
}


def evolve(kind: str, group: Any) -> tuple[list[Tensor], Eggroll]:
    model, (x, y) = eggroll_convert(network(torch.float32)), data(torch.float32)
    optimizer = Eggroll(
        model.parameters(),
        lr=1.0,
        sigma=0.1,
        population=24,
        chunk_members=4,
        process_group=group,
        **EGGROLL_CASES[kind],
    )
    optimizer.sharded_update = "sharded" in kind
    for _ in range(STEPS):

        def values(pop: Any) -> Tensor:
            with pop.applied_to(model):
                out = model(x.expand(len(pop), *x.shape))
            return ((out - y) ** 2).mean((1, 2))

        optimizer.step(values)
    return [p.detach().clone() for p in model.parameters()], optimizer


def check_populations(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for kind in EGGROLL_CASES:
        parts, optimizer = evolve(kind, group)
        alone, _ = evolve(kind, None)
        if kind == "gaussian":
            for a, b in zip(parts, alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert bits(parts) == bits(alone), kind
        optimizer.check_parameters()
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, list(optimizer.members))
        assert [i for members in gathered for i in members] == list(range(24))

    # a process that has drifted is found, by all
    p = torch.zeros(3, requires_grad=True)
    optimizer = Eggroll([p], population=8, process_group=group)
    optimizer.check_parameters()
    with torch.no_grad():
        p[1] = 1e-8 * (rank == world - 1)
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \[3\]\) differs between process"):
        optimizer.check_parameters()

    # one process's value that is not finite stops all of them, with trits too
    for shaping in ("zscore", "sign"):
        p = torch.zeros(3, requires_grad=True)
        optimizer = Eggroll([p], population=8, shaping=shaping, process_group=group)
        bad = float("nan") if rank == 0 else 1.0
        with pytest.raises(ValueError, match="infinite or NaN"):
            optimizer.step(lambda pop, bad=bad: torch.full((len(pop),), bad))
        assert not bool(p.any())

    # more processes than pairs
    p = torch.zeros(3, requires_grad=True)
    optimizer = Eggroll([p], lr=1.0, population=2, process_group=group)
    optimizer.step(lambda pop: torch.arange(len(pop), dtype=torch.float32) + pop.begin)
    optimizer.check_parameters()
    assert bool(p.any())


@pytest.mark.parametrize("world", [2, 4])
def test_11_populations_on_any_number_of_processes(world: int, tmp_path: Path) -> None:
    run_ranks(check_populations, world, tmp_path)


def check_mezo(rank: int, world: int) -> None:
    share = ROWS // world
    results = []
    for group, rows in ((dist.group.WORLD, slice(rank * share, (rank + 1) * share)), (None, slice(None))):
        model, (x, y) = network(), data()
        optimizer = MeZO(model.parameters(), lr=0.01, process_group=group)
        for _ in range(STEPS):
            optimizer.step(lambda model=model, x=x[rows], y=y[rows]: F.mse_loss(model(x), y))
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, bits(results[0]))
    assert all(g == gathered[0] for g in gathered)


def test_mezo_parts_equal_the_whole(tmp_path: Path) -> None:
    run_ranks(check_mezo, 2, tmp_path)
