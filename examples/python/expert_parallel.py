"""Experts spread over processes: permute -> all-to-all -> experts -> all-to-all -> combine, against one process.

    python examples/python/expert_parallel.py [--processes 2] [--experts 8] [--tokens 512]

Every process has its own tokens, the whole router, and experts / processes of the experts. Its rows, sorted by expert,
go to the processes that own the experts (all-to-all), are sorted by expert again there, pass through the experts in one
product per projection, and come back the same way. Outputs and gradients are compared with one process that has all
tokens and all experts; loads are summed by ALFLB, whose bias is the same on all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import moe
from torch_ext.optim import ALFLB

DIM, HIDDEN, TOP_K = 16, 24, 2


class AllToAll(torch.autograd.Function):
    """Rows to other processes; the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.splits = send, receive
        result = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), receive, send)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        send, receive = ctx.splits
        return AllToAll.apply(grad, receive, send), None, None


class ParallelExperts(nn.Module):
    """A mixture of experts of which this process has a part, from the weights of the whole layer."""

    def __init__(self, whole: moe.MoELayer, rank: int, world: int) -> None:
        super().__init__()
        self.world, self.experts = world, whole.num_experts
        own = slice(rank * self.experts // world, (rank + 1) * self.experts // world)
        self.router = whole.router
        self.gate, self.up, self.down = (
            nn.Parameter(w.detach()[own].clone()) for w in (whole.gate_proj, whole.up_proj, whole.down_proj)
        )

    def forward(self, x: Tensor) -> Tensor:
        routed = self.router(x)
        plan = moe.dispatch_plan(routed.ids, self.experts)
        counts = plan.offsets.diff().long()  # rows for each expert
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        per_rank = counts.view(self.world, -1), theirs.view(self.world, -1)  # to and from each process, by its experts
        send, receive = (block.sum(1).tolist() for block in per_rank)
        rows = AllToAll.apply(moe.permute(x, plan), send, receive)
        z = self.apply_experts(rows, per_rank[1])
        return moe.combine(AllToAll.apply(z, receive, send), routed.gates, plan)

    def apply_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``rows`` in the order (process, expert) -> the same order; ``counts`` [processes, own experts]."""
        expert = torch.arange(counts.size(1), dtype=torch.int32).expand_as(counts).repeat_interleave(counts.flatten())
        plan = moe.dispatch_plan(expert.reshape(-1, 1), counts.size(1))
        y = moe.permute(rows, plan)
        gate, up = (moe.grouped_mm(y, weight, plan.offsets) for weight in (self.gate, self.up))
        return moe.combine(moe.grouped_mm(F.silu(gate) * up, self.down, plan.offsets), None, plan)


def check(rank: int, world: int, experts: int, tokens: int) -> str:
    """Compares this process's part of the step with the whole; returns what was seen."""
    torch.manual_seed(0)
    whole = moe.MoELayer(DIM, HIDDEN, experts, top_k=TOP_K, dtype=torch.float64)
    torch.manual_seed(0)
    parts = ParallelExperts(moe.MoELayer(DIM, HIDDEN, experts, top_k=TOP_K, dtype=torch.float64), rank, world)
    x = torch.randn(tokens, DIM, dtype=torch.float64)
    target = torch.randn(tokens, DIM, dtype=torch.float64)
    own = slice(rank * tokens // world, (rank + 1) * tokens // world)
    balancers = ALFLB(whole), ALFLB(parts, process_group=dist.group.WORLD)
    largest = 0.0
    for _ in range(3):
        for module, rows in ((whole, slice(None)), (parts, own)):
            module.zero_grad()
            y = module(x[rows])
            ((y - target[rows]) ** 2).sum().backward()
            if module is whole:
                expected = y[own]
            else:
                largest = max(largest, float((y - expected).detach().abs().max()))
        mine = slice(rank * experts // world, (rank + 1) * experts // world)
        pairs = [(parts.gate, whole.gate_proj), (parts.up, whole.up_proj), (parts.down, whole.down_proj)]
        largest = max(largest, *(float((a.grad - b.grad[mine]).abs().max()) for a, b in pairs))
        grad = parts.router.weight.grad.clone()  # every process has a part of the router's gradient
        dist.all_reduce(grad)
        largest = max(largest, float((grad - whole.router.weight.grad).abs().max()))
        for balancer in balancers:
            balancer.step()
        if not torch.equal(parts.router.expert_bias, whole.router.expert_bias):
            raise AssertionError("the biases differ")
    if largest > 1e-9:
        raise AssertionError(f"outputs or gradients differ by {largest}")
    vio = next(iter(balancers[1].report().values()))["max_vio"]
    return (
        f"{world} processes equal one: outputs and gradients within {largest:.1e}, biases to the bit; MaxVio {vio:.3f}"
    )


def start(rank: int, world: int, folder: str, experts: int, tokens: int) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world)
    said = check(rank, world, experts, tokens)
    if rank == 0:
        print(said, flush=True)
    meeting.set(f"finished {rank}", "yes")  # nobody hangs up while another still listens
    meeting.wait([f"finished {other}" for other in range(world)])
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    if args.processes < 1 or args.experts % args.processes or args.tokens % args.processes:
        parser.error("--experts and --tokens must be multiples of --processes")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            start, (args.processes, str(Path(folder)), args.experts, args.tokens), nprocs=args.processes
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
