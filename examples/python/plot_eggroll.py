"""Draws how population, sigma and learning rate decide what EGGROLL learns; the picture of docs/eggroll.md.

    python examples/python/plot_eggroll.py --output eggroll.png [--steps 200]

Every point is one run of train_eggroll.py's training with cross-entropy as the value.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from common import read_csv, scale_features
from matplotlib import pyplot as plt
from train_eggroll import train

POPULATIONS = (2, 8, 32, 128)
SIGMAS = (0.02, 0.1, 0.5)
RATES = (0.005, 0.05, 0.5)
COLORS = ("#56b4e9", "#0072b2", "#d55e00")  # told apart by the colour-blind too


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws what population, sigma and learning rate do.")
    parser.add_argument("--output", type=Path, required=True, help="the picture")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    own = parser.parse_args()
    torch.set_num_threads(1)  # a network this small runs fastest so
    data = read_csv(str(Path(__file__).parent.parent / "data" / "digits.csv"))
    x = scale_features(data.x, per_column=False)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    rows, test = order.tensor_split([1400])

    def accuracy(population: int, sigma: float, lr: float) -> float:
        args = argparse.Namespace(
            population=population,
            sigma=sigma,
            lr=lr,
            steps=own.steps,
            batch=64,
            shaping="centered_rank",
            objective="loss",
            classes=data.classes,
            seed=0,
            quiet=True,
        )
        value: float = train((x[rows], data.y[rows]), (x[test], data.y[test]), args)["curve"][-1][1]
        return value

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for sigma, color in zip(SIGMAS, COLORS, strict=True):
        axes[0].plot(
            POPULATIONS, [accuracy(n, sigma, 0.05) for n in POPULATIONS], "o-", color=color, label=f"{sigma:g}"
        )
    for lr, color in zip(RATES, COLORS, strict=True):
        axes[1].plot(POPULATIONS, [accuracy(n, 0.1, lr) for n in POPULATIONS], "o-", color=color, label=f"{lr:g}")
    for axis, title in zip(axes, ("sigma (lr 0.05)", "lr of Adam (sigma 0.1)"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(POPULATIONS, [str(n) for n in POPULATIONS])
        axis.set_xlabel("N, members of the population")
        axis.grid(alpha=0.3)
        axis.legend(title=title, frameon=False)
    axes[0].set_ylabel(f"test accuracy after {own.steps} steps")
    figure.savefig(own.output, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
