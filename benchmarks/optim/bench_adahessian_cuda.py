"""The fused AdaHessian update on a GPU against a device-to-device copy and fused AdamW, per byte.

PYTHONPATH=. python benchmarks/optim/bench_adahessian_cuda.py [--json FILE] [--rounds 15]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

import torch_ext


def synchronized(run: Callable[[], object]) -> Callable[[], object]:
    def timed() -> None:
        run()
        torch.cuda.synchronize()

    return timed


def measure(arguments: argparse.Namespace) -> paired.Results:
    for numel in (1_000_000, 100_000_000):
        param = torch.nn.Parameter(torch.randn(numel, device="cuda"))
        param.grad = torch.randn_like(param)
        diagonal = [torch.randn_like(param)]
        ours = torch_ext.optim.AdaHessian([param])
        adamw = torch.optim.AdamW([param], fused=True)
        source, target = torch.randn_like(param), torch.empty_like(param)
        times = paired.rounds(
            {
                "copy (8 bytes)": (synchronized(lambda s=source, t=target: t.copy_(s)), 1),
                "AdaHessian step (40 bytes)": (synchronized(lambda o=ours, d=diagonal: o.step(hessian=d)), 1),
                "AdamW fused (28 bytes)": (synchronized(adamw.step), 1),
            },
            arguments.rounds,
        )
        copy, step, fused = "copy (8 bytes)", "AdaHessian step (40 bytes)", "AdamW fused (28 bytes)"
        yield (
            f"{numel} float32 parameters",
            {
                "step ms": paired.milliseconds(times, step),
                "step bandwidth / copy bandwidth": 40 / 8 / paired.ratio(times, step, copy),
                "step bandwidth / AdamW bandwidth": 40 / 28 / paired.ratio(times, step, fused),
            },
        )


if __name__ == "__main__":
    paired.main(__doc__, measure, name=torch.cuda.get_device_name)
