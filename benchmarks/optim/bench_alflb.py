"""One balancing step of 58 layers of 256 experts (DeepSeek-V3): against the same rule in eager torch, layer by layer.

PYTHONPATH=. python benchmarks/optim/bench_alflb.py [--json FILE] [--rounds 15]

"eager" is the sign rule as torchtitan and Megatron write it: mean of the loads, sign, centred update, zeroed counts,
for each layer; we wrote it. "foreach" is the same with torch's list operators, as far as they go.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext.optim import ALFLB

LAYERS, EXPERTS, TOKENS, TOP_K = 58, 256, 4096, 8


class Eager:
    def __init__(self) -> None:
        self.biases = [torch.zeros(EXPERTS) for _ in range(LAYERS)]

    def step(self, loads: list[Tensor]) -> None:
        for bias, load in zip(self.biases, loads, strict=True):
            counts = load.float()
            delta = 1e-3 * torch.sign(counts.mean() - counts)
            bias.add_(delta - delta.mean())
            load.zero_()

    def step_foreach(self, loads: list[Tensor]) -> None:
        counts = [load.float() for load in loads]
        torch._foreach_neg_(counts)
        torch._foreach_add_(counts, [-c.mean() for c in counts])
        torch._foreach_sign_(counts)
        torch._foreach_sub_(counts, [c.mean() for c in counts])
        torch._foreach_add_(self.biases, counts, alpha=1e-3)
        torch._foreach_zero_(loads)


def measure(arguments: argparse.Namespace) -> paired.Results:
    generator = torch.Generator().manual_seed(0)
    counts = [torch.randint(0, 2 * TOKENS * TOP_K // EXPERTS, (EXPERTS,), generator=generator) for _ in range(LAYERS)]
    sides: dict[str, paired.Side] = {}
    for rule in ("sign", "proportional", "momentum", "quantile"):
        balancer = ALFLB([torch.zeros(EXPERTS) for _ in range(LAYERS)], rule=rule, norm="load")
        for layer in range(LAYERS):
            balancer.record(layer, torch.zeros(1, TOP_K, dtype=torch.int64))
        loads = balancer.loads()

        def run(balancer: ALFLB = balancer, loads: list[Tensor] = loads) -> None:
            torch._foreach_copy_(loads, counts)
            balancer.step()

        sides[rule] = (run, 1)
    eager, own = Eager(), [torch.zeros(EXPERTS, dtype=torch.int64) for _ in range(LAYERS)]
    for name, step in (("eager", eager.step), ("foreach", eager.step_foreach)):

        def run_eager(step: object = step) -> None:
            torch._foreach_copy_(own, counts)
            step(own)  # type: ignore[operator]

        sides[name] = (run_eager, 1)
    times = paired.rounds(sides, arguments.rounds)
    ratios = {
        "eager / sign": paired.ratio(times, "eager", "sign"),
        "foreach / sign": paired.ratio(times, "foreach", "sign"),
        "proportional / sign": paired.ratio(times, "proportional", "sign"),
        "momentum / sign": paired.ratio(times, "momentum", "sign"),
        "quantile (1000 bins) / sign": paired.ratio(times, "quantile", "sign"),
        "self": paired.ratio(times, "self", "sign"),
        "sign, ms": paired.milliseconds(times, "sign"),
    }
    yield f"ALFLB step, {LAYERS} layers of {EXPERTS} experts, Python", ratios


if __name__ == "__main__":
    paired.main(__doc__, measure)
