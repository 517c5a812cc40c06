"""Entropic transport at n = 500, eta = 1200, marginal error <= 1e-9: against POT's sweeps and regot's Newton solvers.

PYTHONPATH=. python benchmarks/ops/bench_sinkhorn_newton.py [--json FILE] [--rounds 15]

POT's ``sinkhorn_log`` does not reach the error in any reasonable time, so it is stopped after at least 20 times
ours, measured in the same run, and the error it has then is printed. Errors are the L1 errors of both marginals, of the
plan itself.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ot
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext import ops

try:
    import regot
except ImportError:  # no wheel for this platform
    regot = None

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]
TABLE_PASSES = {("random", 200): 21, ("random", 1200): 42, ("squared L2", 200): 34, ("squared L2", 1200): 50}
TABLE_PASSES |= {("L1", 200): 38, ("L1", 1200): 86}


def problems() -> dict[str, Problem]:
    """Random costs of 500 points; blobs on a 28 x 28 grid."""
    uniform = np.full(500, 1 / 500)
    line = np.arange(28) / 27
    u = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    masses = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        z = sum(np.exp(-((u - rng.random(2)) ** 2).sum(1) / (2 * 0.06**2)) for _ in range(4))
        z = z / z.sum() + 1e-4 / 784
        masses.append(z / z.sum())
    distance = np.abs(u[:, None] - u[None])
    return {
        "random": (np.random.default_rng(1).random((500, 500)), uniform, uniform),
        "squared L2": ((distance**2).sum(-1) / 2, *masses),
        "L1": (distance.sum(-1) / 2, *masses),
    }


def error_of(plan: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum())


def pot_within(problem: Problem, eps: float, seconds: float) -> tuple[float, float, int]:
    """(seconds, error, sweeps) of sinkhorn_log with enough sweeps for that time, or for an error of 1e-9."""
    cost, a, b = problem

    def run(sweeps: int) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does not converge is the result
            plan = ot.sinkhorn(a, b, cost, eps, method="sinkhorn_log", numItermax=sweeps, stopThr=1e-9)
        return time.perf_counter() - start, plan

    sweeps = max(1, round(seconds / (run(4)[0] / 4)))
    spent, plan = run(sweeps)
    while spent < seconds and error_of(plan, a, b) > 1e-9:
        sweeps = round(1.2 * sweeps) + 1
        spent, plan = run(sweeps)
    return spent, error_of(plan, a, b), sweeps


def newton_sides(problem: Problem, eps: float) -> dict[str, Callable[[], np.ndarray]]:
    cost, a, b = problem
    tensors = [torch.from_numpy(x) for x in problem]
    sides: dict[str, Callable[[], np.ndarray]] = {
        "auto": lambda: ops.sinkhorn_newton(*tensors, eps, tol=5e-10).plan.numpy(),
    }
    if regot is not None:  # of its solvers this one is the fastest that gets there; its tolerance is another norm
        columns_first = np.asfortranarray(cost)
        sides["regot ssns"] = lambda: regot.sinkhorn_ssns(columns_first, a, b, eps, tol=1e-10, max_iter=1000).plan
    return sides


def measure(name: str, problem: Problem, eta: int, rounds: int) -> dict[str, float]:
    sides = newton_sides(problem, 1 / eta)
    result: dict[str, float] = {}
    for side, run in sides.items():
        result[f"{side} error"] = error_of(run(), *problem[1:])
    times = paired.rounds({side: (run, 1) for side, run in sides.items()}, rounds)
    result |= {f"{side} ms": paired.milliseconds(times, side) for side in sides}
    result |= {f"{side} / auto": paired.ratio(times, side, "auto") for side in times if side != "auto"}
    ours = result["auto ms"] / 1e3
    spent, error, sweeps = pot_within(problem, 1 / eta, 20 * ours)
    result |= {"POT sinkhorn_log time / auto": spent / ours, "POT error then": error, "POT sweeps then": sweeps}
    info = ops.sinkhorn_newton(*[torch.from_numpy(x) for x in problem], 1 / eta, tol=1e-10).info
    result |= {"passes to 1e-10": float(info[2]), "passes / table": float(info[2]) / TABLE_PASSES[name, eta]}
    return result


def gradients(problem: Problem, rounds: int) -> dict[str, float]:
    cost, a, b = (torch.from_numpy(x) for x in problem)
    leaf = cost.clone().requires_grad_()

    def with_plan() -> object:
        return torch.autograd.grad((ops.sinkhorn_newton(leaf, a, b, 1 / 1200).plan * cost).sum(), leaf)

    def with_value() -> object:
        return torch.autograd.grad(ops.sinkhorn_newton(leaf, a, b, 1 / 1200).value, leaf)

    sides = {
        "forward": (lambda: ops.sinkhorn_newton(cost, a, b, 1 / 1200), 1),
        "value and its gradient": (with_value, 1),
        "<C, P> and its gradient": (with_plan, 1),
    }
    times = paired.rounds(sides, rounds)
    return {f"{side} / forward": paired.ratio(times, side, "forward") for side in times if side != "forward"}


def run(arguments: argparse.Namespace) -> paired.Results:
    everything = problems()
    for name, eta in TABLE_PASSES:
        rounds = arguments.rounds if (name, eta) == ("random", 1200) else min(3, arguments.rounds)
        yield f"sinkhorn_newton: {name}, eta {eta}", measure(name, everything[name], eta, rounds)
    yield "sinkhorn_newton: derivatives, random, eta 1200", gradients(everything["random"], arguments.rounds)


if __name__ == "__main__":
    paired.main(__doc__, run)
