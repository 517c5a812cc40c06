"""AdaHessian's Python face against timm, pytorch_optimizer and fused AdamW: step alone, whole iterations, accuracy.

    PYTHONPATH=. python benchmarks/optim/bench_adahessian.py [--json FILE] [--rounds 15]

One thread. The MLP is 512-1024-512-10 with batch 32; the ResNet has 20 layers, 32x32x3 inputs and batch 64.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired
import pytorch_optimizer
import timm.optim

import torch_ext

Iteration = Callable[[], Any]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 512), nn.Tanh(), nn.Linear(512, 10))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra)) if self.extra else x
        return F.relu(y + skip)


def resnet20() -> nn.Module:
    blocks: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        blocks += [Block(inputs if k == 0 else outputs, outputs, stride if k == 0 else 1) for k in range(3)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Task:
    """A model with a batch, and one training iteration of each optimizer on its own copy of the model."""

    def __init__(self, make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
        self.make, self.x, self.y = make, x, y

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def loss(self, model: nn.Module, part: int = 1) -> Tensor:
        n = len(self.x) // part
        return F.cross_entropy(model(self.x[:n]), self.y[:n])

    def first_order(self) -> Iteration:
        model = self.model()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

        def iteration() -> None:
            opt.zero_grad()
            self.loss(model).backward()
            opt.step()

        return iteration

    def ours(self, cycle: int = 1, **options: Any) -> Iteration:
        """`cycle` iterations: with update_each > 1 one refresh and its first-order steps."""
        model = self.model()
        opt = torch_ext.optim.AdaHessian(model.parameters(), lr=1e-9, update_each=cycle, **options)
        extra = {"curvature_closure": lambda: self.loss(model, 4)} if cycle > 1 else {}

        def iteration() -> None:
            for _ in range(cycle):
                opt.step(lambda: self.loss(model), **extra)

        return iteration

    def peer(self, optimizer: Callable[[Any], torch.optim.Optimizer]) -> Iteration:
        model = self.model()
        opt = optimizer(model.parameters())

        def iteration() -> None:
            opt.zero_grad()
            self.loss(model).backward(create_graph=True)
            opt.step()

        return iteration

    def floor(self) -> dict[str, Iteration]:
        """What a lazy iteration cannot avoid: forward and backward, curvature of a quarter batch, an AdamW update."""
        model = self.model()
        params = list(model.parameters())
        opt = torch.optim.AdamW(params, lr=1e-9, fused=True)

        def gradient() -> None:
            torch.autograd.grad(self.loss(model), params)

        probes = [torch.ones_like(p) for p in params]

        def curvature() -> None:
            grads = torch.autograd.grad(self.loss(model, 4), params, create_graph=True)
            torch.autograd.grad(grads, params, probes)

        for p in params:
            p.grad = torch.zeros_like(p)
        return {"gradient": gradient, "curvature": curvature, "update": opt.step}


PEERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "timm": lambda params: timm.optim.Adahessian(params, lr=1e-9),
    "pytorch_optimizer": lambda params: pytorch_optimizer.AdaHessian(params, lr=1e-9),
}


def step_alone(count: int) -> dict[str, float]:
    """The step with gradients and Hz given, probes included; the peers' autograd.grad returns ready tensors."""
    torch.manual_seed(0)
    params = [nn.Parameter(p.detach().clone()) for p in mlp().parameters()]
    for p in params:
        p.grad = torch.randn_like(p)
    hz = [torch.randn_like(p) for p in params]
    ours = torch_ext.optim.AdaHessian(params)
    ordinals = list(range(len(params)))
    probes = torch.ops.torch_ext.rademacher_probe(params, ordinals, 0, 0, 0)
    sides: dict[str, paired.Side] = {}

    def our_step() -> None:
        torch.ops.torch_ext.rademacher_refill_(probes, ordinals, 0, 0, 0)
        ours.step(hessian=hz)

    sides["ours"] = (our_step, 1)
    for name, make in PEERS.items():
        opt = make(params)

        def peer_step(opt: torch.optim.Optimizer = opt) -> None:
            with mock.patch("torch.autograd.grad", return_value=tuple(hz)):
                opt.step()

        sides[name] = (peer_step, 1)
    adamw = torch.optim.AdamW(params, fused=True)
    sides["AdamW fused"] = (adamw.step, 1)
    times = paired.rounds(sides, count)
    return {
        "self": paired.ratio(times, "self", "ours"),
        "ours ms": paired.milliseconds(times, "ours"),
        **{f"ours / {name}": paired.ratio(times, "ours", name) for name in sides if name != "ours"},
    }


def small_tensors(count: int) -> dict[str, float]:
    """200 tensors of 1,000 elements: the step, of which the arithmetic is a small part."""
    params = [nn.Parameter(torch.randn(1000)) for _ in range(200)]
    for p in params:
        p.grad = torch.randn_like(p)
    hz = [torch.randn_like(p) for p in params]
    ours = torch_ext.optim.AdaHessian(params)
    adamw = torch.optim.AdamW(params, fused=True)
    times = paired.rounds(
        {
            "ours": (lambda: [ours.step(hessian=hz) for _ in range(20)], 20),
            "AdamW fused": (lambda: [adamw.step() for _ in range(20)], 20),
        },
        count,
    )
    return {
        "self": paired.ratio(times, "self", "ours"),
        "ours ms": paired.milliseconds(times, "ours"),
        "AdamW fused ms": paired.milliseconds(times, "AdamW fused"),
        "ours / AdamW fused": paired.ratio(times, "ours", "AdamW fused"),
    }


def iterations(task: Task, count: int) -> dict[str, float]:
    """Whole iterations against fused AdamW, and the lazy mode against its floor measured in the same rounds."""
    parts = task.floor()
    sides: dict[str, paired.Side] = {
        "AdamW": (task.first_order(), 1),
        "ours": (task.ours(), 1),
        "ours lazy": (task.ours(cycle=5), 5),
        **{name: (task.peer(make), 1) for name, make in PEERS.items()},
        **{f"floor {name}": (run, 1) for name, run in parts.items()},
    }
    times = paired.rounds(sides, count)
    times["floor"] = [
        g + c / 5 + u
        for g, c, u in zip(times["floor gradient"], times["floor curvature"], times["floor update"], strict=True)
    ]
    return {
        "self": paired.ratio(times, "self", "AdamW"),
        "AdamW ms": paired.milliseconds(times, "AdamW"),
        "ours / AdamW": paired.ratio(times, "ours", "AdamW"),
        **{f"{name} / AdamW": paired.ratio(times, name, "AdamW") for name in PEERS},
        **{f"{name} / ours": paired.ratio(times, name, "ours") for name in PEERS},
        "lazy / AdamW": paired.ratio(times, "ours lazy", "AdamW"),
        "lazy / floor": paired.ratio(times, "ours lazy", "floor"),
        "floor / AdamW": paired.ratio(times, "floor", "AdamW"),
    }


def digits_accuracy(seeds: int = 3) -> dict[str, float]:
    """Mean test accuracy on the digits: a refresh on every step, or every 5th from a quarter of the batch."""
    rows = Path(__file__).resolve().parents[2].joinpath("examples/data/digits.csv").read_text().splitlines()[1:]
    data = torch.tensor([[float(x) for x in row.split(",")] for row in rows])
    result = {"every step": 0.0, "every 5th, quarter batch": 0.0}
    for seed in range(seeds):
        shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
        result["every step"] += digits_run(shuffled, seed, update_each=1) / seeds
        result["every 5th, quarter batch"] += digits_run(shuffled, seed, update_each=5) / seeds
    return result


def digits_run(data: Tensor, seed: int, update_each: int) -> float:
    x, y = data[:, :-1] / 16, data[:, -1].long()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    opt = torch_ext.optim.AdaHessian(model.parameters(), linear_averaging="row", update_each=update_each)

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(x[batch]), y[batch])

    for _ in range(20):
        for batch in torch.randperm(1400).split(100):
            quarter = functools.partial(loss, batch[:25]) if update_each > 1 else None
            opt.step(functools.partial(loss, batch), curvature_closure=quarter)
    return (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()


def measure(arguments: argparse.Namespace) -> paired.Results:
    rounds = arguments.rounds
    small = Task(mlp, torch.randn(32, 512), torch.randint(10, (32,)))
    large = Task(resnet20, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    yield "step alone (MLP, g and Hz given)", step_alone(rounds)
    yield "200 tensors of 1,000 elements", small_tensors(rounds)
    yield "iteration, MLP", iterations(small, rounds)
    yield "iteration, ResNet-20", iterations(large, rounds)
    yield "digits test accuracy", digits_accuracy()


if __name__ == "__main__":
    paired.main(__doc__, measure)
