"""Certified Lipschitz constants along the training of a digits network, with and without a penalty on them.

    python examples/python/lipschitz_digits.py [--steps 400] [--output lipschitz_digits.png] [--json FILE]

A network 64 - 72 - 32 - 10 learns the digits by Adam. Every tenth of the way its local Lipschitz constant is bounded on
boxes of radius 0.05 around test rows (pixels in [0, 1]): from above by torch_ext.ops.local_lipschitz, which is a proof,
from below by the Jacobian at 64 random points of each box. The penalty adds weight * mean max_i L_i over 16 rows of the
batch to the loss. What lies between the two curves of a colour is unknown.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import CsvError, Progress, print_table, read_csv
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.nn import LipschitzPenalty
from torch_ext.ops import local_lipschitz
from torch_ext.solvers import lipschitz_bab

RADIUS, SAMPLES, PENALISED, MEASURED = 0.05, 64, 16, 48


@dataclass
class Run:
    weight: float
    model: nn.Sequential
    steps: list[int] = field(default_factory=list)
    certified: list[float] = field(default_factory=list)  # means over the measured rows
    sampled: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def sampled_constant(model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """The largest l1 norm of a row of the Jacobian at random points of each box; [rows]."""
    moves = RADIUS * (2 * torch.rand(SAMPLES, *x.shape, generator=generator) - 1)
    points = (x + moves).flatten(0, 1).requires_grad_()
    rows = [torch.autograd.grad(y.sum(), points, retain_graph=True)[0] for y in model(points).unbind(1)]
    return torch.stack(rows).abs().sum(2).amax(0).view(SAMPLES, -1).amax(0)


def measure(run: Run, step: int, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        bound = local_lipschitz(run.model, x[:MEASURED], RADIUS).L.amax(1)
        run.accuracy.append(float((run.model(x).argmax(1) == y).float().mean()))
    run.steps.append(step)
    run.certified.append(float(bound.mean()))
    run.sampled.append(float(sampled_constant(run.model, x[:MEASURED], torch.Generator().manual_seed(step)).mean()))


def train(run: Run, data: tuple[Tensor, Tensor, Tensor, Tensor], args: argparse.Namespace) -> None:
    x, y, test_x, test_y = data
    penalty = LipschitzPenalty(run.model, RADIUS)
    optimizer = torch.optim.Adam(run.model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(args.seed)
    progress = Progress(f"penalty {run.weight:g}", args.steps, args.quiet)
    measure(run, 0, test_x, test_y)
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(x), (128,), generator=generator)
        loss = F.cross_entropy(run.model(x[rows]), y[rows])
        if run.weight > 0:
            loss = loss + run.weight * penalty(x[rows[:PENALISED]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 10) == 0:
            measure(run, step, test_x, test_y)
        progress.update(step, f"loss {loss.item():.3f}")


def network(seed: int, features: int, classes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 72), nn.ReLU(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, classes))


def branch_and_bound(run: Run, x: Tensor) -> None:
    """What fixing ReLUs one by one adds on one row; the forward bounds are kept, so it does not reach the constant."""
    lo, hi = x - RADIUS, x + RADIUS
    results = [lipschitz_bab(run.model, lo, hi, split="activation", max_nodes=n) for n in (1, 400)]
    print(f"penalty {run.weight:g}, one test row: bound {results[0].upper:.2f}, after {results[1].nodes} nodes "
          f"{results[1].upper:.2f}, not below {results[1].lower:.2f}")  # fmt: skip


def draw(runs: list[Run], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for run, color in zip(runs, ["#d55e00", "#56b4e9", "#0072b2"], strict=False):
        name = f"penalty {run.weight:g}" if run.weight else "no penalty"
        left.plot(run.steps, run.certified, color=color, linewidth=2.2, label=f"{name}: certified")
        left.plot(run.steps, run.sampled, color=color, linewidth=1.6, dashes=(4, 2), label=f"{name}: sampled")
        left.fill_between(run.steps, run.sampled, run.certified, color=color, alpha=0.12, linewidth=0)
        right.plot(run.steps, run.accuracy, color=color, linewidth=2.2, label=name)
    left.set(
        yscale="log", xlabel="step", ylabel="local Lipschitz constant in the maximum norm\n(logit per pixel value)"
    )
    left.set_title(f"Boxes of radius {RADIUS} around {MEASURED} test rows, mean")
    right.set(xlabel="step", ylabel="test accuracy", ylim=(0.8, 1), title="What it costs")
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both", linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def parse_arguments() -> argparse.Namespace:
    digits = Path(__file__).parent.parent / "data" / "digits.csv"
    parser = argparse.ArgumentParser(
        description="Certified Lipschitz constants along a training, with and without a penalty.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=str(digits), help="CSV: numeric features, last column an integer label")
    add("--steps", type=int, default=400)
    add("--weights", type=float, nargs="+", default=[0.0, 0.003, 0.01], help="of the penalty")
    add("--seed", type=int, default=0, help="of the split, the weights and the batches")
    add("--json", help="write the curves to this file")
    add("--output", help="draw the curves into this PNG file (needs matplotlib)")
    add("--quiet", action="store_true", help="no progress")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)
    try:
        data = read_csv(args.data)
    except CsvError as error:
        print(error, file=sys.stderr)
        return 2
    x = data.x / data.x.abs().max()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))
    learn, test = order.tensor_split([len(x) * 3 // 4])
    split = x[learn], data.y[learn], x[test], data.y[test]
    runs = [Run(weight, network(args.seed, x.size(1), data.classes)) for weight in args.weights]
    for run in runs:
        train(run, split, args)
    rows = [["penalty", "certified", "sampled", "certified / sampled", "test accuracy"]]
    for run in runs:
        ratio = run.certified[-1] / run.sampled[-1]
        rows.append([f"{run.weight:g}", f"{run.certified[-1]:.2f}", f"{run.sampled[-1]:.2f}", f"{ratio:.2f}",
                     f"{run.accuracy[-1]:.3f}"])  # fmt: skip
    print_table(rows)
    for run in runs:
        branch_and_bound(run, split[2][0])
    if args.json:
        curves = [{**vars(run), "model": None} for run in runs]
        Path(args.json).write_text(json.dumps({"seed": args.seed, "runs": curves}) + "\n")
    if args.output:
        draw(runs, args.output)
        print(f"curves: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
