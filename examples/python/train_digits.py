"""Trains a small digits classifier with AdaHessian, AdamW and SGD: the same program three times, but for one line.

    python examples/python/train_digits.py [--data FILE] [--epochs 20] [--seed 0] [--json FILE]

Model: features - 64 - classes, tanh; cross-entropy; features divided by their largest value (16 for the digits);
a random 78 % of the rows (1400 of the 1797 digits) train, the others test.
Every random number comes from torch's generator, in the order in which examples/cpp/train_digits.cpp draws them:
both programs, and all optimizers, see the same split, the same initial weights and the same batches.

The table:
  final train loss     mean cross-entropy over the training rows after the last epoch
  test accuracy        share of the test rows classified right after the last epoch
  s/epoch              seconds for one pass over the training rows, evaluation excluded; median over the epochs
  x first-order cost   the optimizers take turns, epoch by epoch: seconds over AdamW's seconds for the same epoch;
                       median over the epochs ("-" if AdamW did not run)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from common import CsvError, Progress, print_table, read_csv, scale_features
from torch import nn
from torch.nn import functional as F

from torch_ext.optim import AdaHessian


class Split(NamedTuple):
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: int


@dataclass
class Run:
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_loss: list[float] = field(default_factory=list)  # one value an epoch, like the next two
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


MakeOptimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


def optimizers(args: argparse.Namespace) -> dict[str, MakeOptimizer]:
    """The one line that differs."""
    return {
        "AdaHessian": lambda p: AdaHessian(p, lr=0.15, linear_averaging="row", update_each=args.update_each),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }


def load(args: argparse.Namespace) -> Split:
    data = read_csv(args.data)
    x = scale_features(data.x, args.scale == "column")
    torch.manual_seed(args.seed)
    order = torch.randperm(len(x))
    train, test = order.tensor_split([len(x) * 1400 // 1797])
    return Split(x[train], data.y[train], x[test], data.y[test], data.classes)


def start(name: str, make: MakeOptimizer, data: Split, args: argparse.Namespace) -> Run:
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(data.train_x.size(1), 64), nn.Tanh(), nn.Linear(64, data.classes))
    return Run(name, model, make(model.parameters()))


def train_step(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        loss = F.cross_entropy(run.model(x), y)
        if not isinstance(run.optimizer, AdaHessian):  # which differentiates the loss itself
            loss.backward()
        return loss

    run.optimizer.zero_grad()
    run.optimizer.step(closure)


def train_epoch(run: Run, data: Split, batches: Iterable[torch.Tensor]) -> None:
    begin = time.perf_counter()
    for batch in batches:
        train_step(run, data.train_x[batch], data.train_y[batch])
    run.seconds.append(time.perf_counter() - begin)


@torch.no_grad()
def evaluate(run: Run, data: Split) -> None:
    run.train_loss.append(F.cross_entropy(run.model(data.train_x), data.train_y).item())
    right = (run.model(data.test_x).argmax(1) == data.test_y).sum().item()
    run.test_accuracy.append(right / len(data.test_y))


def print_results(runs: list[Run]) -> None:
    seconds = {run.name: run.seconds for run in runs}
    rows = [["optimizer", "final train loss", "test accuracy", "s/epoch", "x first-order cost"]]
    for run in runs:
        ratios = [a / b for a, b in zip(run.seconds, seconds.get("AdamW", []), strict=False)]
        cost = f"{statistics.median(ratios):.2f}" if ratios else "-"
        loss, accuracy = run.train_loss[-1], run.test_accuracy[-1]
        rows.append([run.name, f"{loss:.4f}", f"{accuracy:.4f}", f"{statistics.median(run.seconds):.4f}", cost])
    print_table(rows)


def write_json(runs: list[Run], data: Split, args: argparse.Namespace) -> None:
    """The format of examples/cpp/train_digits.cpp, read by examples/python/plot_digits.py."""
    header = {
        "language": "Python",
        "torch": torch.__version__,
        "seed": args.seed,
        "epochs": args.epochs,
        "batch": args.batch,
        "update_each": args.update_each,
        "train_rows": len(data.train_y),
        "test_rows": len(data.test_y),
    }
    curves = [
        {
            "optimizer": run.name,
            "train_loss": run.train_loss,
            "test_accuracy": run.test_accuracy,
            "seconds": run.seconds,
        }
        for run in runs
    ]
    Path(args.json).write_text(json.dumps({**header, "runs": curves}) + "\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_arguments() -> argparse.Namespace:
    digits = Path(__file__).parent.parent / "data" / "digits.csv"
    parser = argparse.ArgumentParser(
        description="Trains a digits classifier with AdaHessian, AdamW and SGD and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=str(digits), help="CSV: numeric features, last column an integer label, header optional")
    add("--scale", choices=["all", "column"], default="all", help="one factor for all features, or one a column")
    add("--epochs", type=positive, default=20, help="passes over the training rows")
    add("--batch", type=positive, default=100, help="rows per step")
    add("--seed", type=int, default=0, help="of the split, the initial weights and the batches")
    add("--optimizer", choices=["all", "AdaHessian", "AdamW", "SGD"], default="all", help="which to run")
    add("--update-each", type=positive, default=1, help="AdaHessian: refresh the curvature every so many steps")
    add("--json", help="write the curves to this file")
    add("--quiet", action="store_true", help="no progress, only the table")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)  # a network this small runs fastest so
    try:
        data = load(args)
    except CsvError as error:
        print(error, file=sys.stderr)
        return 2
    makers = optimizers(args)
    names = makers if args.optimizer == "all" else [args.optimizer]
    runs = [start(name, makers[name], data, args) for name in names]
    progress = Progress("epoch", args.epochs, args.quiet)
    for epoch in range(1, args.epochs + 1):
        batches = torch.randperm(len(data.train_y)).split(args.batch)
        for run in runs:
            train_epoch(run, data, batches)
            evaluate(run, data)
        progress.update(epoch, "  ".join(["loss", *(f"{run.name} {run.train_loss[-1]:.4f}" for run in runs)]))
    print_results(runs)
    if args.json:
        try:
            write_json(runs, data, args)
        except OSError as error:
            print(f"train_digits: {args.json}: cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
