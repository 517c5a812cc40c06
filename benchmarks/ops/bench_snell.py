"""snell_linear at 768 x 3072, rank 8: against the composed eager version, and against its matrix products alone.

PYTHONPATH=. python benchmarks/ops/bench_snell.py [--json FILE] [--rounds 15]

"composed": torch.cdist, torch.quantile, mask and product, as the published code composes them (it stores W and what
autograd keeps of it). "products": the branch's three (y, the gradients of x and of W), each into memory that stands
ready; "layer" adds the frozen linear layer and its two products, five in all. The probe is one read-modify-write of W's
size in the same run.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext import ops

ROWS, COLUMNS, RANK, SCALE, SPARSITY = 768, 3072, 8, 0.1, 0.9


class Problem:
    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def uniform(size: int) -> Tensor:
            bound = (size * RANK / 2) ** -0.5
            return ((torch.rand(2, size, RANK // 2, generator=generator) * 2 - 1) * bound).requires_grad_()

        self.a, self.b = uniform(ROWS), uniform(COLUMNS)
        self.x = torch.randn(n, ROWS, generator=generator).requires_grad_()
        self.gy = torch.randn(n, COLUMNS, generator=generator)
        self.weight = torch.randn(COLUMNS, ROWS, generator=generator) / ROWS**0.5
        self.w = torch.randn(ROWS, COLUMNS, generator=generator)
        self.y, self.gx, self.gw = torch.empty(n, COLUMNS), torch.empty(n, ROWS), torch.empty(ROWS, COLUMNS)

    def differentiate(self, y: Tensor) -> None:
        torch.autograd.grad(y, (self.x, self.a, self.b), self.gy)

    def fused(self) -> Tensor:
        return ops.snell_linear(self.x, self.a, self.b, SCALE, SPARSITY)[0]

    def composed(self) -> Tensor:
        w = SCALE * (torch.cdist(self.a[0], self.b[0]) - torch.cdist(self.a[1], self.b[1]))
        magnitude = w.abs()
        t = magnitude.detach().quantile(SPARSITY)
        return self.x @ torch.where(magnitude > t, w * magnitude.detach(), 0)

    def products(self) -> None:
        with torch.no_grad():
            torch.mm(self.x, self.w, out=self.y)
            torch.mm(self.gy, self.w.t(), out=self.gx)
            torch.mm(self.x.t(), self.gy, out=self.gw)

    def frozen_products(self) -> None:
        with torch.no_grad():
            torch.mm(self.x, self.weight.t(), out=self.y)
            torch.mm(self.gy, self.weight, out=self.gx)

    def layer(self, branch: Callable[[], Tensor]) -> Tensor:
        return torch.nn.functional.linear(self.x, self.weight) + branch()


def memory(problem: Problem, results: dict[str, float]) -> None:
    """Outputs and returned gradients excluded."""
    returned = 4 * (problem.y.numel() + problem.gx.numel() + problem.a.numel() + problem.b.numel())
    tile = 4 * 384 * 512
    bound = 4 * 2 * RANK * (ROWS + COLUMNS) + 2 * tile
    for name in ("fused", "composed"):
        gc.collect()
        branch = getattr(problem, name)
        extra = paired.peak(lambda branch=branch: problem.differentiate(branch())) - returned
        results[f"extra memory of {name}, MB"] = extra / 1e6
    results["bound: 8 rank (in + out) bytes and two tiles, MB"] = bound / 1e6


def measure(n: int, rounds: int) -> dict[str, float]:
    problem = Problem(n)
    probe = torch.zeros(ROWS, COLUMNS)
    sides: dict[str, paired.Side] = {
        "fused": (lambda: problem.differentiate(problem.fused()), 1),
        "composed": (lambda: problem.differentiate(problem.composed()), 1),
        "products": (problem.products, 1),
        "fused layer": (lambda: problem.differentiate(problem.layer(problem.fused)), 1),
        "five products": (lambda: (problem.products(), problem.frozen_products()), 1),
        "forward": (lambda: problem.fused().detach(), 1),
        "merged forward": (lambda: problem.x.detach() @ problem.w, 1),
        "probe": (lambda: probe.add_(1), 1),
    }
    times = paired.rounds(sides, rounds)
    results = {
        "composed / fused": paired.ratio(times, "composed", "fused"),
        "fused / its three products": paired.ratio(times, "fused", "products"),
        "fused layer / five products": paired.ratio(times, "fused layer", "five products"),
        "forward / merged forward": paired.ratio(times, "forward", "merged forward"),
        "fused / probe (read and write W once)": paired.ratio(times, "fused", "probe"),
        "self": paired.ratio(times, "self", "fused"),
        "fused, ms": paired.milliseconds(times, "fused"),
    }
    if n == 256:
        memory(problem, results)
    return results


def run(arguments: argparse.Namespace) -> paired.Results:
    for n in (256, 4096):
        title = f"SNELL {ROWS} x {COLUMNS}, rank {RANK}, {n} rows, forward and backward"
        yield title, measure(n, arguments.rounds)


if __name__ == "__main__":
    paired.main(__doc__, run)
