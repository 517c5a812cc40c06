"""Trains a small digits classifier with M-FAC, its window stored in several formats, and with AdamW and SGD.

    python examples/python/train_mfac.py [--data FILE] [--epochs 20] [--seed 0] [--json FILE]

Model, data, split and batches are those of train_digits.py: features - 64 - classes, tanh; 1400 of the 1797 digits
train. The learning rate of every optimizer falls linearly to zero, set by torch's LambdaLR: M-FAC's steps grow as
gradients shrink, so that it needs a falling rate more than the others do.

The table:
  window               bytes that M-FAC keeps: the last gradients and their products
  final train loss     mean cross-entropy over the training rows after the last epoch
  test accuracy        share of the test rows classified right after the last epoch
  s/epoch              seconds for one pass over the training rows, evaluation excluded; median over the epochs
  x AdamW              the optimizers take turns, epoch by epoch: seconds over AdamW's for the same epoch; median
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import CsvError, Progress, print_table, read_csv, scale_features
from torch import nn
from torch.nn import functional as F

from torch_ext.optim import MFAC

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"window_format": "bfloat16"},
    "int8": {"window_format": "int8"},
    "topk": {"window_format": "topk", "topk": 0.1},
}


class Run:
    """A model, its optimizer and what became of them."""

    def __init__(self, name: str, make: Callable[[Any], torch.optim.Optimizer], shape: tuple[int, int], steps: int):
        self.name = name
        self.model = nn.Sequential(nn.Linear(shape[0], 64), nn.Tanh(), nn.Linear(64, shape[1]))
        self.optimizer = make(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        self.curves: dict[str, list[float]] = {"train_loss": [], "test_accuracy": [], "seconds": []}

    def train(self, x: torch.Tensor, y: torch.Tensor, batches: Iterable[torch.Tensor]) -> None:
        begin = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x[batch]), y[batch]).backward()
            self.optimizer.step()
            self.schedule.step()
        self.curves["seconds"].append(time.perf_counter() - begin)

    @torch.no_grad()
    def evaluate(self, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.curves["train_loss"].append(F.cross_entropy(self.model(train[0]), train[1]).item())
        right = (self.model(test[0]).argmax(1) == test[1]).sum().item()
        self.curves["test_accuracy"].append(right / len(test[1]))


def optimizers(args: argparse.Namespace) -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    def mfac(options: dict[str, Any]) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda p: MFAC(p, lr=args.lr, num_grads=args.num_grads, damping=args.damping, **options)

    return {
        **{f"MFAC {name}": mfac(options) for name, options in FORMATS.items()},
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }


def window_size(run: Run) -> str:
    return f"{run.optimizer.memory_bytes / 1e6:.2f} MB" if isinstance(run.optimizer, MFAC) else "-"


def print_results(runs: list[Run]) -> None:
    seconds = {run.name: run.curves["seconds"] for run in runs}
    rows = [["optimizer", "window", "final train loss", "test accuracy", "s/epoch", "x AdamW"]]
    for run in runs:
        cost = statistics.median(a / b for a, b in zip(seconds[run.name], seconds["AdamW"], strict=True))
        loss, accuracy = run.curves["train_loss"][-1], run.curves["test_accuracy"][-1]
        pace = statistics.median(seconds[run.name])
        rows.append([run.name, window_size(run), f"{loss:.4f}", f"{accuracy:.4f}", f"{pace:.4f}", f"{cost:.2f}"])
    print_table(rows)


def parse_arguments() -> argparse.Namespace:
    digits = Path(__file__).parent.parent / "data" / "digits.csv"
    parser = argparse.ArgumentParser(
        description="Trains a digits classifier with M-FAC and compares it with AdamW and SGD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=str(digits), help="CSV: numeric features, last column an integer label, header optional")
    add("--scale", choices=["all", "column"], default="all", help="one factor for all features, or one a column")
    add("--epochs", type=int, default=20, help="passes over the training rows")
    add("--batch", type=int, default=100, help="rows per step")
    add("--seed", type=int, default=0, help="of the split, the initial weights and the batches")
    add("--lr", type=float, default=1e-2, help="M-FAC: learning rate; keep lr * num-grads near 0.5 to 1")
    add("--num-grads", type=int, default=64, help="M-FAC: gradients in the window")
    add("--damping", type=float, default=1e-3, help="M-FAC: lambda")
    add("--json", help="write the curves to this file")
    add("--quiet", action="store_true", help="no progress, only the table")
    args = parser.parse_args()
    if args.epochs < 1 or args.batch < 1:
        parser.error("--epochs and --batch must be at least 1")
    return args


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)  # a network this small runs fastest so
    try:
        data = read_csv(args.data)
    except CsvError as error:
        print(error, file=sys.stderr)
        return 2
    x = scale_features(data.x, args.scale == "column")
    torch.manual_seed(args.seed)
    order = torch.randperm(len(x))
    train, test = order.tensor_split([len(x) * 1400 // 1797])
    steps = args.epochs * -(-len(train) // args.batch)
    runs = []
    for name, make in optimizers(args).items():
        torch.manual_seed(args.seed)
        runs.append(Run(name, make, (x.size(1), data.classes), steps))
    progress = Progress("epoch", args.epochs, args.quiet)
    for epoch in range(1, args.epochs + 1):
        batches = torch.randperm(len(train)).split(args.batch)
        for run in runs:
            run.train(x[train], data.y[train], batches)
            run.evaluate((x[train], data.y[train]), (x[test], data.y[test]))
        news = (f"{run.name} {run.curves['train_loss'][-1]:.4f}" for run in runs)
        progress.update(epoch, "  ".join(["loss", *news]))
    print_results(runs)
    if args.json:
        header = {"language": "Python", "torch": torch.__version__, "seed": args.seed, "epochs": args.epochs}
        header |= {"batch": args.batch, "train_rows": len(train), "test_rows": len(test)}
        curves = [{"optimizer": run.name, **run.curves} for run in runs]
        Path(args.json).write_text(json.dumps({**header, "runs": curves}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
