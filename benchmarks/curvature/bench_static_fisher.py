"""StaticFisher: row-wise Cholesky against the published rank-one recursion, whole and in blocks.

PYTHONPATH=. python benchmarks/curvature/bench_static_fisher.py [--json FILE] [--rounds 15]

The recursions are ours, written in torch: M-FAC's (h_i and n_i, two products with a matrix a gradient) for a whole
matrix, and for blocks the rank-one update of all inverse blocks together, which is how others do it. All in float64,
and all that a pruner needs first: the diagonal of the inverse.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext.curvature import StaticFisher, obs_prune

DAMPING = 1e-5


def recursion(g: Tensor) -> Tensor:
    """In place, as the authors' program: row i of H replaces row i of G."""
    h, m = g.clone(), g.shape[0]
    n = torch.empty(m, dtype=g.dtype)
    for i in range(m):
        row = h[i] / DAMPING
        if i > 0:
            row.addmv_(h[:i].T, (h[:i] @ h[i]) / n[:i], alpha=-1)
        n[i] = m + h[i] @ row
        h[i] = row
    return 1 / DAMPING - (h.square() / n[:, None]).sum(0)


def block_recursion(g: Tensor, block: int) -> Tensor:
    """Rank-one updates of all inverse blocks at a time."""
    m, blocks = g.shape[0], g.shape[1] // block
    rows = g.view(m, blocks, block)
    inverse = (torch.eye(block, dtype=g.dtype) / DAMPING).expand(blocks, block, block).contiguous()
    for i in range(m):
        x = torch.bmm(inverse, rows[i, :, :, None])
        scale = m + torch.bmm(rows[i, :, None, :], x)
        inverse.baddbmm_(x, (x / scale).mT, alpha=-1)
    return inverse.diagonal(0, 1, 2).flatten()


def compare(m: int, d: int, block: int | None, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    g = torch.randn(m, d, dtype=torch.float64)
    other = (lambda: recursion(g)) if block is None else (lambda: block_recursion(g, block))
    ours = lambda: StaticFisher(g, DAMPING, block).diag()  # noqa: E731
    error = float((ours() / other() - 1).abs().max())
    times = paired.rounds({"StaticFisher": (ours, 1), "recursion": (other, 1)}, rounds)
    return {
        "recursion / StaticFisher": paired.ratio(times, "recursion", "StaticFisher"),
        "self": paired.ratio(times, "self", "StaticFisher"),
        "StaticFisher ms": paired.milliseconds(times, "StaticFisher"),
        "largest relative difference of the diagonals": error,
    }


def many_small_blocks(rounds: int) -> dict[str, float]:
    """A hundred thousand blocks of 50, 5 million weights: building, diagonal and joint pruning."""
    torch.manual_seed(0)
    m, block, d = 64, 50, 5_000_000
    g, w = torch.randn(m, d), torch.randn(d)
    fisher = StaticFisher(g, DAMPING, block)
    times = paired.rounds(
        {
            "StaticFisher": (lambda: StaticFisher(g, DAMPING, block), 1),
            "obs_prune": (lambda: obs_prune(w, fisher, 0.5), 1),
        },
        max(3, rounds // 5),
    )
    return {f"{name} us/block": 1e3 * paired.milliseconds(times, name) * block / d for name in times if name != "self"}


def measure(arguments: argparse.Namespace) -> paired.Results:
    rounds = arguments.rounds
    yield "StaticFisher, m=512, d=20000, one block", compare(512, 20_000, None, rounds)
    yield "StaticFisher, m=64, d=64000, blocks of 128", compare(64, 64_000, 128, rounds)
    yield "StaticFisher, m=256, d=12800, blocks of 128", compare(256, 12_800, 128, rounds)
    yield "StaticFisher, m=64, 100000 blocks of 50, float32", many_small_blocks(rounds)


if __name__ == "__main__":
    paired.main(__doc__, measure)
