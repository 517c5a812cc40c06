"""Prunes a small digits classifier by magnitude, by independent and by joint OBS, before and after fine-tuning.

    python examples/python/prune_digits.py [--data FILE] [--seeds 0 1 2] [--output FILE.png] [--json FILE]

Model and data: those of train_digits.py (features - 64 - classes, tanh, AdamW). Each method prunes the same trained
model step by step to 50, 75, 90 and 95 % zeros, with fresh per-sample gradients in each of `--rounds` rounds a step.
Every step is measured as it is, and again after a copy of it was trained `--finetune` epochs with its zeros kept.

The table, means over the seeds with the lowest and the highest:
  before    share of the test rows classified right, straight after pruning
  after     the same after fine-tuning
  loss      mean cross-entropy over the training rows, straight after pruning: what OBS keeps low
The line under it says for each step on how many seeds joint OBS is ahead of the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import CsvError, Progress, print_table
from torch import nn
from torch.nn import functional as F
from training import Split, load_split

from torch_ext.curvature import prune_model

METHODS = {"magnitude": "magnitude", "independent": "independent OBS", "joint": "joint OBS"}


class Row(NamedTuple):
    """One method at one sparsity on one seed."""

    seed: int
    method: str
    sparsity: float
    before: float  # test accuracy
    after: float
    loss: float  # on the training rows, before fine-tuning
    rows: int  # test rows


def batches(data: Split, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    order = torch.randperm(len(data.train_y))
    return [(data.train_x[batch], data.train_y[batch]) for batch in order.split(size)]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(model: nn.Module, data: Split, epochs: int, batch: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(epochs):
        for piece in batches(data, batch):
            optimizer.zero_grad()
            loss_fn(model, piece).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    return (model(data.test_x).argmax(1) == data.test_y).double().mean().item()


@torch.no_grad()
def train_loss(model: nn.Module, data: Split) -> float:
    return loss_fn(model, (data.train_x, data.train_y)).item()


def prune_steps(model: nn.Module, method: str, data: Split, args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Prunes the model from step to step; each starts from the masks that the one before has left on it."""
    for sparsity in args.sparsity:
        prune_model(
            model,
            loss_fn,
            batches(data, args.batch),
            sparsity,
            method=method,
            num_grads=args.num_grads,
            damping=args.damping,
            recomputations=args.rounds,
            micro_batch=1,
            progress=False,
        )
        tuned = copy.deepcopy(model)  # with its masks
        train(tuned, data, args.finetune, args.batch, lr=2e-3)
        yield Row(
            *(seed, method, sparsity, accuracy(model, data), accuracy(tuned, data), train_loss(model, data)),
            len(data.test_y),
        )


def run_seed(args: argparse.Namespace, seed: int, progress: Progress, done: int) -> list[Row]:
    data = load_split(argparse.Namespace(data=args.data, scale=args.scale, seed=seed))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(data.train_x.size(1), 64), nn.Tanh(), nn.Linear(64, data.classes))
    train(model, data, args.epochs, args.batch, lr=1e-2)
    dense = accuracy(model, data)
    rows = [Row(seed, "dense", 0.0, dense, dense, train_loss(model, data), len(data.test_y))]
    for method in METHODS:
        torch.manual_seed(seed)  # the same samples and batches for all methods
        for row in prune_steps(copy.deepcopy(model), method, data, args, seed):
            rows.append(row)
            done += 1
            progress.update(done, f"seed {seed}, {METHODS[method]}, {row.sparsity:.0%}: {row.before:.3f}")
    return rows


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def print_results(rows: list[Row], args: argparse.Namespace) -> None:
    table = [["sparsity", "method", "before", "after", "loss"]]
    dense = [row for row in rows if row.method == "dense"]
    table.append(["0%", "dense", spread([r.before for r in dense]), "", spread([r.loss for r in dense])])
    for sparsity in args.sparsity:
        for method, label in METHODS.items():
            some = [row for row in rows if (row.method, row.sparsity) == (method, sparsity)]
            columns = [spread([getattr(row, name) for row in some]) for name in ("before", "after", "loss")]
            table.append([f"{sparsity:.0%}", label, *columns])
    print_table(table, left=2)
    print("\nSeeds on which joint OBS is ahead before fine-tuning, by test accuracy (by training loss):")
    found = {(row.seed, row.method, row.sparsity): row for row in rows}
    for sparsity in args.sparsity:
        parts = []
        for other in ("independent", "magnitude"):
            pairs = [(found[seed, "joint", sparsity], found[seed, other, sparsity]) for seed in args.seeds]
            right = sum(joint.before > rival.before for joint, rival in pairs)
            lower = sum(joint.loss < rival.loss for joint, rival in pairs)
            parts.append(f"of {METHODS[other]} {right} ({lower})")
        print(f"  {sparsity:.0%}: {', '.join(parts)} of {len(args.seeds)}")


def draw(rows: list[Row], args: argparse.Namespace) -> None:
    """Accuracy on a logarithmic scale of the errors, where 97 and 98 % are as far apart as 40 and 60 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axes, name in zip(panels, ("before", "after"), strict=True):
        for number, method in enumerate(METHODS):
            draw_method(axes, rows, args, method, name, shift=0.05 * (number - 1))
        wrong = 100 - 100 * statistics.mean(row.before for row in rows if row.method == "dense")
        axes.axhline(wrong, color="0.4", linestyle=":", linewidth=1.5, label="dense model")
        axes.set_xticks(range(len(args.sparsity)), [f"{s:.0%}" for s in args.sparsity])
        axes.set(xlabel="weights set to zero", yscale="log", ylim=(99, 1.5))
        axes.yaxis.set_major_locator(FixedLocator([2, 3, 5, 10, 20, 40, 80]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 - error:g}"))
        axes.grid(alpha=0.25, linewidth=0.6)
    panels[0].set(ylabel="test rows classified right (%, log scale of the errors)", title="Straight after pruning")
    panels[1].set(title=f"After {args.finetune} epochs of fine-tuning")
    panels[0].legend(loc="lower left", frameon=False)
    seeds = f"means of {len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}, bars from the lowest to the highest"
    figure.suptitle(f"Pruning a digits classifier ({seeds})", fontweight="bold")
    figure.savefig(args.output, dpi=100)
    print(f"\npicture: {args.output}")


def draw_method(axes: Any, rows: list[Row], args: argparse.Namespace, method: str, name: str, shift: float) -> None:
    color, marker = {"magnitude": ("#009e73", "s"), "independent": ("#d55e00", "^"), "joint": ("#0072b2", "o")}[method]
    centers, below, above = [], [], []
    for sparsity in args.sparsity:
        wrong = [100 - 100 * getattr(r, name) for r in rows if (r.method, r.sparsity) == (method, sparsity)]
        centers.append(max(statistics.mean(wrong), 0.1))  # a logarithm has no zero
        below.append(centers[-1] - max(min(wrong), 0.1))
        above.append(max(wrong) - centers[-1])
    places = [place + shift for place in range(len(args.sparsity))]  # so that the bars do not hide each other
    style: dict[str, Any] = {"marker": marker, "markersize": 7, "linewidth": 2, "capsize": 4}
    axes.errorbar(places, centers, yerr=[below, above], color=color, label=METHODS[method], **style)


def parse_arguments() -> argparse.Namespace:
    digits = Path(__file__).parent.parent / "data" / "digits.csv"
    parser = argparse.ArgumentParser(
        description="Prunes a digits classifier three ways and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=str(digits), help="CSV: numeric features, last column an integer label, header optional")
    add("--scale", choices=["all", "column"], default="all", help="one factor for all features, or one a column")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, initial weights and batches")
    add("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95], help="steps, ascending")
    add("--epochs", type=int, default=20, help="of the dense model")
    add("--finetune", type=int, default=5, help="epochs after each step")
    add("--batch", type=int, default=100, help="rows per step of training")
    add("--num-grads", type=int, default=1024, help="per-sample gradients in each Fisher matrix")
    add("--damping", type=float, default=1e-5, help="of the Fisher matrix")
    add("--rounds", type=int, default=4, help="recomputations of the gradients from one step to the next")
    add("--output", help="draw accuracy against sparsity into this PNG file (needs matplotlib)")
    add("--json", help="write all rows to this file")
    add("--quiet", action="store_true", help="no progress, only the table")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)  # a network this small runs fastest so
    total = len(args.seeds) * len(METHODS) * len(args.sparsity)
    progress = Progress("pruned", total, args.quiet)
    rows: list[Row] = []
    try:
        for number, seed in enumerate(args.seeds):
            rows += run_seed(args, seed, progress, number * total // len(args.seeds))
    except CsvError as error:
        print(error, file=sys.stderr)
        return 2
    print_results(rows, args)
    if args.json:
        results: list[dict[str, Any]] = [row._asdict() for row in rows]
        Path(args.json).write_text(json.dumps(results) + "\n")
    if args.output:
        draw(rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
