"""Trains a small digits classifier with AdaHessian, AdamW and SGD: the same program three times, but for one line.

    python examples/python/train_digits.py [--data FILE] [--epochs 20] [--seed 0] [--json FILE]

Model, split and batches: training.py. examples/cpp/train_digits.cpp is the same program.

The table:
  final train loss     mean cross-entropy over the training rows after the last epoch
  test accuracy        share of the test rows classified right after the last epoch
  s/epoch              seconds for one pass over the training rows, evaluation excluded; median over the epochs
  x first-order cost   the optimizers take turns, epoch by epoch: seconds over AdamW's seconds for the same epoch;
                       median over the epochs ("-" if AdamW did not run)
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from common import print_table
from torch.nn import functional as F
from training import (
    MakeOptimizer,
    Run,
    load_split,
    positive,
    relative_cost,
    run_program,
    start_run,
    train_in_turns,
    training_parser,
    write_curves,
)

from torch_ext.optim import AdaHessian


def optimizers(args: argparse.Namespace) -> dict[str, MakeOptimizer]:
    """The one line that differs."""
    return {
        "AdaHessian": lambda p: AdaHessian(p, lr=0.15, linear_averaging="row", update_each=args.update_each),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }


def train_step(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        loss = F.cross_entropy(run.model(x), y)
        if not isinstance(run.optimizer, AdaHessian):  # which differentiates the loss itself
            loss.backward()
        return loss

    run.optimizer.zero_grad()
    run.optimizer.step(closure)


def print_results(runs: list[Run]) -> None:
    rows = [["optimizer", "final train loss", "test accuracy", "s/epoch", "x first-order cost"]]
    for run in runs:
        loss, accuracy, pace = run.train_loss[-1], run.test_accuracy[-1], statistics.median(run.seconds)
        rows.append([run.name, f"{loss:.4f}", f"{accuracy:.4f}", f"{pace:.4f}", relative_cost(run, runs, "AdamW")])
    print_table(rows)


def parse_arguments() -> argparse.Namespace:
    parser = training_parser("Trains a digits classifier with AdaHessian, AdamW and SGD and compares them.")
    add = parser.add_argument
    add("--optimizer", choices=["all", "AdaHessian", "AdamW", "SGD"], default="all", help="which to run")
    add("--update-each", type=positive, default=1, help="AdaHessian: refresh the curvature every so many steps")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # a network this small runs fastest so
    data = load_split(args)
    makers = optimizers(args)
    names = makers if args.optimizer == "all" else [args.optimizer]
    runs = [start_run(name, makers[name], data, args.seed) for name in names]
    train_in_turns(runs, data, args, train_step)
    print_results(runs)
    write_curves(runs, data, args, update_each=args.update_each)


if __name__ == "__main__":
    sys.exit(run_program(main))
