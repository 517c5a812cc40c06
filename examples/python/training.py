"""What the programs share that train the same small classifier with several optimizers in turn.

Model: features - 64 - classes, tanh; cross-entropy; features divided by their largest value (16 for the digits);
a random 78 % of the rows (1400 of the 1797 digits) train, the others test.
Every random number comes from torch's generator, in the order in which examples/cpp/common/training.h draws them:
programs of both languages, and all optimizers, see the same split, the same initial weights and the same batches.
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
from common import CsvError, Progress, read_csv, scale_features
from torch import nn
from torch.nn import functional as F

MakeOptimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


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


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def training_parser(description: str) -> argparse.ArgumentParser:
    digits = Path(__file__).parent.parent / "data" / "digits.csv"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default=str(digits), help="CSV: numeric features, last column an integer label, header optional")
    add("--scale", choices=["all", "column"], default="all", help="one factor for all features, or one a column")
    add("--epochs", type=positive, default=20, help="passes over the training rows")
    add("--batch", type=positive, default=100, help="rows per step")
    add("--seed", type=int, default=0, help="of the split, the initial weights and the batches")
    add("--json", help="write the curves to this file")
    add("--quiet", action="store_true", help="no progress, only the table")
    return parser


def load_split(args: argparse.Namespace) -> Split:
    data = read_csv(args.data)
    x = scale_features(data.x, args.scale == "column")
    torch.manual_seed(args.seed)
    order = torch.randperm(len(x))
    train, test = order.tensor_split([len(x) * 1400 // 1797])
    return Split(x[train], data.y[train], x[test], data.y[test], data.classes)


def start_run(name: str, make: MakeOptimizer, data: Split, seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(data.train_x.size(1), 64), nn.Tanh(), nn.Linear(64, data.classes))
    return Run(name, model, make(model.parameters()))


@torch.no_grad()
def evaluate(run: Run, data: Split) -> None:
    run.train_loss.append(F.cross_entropy(run.model(data.train_x), data.train_y).item())
    right = (run.model(data.test_x).argmax(1) == data.test_y).sum().item()
    run.test_accuracy.append(right / len(data.test_y))


def train_in_turns(
    runs: list[Run],
    data: Split,
    args: argparse.Namespace,
    step: Callable[[Run, torch.Tensor, torch.Tensor], object],
) -> None:
    """Trains all runs, which take turns epoch by epoch. step(run, x, y): one step on a batch."""
    progress = Progress("epoch", args.epochs, args.quiet)
    for epoch in range(1, args.epochs + 1):
        batches = torch.randperm(len(data.train_y)).split(args.batch)
        for run in runs:
            begin = time.perf_counter()
            for batch in batches:
                step(run, data.train_x[batch], data.train_y[batch])
            run.seconds.append(time.perf_counter() - begin)
            evaluate(run, data)
        progress.update(epoch, "  ".join(["loss", *(f"{run.name} {run.train_loss[-1]:.4f}" for run in runs)]))


def relative_cost(run: Run, runs: list[Run], other: str) -> str:
    """Median over the epochs of the seconds of `run` over those of the run `other`; "-" if that one did not run."""
    base = next((r.seconds for r in runs if r.name == other), [])
    ratios = [a / b for a, b in zip(run.seconds, base, strict=False)]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def write_curves(runs: list[Run], data: Split, args: argparse.Namespace, **more: int) -> None:
    """The format of examples/cpp/common/training.h, read by plot_digits.py. `more`: further integers."""
    if not args.json:
        return
    header = {"language": "Python", "torch": torch.__version__, "seed": args.seed, "epochs": args.epochs}
    header |= {"batch": args.batch, **more, "train_rows": len(data.train_y), "test_rows": len(data.test_y)}
    curves = [
        {
            "optimizer": run.name,
            "train_loss": run.train_loss,
            "test_accuracy": run.test_accuracy,
            "seconds": run.seconds,
        }
        for run in runs
    ]
    try:
        Path(args.json).write_text(json.dumps({**header, "runs": curves}) + "\n")
    except OSError as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {args.json}: cannot be written: {error.strerror}") from None


def run_program(body: Callable[[], None]) -> int:
    """What the program exits with: 2 for data that cannot be used."""
    try:
        body()
    except CsvError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
