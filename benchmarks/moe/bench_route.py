"""moe.route and moe.dispatch_plan against the same in eager torch, one thread.

PYTHONPATH=. python benchmarks/moe/bench_route.py [--json FILE] [--rounds 15]

"eager" is what MoE libraries write: sigmoid, add the bias, topk, gather, divide, bincount; and for the plan a stable
argsort with its inverse. Its backward is autograd's. "limit" reads the logits once (forward). Times are CPU time of
this thread, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext import moe

CASES = [(8192, 64, 6), (8192, 256, 8), (16384, 256, 8)]


class Problem:
    def __init__(self, tokens: int, experts: int, top_k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(tokens, experts, generator=generator)
        self.leaf = self.logits.clone().requires_grad_()
        self.bias = 0.1 * torch.randn(experts, generator=generator)
        self.weight = torch.randn(tokens, top_k, generator=generator)
        self.experts, self.top_k = experts, top_k
        self.load = torch.zeros(experts, dtype=torch.int64)
        self.ids = moe.route(self.logits, self.bias, top_k=top_k).ids
        self.ids64 = self.ids.long()

    def eager(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits.sigmoid()
        ids = (scores.detach() + self.bias).topk(self.top_k, dim=-1, sorted=False).indices
        gates = scores.gather(-1, ids)
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return gates, ids, torch.bincount(ids.flatten(), minlength=self.experts)

    def route(self, logits: Tensor) -> tuple[Tensor, ...]:
        return moe.route(logits, self.bias, top_k=self.top_k, load=self.load)

    def backward(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        torch.autograd.grad(function(self.leaf)[0], self.leaf, self.weight)

    def argsort(self) -> Tensor:
        order = self.ids64.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return inverse

    def sides(self) -> dict[str, paired.Side]:
        @torch.no_grad()
        def forward(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
            function(self.logits)

        return {
            "route": (lambda: forward(self.route), 1),
            "eager": (lambda: forward(self.eager), 1),
            "limit": (lambda: self.logits.sum(), 1),
            "route and backward": (lambda: self.backward(self.route), 1),
            "eager and backward": (lambda: self.backward(self.eager), 1),
            "plan": (lambda: moe.dispatch_plan(self.ids, self.experts), 1),
            "argsort": (self.argsort, 1),
        }


def measure(arguments: argparse.Namespace) -> paired.Results:
    for tokens, experts, top_k in CASES:
        times = paired.rounds(Problem(tokens, experts, top_k).sides(), arguments.rounds, time.thread_time)
        per_token = {name: paired.milliseconds(times, name) * 1e6 / tokens for name in times if name != "self"}
        values = {f"{name}, ns per token": value for name, value in per_token.items()}
        values["eager / route"] = paired.ratio(times, "eager", "route")
        values["the same with backward"] = paired.ratio(times, "eager and backward", "route and backward")
        values["argsort / plan"] = paired.ratio(times, "argsort", "plan")
        values["route / one read of the logits"] = paired.ratio(times, "route", "limit")
        values["route / itself"] = paired.ratio(times, "self", "route")
        yield f"moe.route, {tokens} tokens, {experts} experts, top {top_k}, 1 thread", values


if __name__ == "__main__":
    paired.main(__doc__, measure)
