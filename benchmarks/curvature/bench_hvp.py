"""Hessian-vector products: both modes against the gradient alone and against torch's own double backward.

PYTHONPATH=. python benchmarks/curvature/bench_hvp.py [--json FILE] [--rounds 15]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

import torch_ext


def measure(arguments: argparse.Namespace) -> paired.Results:
    model = nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 512), nn.Tanh(), nn.Linear(512, 10))
    params = list(model.parameters())
    x, y = torch.randn(32, 512), torch.randint(10, (32,))
    v = [torch.randn_like(p) for p in params]

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    def eager() -> None:
        grads = torch.autograd.grad(loss(), params, create_graph=True)
        torch.autograd.grad(grads, params, v)

    times = paired.rounds(
        {
            "gradient": (lambda: torch.autograd.grad(loss(), params), 1),
            "torch.autograd twice": (eager, 1),
            "hvp double_backward": (lambda: torch_ext.curvature.hvp(loss, params, v), 1),
            "hvp finite_difference": (lambda: torch_ext.curvature.hvp(loss, params, v, mode="finite_difference"), 1),
        },
        arguments.rounds,
    )
    ratios = {f"{name} / gradient": paired.ratio(times, name, "gradient") for name in times if name != "gradient"}
    yield "Hessian-vector product, MLP", ratios


if __name__ == "__main__":
    paired.main(__doc__, measure)
