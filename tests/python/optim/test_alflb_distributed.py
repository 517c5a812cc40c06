"""Loads of several processes: 2 and 4 over Gloo, and under DistributedDataParallel, against one that sees all tokens.

Test 11 of the method's list: integers add up without rounding, so everything is equal to the bit.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_ext import _C, moe
from torch_ext.optim import ALFLB
from torch_ext.testing import bits

sys.path.insert(0, str(Path(__file__).parent))
from test_distributed import run_ranks

TOKENS, STEPS = 64, 4
RULES = ("sign", "proportional", "momentum", "quantile")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList([moe.MoERouter(5, 8, top_k=2), moe.MoERouter(5, 3, top_k=1)])

    def forward(self, x: Tensor) -> Tensor:
        return sum(router(x).gates.square().sum() for router in self.routers)


def data(step: int) -> Tensor:
    return torch.randn(TOKENS, 5, generator=torch.Generator().manual_seed(step))


def balance(net: nn.Module, balancer: ALFLB, rows: slice, parts: int) -> None:
    """STEPS steps in which only the balancer moves anything."""
    for step in range(STEPS):
        for part in data(step)[rows].chunk(parts):
            net(part).backward()
        balancer.step()


def check_parts(rank: int, world: int) -> None:
    share = TOKENS // world
    for rule in RULES:
        own, whole = Net(), Net()
        shared = ALFLB(own, rule=rule, lr=0.02, process_group=dist.group.WORLD)
        alone = ALFLB(whole, rule=rule, lr=0.02)
        balance(own, shared, slice(rank * share, (rank + 1) * share), 1)
        balance(whole, alone, slice(None), 1)
        assert bits([*own.buffers()]) == bits([*whole.buffers()]), rule
        assert bits(shared.state_dict()["state"]) == bits(alone.state_dict()["state"]), rule
        assert shared.report() == alone.report()

        unpickled = pickle.loads(pickle.dumps(shared))
        with pytest.raises(RuntimeError, match=r"was distributed when it was pickled: set opt\.process_group"):
            unpickled.step()

    with pytest.raises(TypeError, match="tensors must be integers, got Float"):
        _C.all_reduce_sum([torch.zeros(2)], dist.group.WORLD)
    mixed = [torch.full((2,), rank, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int32)]
    sums = _C.all_reduce_sum(mixed, dist.group.WORLD)
    assert sums[0].tolist() == [world * (world - 1) // 2] * 2
    assert bits(sums[1]) == bits(torch.full((3, 2), world, dtype=torch.int32))
    assert mixed[0].tolist() == [rank] * 2


@pytest.mark.parametrize("world", [2, 4])
def test_11_parts_equal_the_whole(world: int, tmp_path: Path) -> None:
    run_ranks(check_parts, world, tmp_path)


def check_ddp(rank: int, world: int) -> None:
    """DDP broadcasts buffers before every forward: a load that was one would hold the first process's counts."""
    own, whole = Net(), Net()
    wrapped = DistributedDataParallel(own, broadcast_buffers=True)
    shared, alone = ALFLB(own, process_group=dist.group.WORLD), ALFLB(whole)
    share = TOKENS // world
    rows = slice(rank * share, (rank + 1) * share)
    for part in data(0)[rows].chunk(2):
        wrapped(part).backward()
    assert int(own.routers[0].load.sum()) == 2 * share
    gathered: list[Tensor] = [torch.zeros(8, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(gathered, own.routers[0].load)
    assert not all(torch.equal(gathered[0], other) for other in gathered[1:])
    whole(data(0)).backward()
    assert torch.equal(sum(gathered), whole.routers[0].load)
    shared.step()
    alone.step()
    balance(wrapped, shared, rows, 2)
    balance(whole, alone, slice(None), 1)
    assert bits([*own.buffers()]) == bits([*whole.buffers()])


def test_ddp_with_micro_batches(tmp_path: Path) -> None:
    run_ranks(check_ddp, 2, tmp_path)
