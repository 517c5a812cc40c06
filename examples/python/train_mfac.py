"""Trains a small digits classifier with M-FAC, its window stored in several formats, and with AdamW and SGD.

    python examples/python/train_mfac.py [--data FILE] [--epochs 20] [--seed 0] [--json FILE]

Model, split and batches: training.py. The learning rate of every optimizer falls linearly to zero, set by torch's
LambdaLR: M-FAC's steps grow as gradients shrink, so that it needs a falling rate more than the others do.
examples/cpp/train_mfac.cpp is the same program.

The table:
  window               bytes that M-FAC keeps: the last gradients and their products
  final train loss     mean cross-entropy over the training rows after the last epoch
  test accuracy        share of the test rows classified right after the last epoch
  s/epoch              seconds for one pass over the training rows, evaluation excluded; median over the epochs
  x AdamW              the optimizers take turns, epoch by epoch: seconds over AdamW's for the same epoch; median
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from common import print_table
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from training import (
    MakeOptimizer,
    Run,
    load_split,
    relative_cost,
    run_program,
    start_run,
    train_in_turns,
    training_parser,
    write_curves,
)

from torch_ext.optim import MFAC

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"window_format": "bfloat16"},
    "int8": {"window_format": "int8"},
    "topk": {"window_format": "topk", "topk": 0.1},
}


def optimizers(args: argparse.Namespace) -> dict[str, MakeOptimizer]:
    def mfac(options: dict[str, Any]) -> MakeOptimizer:
        return lambda p: MFAC(p, lr=args.lr, num_grads=args.num_grads, damping=args.damping, **options)

    return {
        **{f"MFAC {name}": mfac(options) for name, options in FORMATS.items()},
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }


def window_size(run: Run) -> str:
    return f"{run.optimizer.memory_bytes / 1e6:.2f} MB" if isinstance(run.optimizer, MFAC) else "-"


def print_results(runs: list[Run]) -> None:
    rows = [["optimizer", "window", "final train loss", "test accuracy", "s/epoch", "x AdamW"]]
    for run in runs:
        loss, accuracy, pace = run.train_loss[-1], run.test_accuracy[-1], statistics.median(run.seconds)
        numbers = [f"{loss:.4f}", f"{accuracy:.4f}", f"{pace:.4f}", relative_cost(run, runs, "AdamW")]
        rows.append([run.name, window_size(run), *numbers])
    print_table(rows)


def parse_arguments() -> argparse.Namespace:
    parser = training_parser("Trains a digits classifier with M-FAC and compares it with AdamW and SGD.")
    add = parser.add_argument
    add("--lr", type=float, default=1e-2, help="M-FAC: learning rate; keep lr * num-grads near 0.5 to 1")
    add("--num-grads", type=int, default=64, help="M-FAC: gradients in the window")
    add("--damping", type=float, default=1e-3, help="M-FAC: lambda")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # a network this small runs fastest so
    data = load_split(args)
    runs = [start_run(name, make, data, args.seed) for name, make in optimizers(args).items()]
    steps = args.epochs * -(-len(data.train_y) // args.batch)
    schedules = {run.name: LambdaLR(run.optimizer, lambda step: 1 - step / steps) for run in runs}

    def train_step(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        schedules[run.name].step()

    train_in_turns(runs, data, args, train_step)
    print_results(runs)
    write_curves(runs, data, args)


if __name__ == "__main__":
    sys.exit(run_program(main))
