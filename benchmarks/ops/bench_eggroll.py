"""A population's forward pass against plain batched inference of the same rows, its update, and dense noise.

PYTHONPATH=. python benchmarks/ops/bench_eggroll.py [--json FILE] [--rounds 15] [--threads 1]

An MLP of three layers, 1024 wide with biases; every weight and bias is perturbed, with noise made on the fly. Ratios
are medians over interleaved rounds of the calling thread's CPU time (of wall time with several threads), so that other
programs on the machine count less. "dense" is what evolution strategies do without low rank, written by us: W + sigma E
of full rank for each of 64 members, then torch.func.vmap over the layer; per member.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext import ops

WIDTH, LAYERS, SIGMA, DENSE = 1024, 3, 1e-2, 64
LAWS = ("gaussian", "binomial16", "binomial64", "rademacher")
Layer = Callable[[Tensor, int], Tensor]


class Problem:
    def __init__(self, members: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(LAYERS)]
        self.biases = [torch.zeros(WIDTH) for _ in range(LAYERS)]
        self.x = torch.randn(members, rows, WIDTH, generator=generator)
        self.coeff = torch.randn(members // 2, generator=generator)

    def run(self, layer: Layer) -> Tensor:
        y = self.x
        for i in range(LAYERS):
            y = layer(y, i)
            if i + 1 < LAYERS:
                y = torch.relu(y)
        return y

    def plain(self) -> Tensor:
        return self.run(lambda y, i: torch.nn.functional.linear(y, self.weights[i], self.biases[i]))

    def population(self, law: str) -> Tensor:
        noise = ops.EggrollNoise(sigma=SIGMA, law=law)  # type: ignore[arg-type]
        return self.run(lambda y, i: ops.eggroll_linear(y, self.weights[i], self.biases[i], noise, 2 * i, 2 * i + 1))

    def generation(self, law: str) -> None:
        self.population(law)
        for i in range(LAYERS):
            ops.eggroll_update(self.coeff, (WIDTH, WIDTH), seed=0, ordinal=2 * i, law=law)  # type: ignore[arg-type]
            ops.eggroll_update(self.coeff, (WIDTH,), seed=0, ordinal=2 * i + 1, kind="vector", law=law)  # type: ignore[arg-type]


def dense_member_seconds(problem: Problem, clock: Callable[[], float]) -> float:
    """Per member: draws W + sigma E for all members at once, as users of vmap do, then one batched product a layer."""
    x = problem.x[:DENSE]
    start = clock()
    y = x
    for i in range(LAYERS):
        w = problem.weights[i] + SIGMA * torch.randn(DENSE, WIDTH, WIDTH)
        b = problem.biases[i] + SIGMA * torch.randn(DENSE, 1, WIDTH)
        y = torch.func.vmap(torch.nn.functional.linear)(y, w, b.squeeze(1))
        y = torch.relu(y) if i + 1 < LAYERS else y
    return (clock() - start) / DENSE


def memory() -> dict[str, float]:
    """Bytes beside input and output of one layer of 64 x 64, and of its update."""
    w, results = torch.zeros(64, 64), {}
    for members in (256, 65536):
        x, c = torch.zeros(members, 64), torch.zeros(members // 2)
        noise = ops.EggrollNoise(sigma=SIGMA)
        forward = paired.peak(lambda x=x, noise=noise: ops.eggroll_linear(x, w, None, noise, 0)) - x.numel() * 4
        update = paired.peak(lambda c=c: ops.eggroll_update(c, (64, 64), seed=0, ordinal=0)) - w.numel() * 4
        results[f"layer, {members} members: extra KB"] = forward / 1e3
        results[f"update, {members} members: extra KB"] = update / 1e3
    return results


def measure(members: int, rows: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    problem = Problem(members, rows)
    sides: dict[str, paired.Side] = {"plain": (problem.plain, 1)}
    for law in LAWS:
        sides[law] = (lambda law=law: problem.population(law), 1)
        sides[f"generation, {law}"] = (lambda law=law: problem.generation(law), 1)
    times = paired.rounds(sides, rounds, clock)
    results = {"self": paired.ratio(times, "self", "plain"), "plain, ms": paired.milliseconds(times, "plain")}
    for law in LAWS:
        results[f"{law}: forward, % of plain"] = 100 * paired.ratio(times, "plain", law)
    for law in LAWS:
        results[f"{law}: forward and update, % of plain"] = 100 * paired.ratio(times, "plain", f"generation, {law}")
    per_member = statistics.median(times["gaussian"]) / members
    dense = statistics.median(dense_member_seconds(problem, clock) for _ in range(3))
    results[f"dense noise, {DENSE} members: time of a member / gaussian"] = dense / per_member
    return results


def run(arguments: argparse.Namespace) -> paired.Results:
    threads = arguments.threads
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    with torch.no_grad():
        for members, rows in ((4096, 1), (512, 8)):
            title = f"EGGROLL, {LAYERS} layers of {WIDTH}, {members} members x {rows} rows, {threads} thread(s)"
            yield title, measure(members, rows, arguments.rounds, clock)
        yield "EGGROLL, memory beside input and output", memory()


if __name__ == "__main__":
    paired.main(__doc__, run, add_arguments=lambda parser: parser.add_argument("--threads", type=int, default=1))
