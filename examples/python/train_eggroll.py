"""Trains a digits classifier without a single backward pass: EGGROLL's pseudo-gradients, taken by Adam.

    python examples/python/train_eggroll.py [--data FILE] [--steps 400] [--seed 0] [--objective loss|errors]

features - 32 - classes, relu; 1400 of the 1797 digits train. Every step evaluates a population of 128 perturbed
networks on one batch of rows, all in one pass, and Adam takes what they say. With --objective errors all that a
member reports is how many rows it classifies wrong: a loss whose gradient is zero everywhere.

The settings are those that work for this problem: population 128, sigma 0.1, rank 1, centered ranks, Adam with lr 0.05
falling linearly to zero. With a population of 2 it does not train. Errors say less than losses, so they take larger
perturbations (sigma 0.2) and batches (256), and end at a lower accuracy.

The table:
  objective       what the members' values are
  N               members of the population
  test accuracy   share of the test rows that the unperturbed network classifies right
  s               seconds of training, evaluation excluded
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import CsvError, Progress, print_table, read_csv, scale_features
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.nn import eggroll_convert
from torch_ext.optim import Eggroll


def values_of(logits: Tensor, y: Tensor, objective: str) -> Tensor:
    """One value a member: mean cross-entropy or share of wrong answers. logits [members, rows, classes], y [rows]."""
    if objective == "errors":
        return logits.argmax(2).ne(y).float().mean(1)
    targets = y.expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(len(logits), -1).mean(1)


@torch.no_grad()
def train(
    train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    x, y = train_set
    torch.manual_seed(args.seed)
    model = eggroll_convert(nn.Sequential(nn.Linear(x.size(1), 32), nn.ReLU(), nn.Linear(32, args.classes)))
    es = Eggroll(model.parameters(), sigma=args.sigma, population=args.population, shaping=args.shaping, seed=args.seed)
    adam = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / args.steps)
    progress = Progress("step", args.steps, args.quiet)
    curve, seconds = [], 0.0
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        batch = torch.randint(len(x), (args.batch,))
        pop = es.ask()
        with pop.applied_to(model):
            logits = model(x[batch].expand(len(pop), -1, -1))  # all members see the same rows
        es.tell(values_of(logits, y[batch], args.objective), update=False)
        adam.step()
        schedule.step()
        seconds += time.perf_counter() - begin
        if step % 20 == 0 or step == args.steps:
            accuracy = (model(test_set[0]).argmax(1) == test_set[1]).float().mean().item()
            curve.append([step, accuracy])
            progress.update(step, f"test accuracy {accuracy:.4f}")
    return {"objective": args.objective, "population": args.population, "curve": curve, "seconds": seconds}


def parse_arguments() -> argparse.Namespace:
    digits = Path(__file__).parent.parent / "data" / "digits.csv"
    parser = argparse.ArgumentParser(
        description="Trains a digits classifier with evolution strategies.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=str(digits), help="CSV: numeric features, last column an integer label, header optional")
    add("--objective", choices=["loss", "errors"], default="loss", help="what a member reports")
    add("--steps", type=int, default=400, help="updates")
    add("--batch", type=int, help="rows that every member sees in a step (default: 64, for errors 256)")
    add("--population", type=int, default=128, help="members; even")
    add("--sigma", type=float, help="size of the perturbations (default: 0.1, for errors 0.2)")
    add("--shaping", default="centered_rank", help="how values become weights, see torch_ext.optim.Eggroll")
    add("--lr", type=float, default=0.05, help="Adam's learning rate, falling to zero")
    add("--seed", type=int, default=0, help="of the split, the initial weights, the batches and the noise")
    add("--json", help="write the curve to this file")
    add("--quiet", action="store_true", help="no progress, only the table")
    args = parser.parse_args()
    errors = args.objective == "errors"
    args.batch = (256 if errors else 64) if args.batch is None else args.batch
    args.sigma = (0.2 if errors else 0.1) if args.sigma is None else args.sigma
    if args.steps < 1 or args.batch < 1:
        parser.error("--steps and --batch must be at least 1")
    return args


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)  # a network this small runs fastest so
    try:
        data = read_csv(args.data)
    except CsvError as error:
        print(error, file=sys.stderr)
        return 2
    args.classes = data.classes
    x = scale_features(data.x, per_column=False)
    torch.manual_seed(args.seed)
    order = torch.randperm(len(x))
    train_rows, test_rows = order.tensor_split([len(x) * 1400 // 1797])
    run = train((x[train_rows], data.y[train_rows]), (x[test_rows], data.y[test_rows]), args)
    accuracy = run["curve"][-1][1]
    rows = [["objective", "N", "test accuracy", "s"]]
    rows.append([run["objective"], str(run["population"]), f"{accuracy:.4f}", f"{run['seconds']:.1f}"])
    print_table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps({"language": "Python", "seed": args.seed, **run}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
