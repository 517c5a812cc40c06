"""M-FAC's step against two plain passes over its window, a factorization per step and the published recursion.

    PYTHONPATH=. python benchmarks/optim/bench_mfac.py [--json FILE] [--rounds 15] [--num-grads 64 256 1024]
                                                       [--dim 10000 100000 1000000]

One thread, a full window, one float32 parameter of d elements. What is compared with:

  reads       every byte of a window of that format read twice by torch.sum: no step can be faster, since the
              coefficients need all products first. The sums run over float32 whatever the format
  gemv        G @ g and G.t() @ p of a float32 window by MKL: the same passes without encoding, m x m part and update
  potrf       gemv, and between them a float64 Cholesky factorization of K and a solve
  published   gemv, and between them the published O(m^3) recursion in float32; written here, with LAPACK: U of the LU
              factorization without pivoting from a Cholesky factorization, B by one triangular solve

The windows hold made-up rows, and the Gram matrix is that of orthogonal rows: times do not depend on the values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext.curvature import FisherWindow
from torch_ext.optim import MFAC

FORMATS = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes an element
DAMPING = 1e-5


def fill(rows: Tensor, indices: Tensor, scales: Tensor, gram: Tensor, ring: Tensor, d: int) -> None:
    """A full window: times do not depend on the values, so the rows are one random tile over and over."""
    m = gram.size(0) - 1
    tile = torch.randn(rows.size(1), rows.size(2))
    rows.copy_((tile * 20).to(rows.dtype) if rows.dtype == torch.int8 else tile.to(rows.dtype))
    if indices.numel() > 0:
        kept = indices.size(2)
        indices.copy_((torch.arange(kept) * (1024 // kept)).to(indices.dtype).expand_as(indices))
    if scales.numel() > 0:
        scales.fill_(0.05)
    gram.copy_(torch.eye(m + 1, dtype=torch.float64) * d)
    ring.zero_()
    for field, value in ((0, m), (1, m), (4, 1), (8, m)):  # count, spare slot, last one accepted, accepted in total
        ring[field] = value


class Ours:
    def __init__(self, window_format: str, m: int, d: int) -> None:
        self.param = torch.zeros(d, requires_grad=True)
        self.param.grad = torch.randn(d)
        self.optimizer = MFAC([self.param], lr=1e-12, num_grads=m, damping=DAMPING, window_format=window_format)
        self.optimizer.step()
        state = self.optimizer.state[self.param]
        names = ("window_rows", "window_indices", "window_scales", "window_gram", "window_ring")
        fill(*(state[name] for name in names), d)
        self.optimizer.step()
        if self.optimizer.window_count != m:
            raise RuntimeError("the window is not full")

    def step(self) -> None:
        self.optimizer.step()


class Plain:
    """A float32 window as a matrix, and what others do with it."""

    def __init__(self, m: int, d: int) -> None:
        self.m, self.row = m, 0
        self.window = torch.randn(1, d).expand(m, d).contiguous()
        self.window += torch.randn(m, 1)
        self.param, self.grad = torch.zeros(d), torch.randn(d)
        self.gram = torch.eye(m) * d
        self.ones = torch.ones(m)

    def gemv(self) -> None:
        torch.mv(self.window, self.grad)
        torch.mv(self.window.t(), self.ones)

    def _replace(self) -> int:
        row, self.row = self.row, (self.row + 1) % self.m
        self.window[row] = self.grad
        torch.mv(self.window, self.grad)
        return row  # the made-up Gram matrix stays: it only has to be positive definite

    def potrf(self) -> None:
        row = self._replace()
        k = self.gram.double()
        k.diagonal().add_(self.m * DAMPING)
        e = torch.zeros(self.m, 1, dtype=torch.float64)
        e[row] = self.m
        coefficients = torch.cholesky_solve(e, torch.linalg.cholesky(k)).float().squeeze(1)
        self.param.sub_(torch.mv(self.window.t(), coefficients), alpha=1e-12)

    def published(self) -> None:
        row = self._replace()
        k = self.gram / DAMPING
        k.diagonal().add_(self.m)
        factor = torch.linalg.cholesky(k)
        pivots = factor.diagonal()
        unit = factor / pivots  # U = diag(pivots^2) unit^T
        b = torch.linalg.solve_triangular(unit, torch.eye(self.m) / DAMPING, upper=False, unitriangular=True)
        q = torch.mv(b, self.gram[row])
        c = torch.mv(b.t(), q / pivots.square())
        self.param.sub_(self.grad / DAMPING - torch.mv(self.window.t(), c), alpha=1e-12)


def repeated(run: Callable[[], object], times: int) -> paired.Side:
    def several() -> None:
        for _ in range(times):
            run()

    return several, times


def steps(m: int, d: int, count: int) -> dict[str, float]:
    """Whole steps of every format that fits twice."""
    plain = Plain(m, d)
    repeats = max(1, int(2e7 / (m * d)))
    flat = plain.window.view(-1)

    def reads(share: float) -> Callable[[], object]:
        part = flat[: max(1, int(len(flat) * share))]
        return lambda: (part.sum(), part.sum())

    formats = ("float32", "bfloat16", "int8", "topk")
    sides: dict[str, paired.Side] = {}
    for name in formats:
        sides[name] = repeated(Ours(name, m, d).step, repeats)
        if name != "topk":
            sides[f"reads {name}"] = repeated(reads(FORMATS[name] / 4), repeats)
    for name in ("gemv", "potrf", "published"):
        sides[name] = repeated(getattr(plain, name), repeats)
    times = paired.rounds(sides, count)
    return {
        "self": paired.ratio(times, "self", "float32"),
        **{f"{name} ms": paired.milliseconds(times, name) for name in formats},
        **{f"{name} / its reads": paired.ratio(times, name, f"reads {name}") for name in formats if name != "topk"},
        "float32 / gemv": paired.ratio(times, "float32", "gemv"),
        **{f"{name} / float32": paired.ratio(times, name, "float32") for name in formats if name != "float32"},
        "potrf per step / float32": paired.ratio(times, "potrf", "float32"),
        "published recursion / float32": paired.ratio(times, "published", "float32"),
    }


def small_part(m: int, count: int) -> dict[str, float]:
    """The m x m part of a step (with its checks and refactorizations: 64 of them) against one factorization."""
    window = FisherWindow(m, 1024, DAMPING)
    window.push(torch.ones(1024))
    state = window.state_dict()
    gram, factor, ring = (state[name] for name in ("gram", "factor", "ring"))
    dots = torch.full((m + 1,), 1024.0, dtype=torch.float64)  # all rows are equal
    coefficients = torch.zeros(m + 1, dtype=torch.float64)

    def commit() -> None:
        torch.ops.torch_ext.fisher_window_commit_(gram, factor, ring, coefficients, dots, DAMPING)

    for _ in range(m + 1):
        commit()
    k = torch.full((m, m), 1024.0, dtype=torch.float64) + torch.eye(m, dtype=torch.float64)
    narrow = k.float()
    times = paired.rounds(
        {
            "commit": repeated(commit, 64),
            "potrf": repeated(lambda: torch.linalg.cholesky(k), max(1, 256 // m)),
            "potrf float32": repeated(lambda: torch.linalg.cholesky(narrow), max(1, 256 // m)),
        },
        count,
    )
    return {
        "self": paired.ratio(times, "self", "commit"),
        "commit ms": paired.milliseconds(times, "commit"),
        "potrf ms": paired.milliseconds(times, "potrf"),
        "commit / potrf": paired.ratio(times, "commit", "potrf"),
        "commit / potrf float32": paired.ratio(times, "commit", "potrf float32"),
    }


def available_bytes() -> int:
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def measure(arguments: argparse.Namespace) -> paired.Results:
    for m in arguments.num_grads:
        yield f"M-FAC, the m x m part, m = {m}", small_part(m, arguments.rounds)
    for m in arguments.num_grads:
        for d in arguments.dim:
            needed = 4 * m * d * 3  # three float32 windows: ours and the plain one, and the narrow ones together
            if needed > 0.8 * available_bytes():
                print(f"m = {m}, d = {d:,}: left out, it needs {needed / 1e9:.1f} GB", file=sys.stderr)
                continue
            yield f"M-FAC step, m = {m}, d = {d:,}", steps(m, d, arguments.rounds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-grads", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dim", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])


if __name__ == "__main__":
    paired.main(__doc__, measure, add_arguments=add_arguments)
