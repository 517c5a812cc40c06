"""Draws the curves that the train_digits or train_mfac programs wrote with --json, and prints them as one table.

    python examples/python/plot_digits.py cpp.json python.json --output digits.png --table

C++ is drawn as a wide pale line and Python as a thin dashed one, so that two equal curves are both seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from common import print_table
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# Told apart by the colour-blind too.
COLORS = {
    "AdaHessian": "#0072b2",
    "MFAC float32": "#0072b2",
    "MFAC bfloat16": "#56b4e9",
    "MFAC int8": "#cc79a7",
    "MFAC topk": "#e69f00",
    "AdamW": "#d55e00",
    "SGD": "#009e73",
}
STYLES: dict[str, dict[str, Any]] = {
    "C++": {"linewidth": 4.5, "alpha": 0.4},
    "Python": {"linewidth": 1.4, "dashes": (5, 2)},
}


def read_results(paths: list[str]) -> list[dict[str, Any]]:
    results = []
    for path in paths:
        try:
            results.append(json.loads(Path(path).read_text()))
        except OSError as error:
            sys.exit(f"{path}: cannot be read: {error.strerror}")
        except ValueError as error:
            sys.exit(f"{path}: is no result of train_digits or train_mfac: {error}")
    return results


def print_merged_table(results: list[dict[str, Any]]) -> None:
    rows = [["optimizer", "language", "final train loss", "test accuracy", "s/epoch", "x first-order cost"]]
    runs = {(run["optimizer"], result["language"]): run for result in results for run in result["runs"]}
    for name, language in sorted(runs, key=lambda key: list(COLORS).index(key[0])):
        run = runs[name, language]
        adamw = runs.get(("AdamW", language), {"seconds": []})["seconds"]
        ratios = [a / b for a, b in zip(run["seconds"], adamw, strict=False)]
        loss, accuracy, seconds = run["train_loss"][-1], run["test_accuracy"][-1], statistics.median(run["seconds"])
        cost = f"{statistics.median(ratios):.2f}" if ratios else "-"
        rows.append([name, language, f"{loss:.4f}", f"{accuracy:.4f}", f"{seconds:.4f}", cost])
    print_table(rows, left=2)
    print("\ns/epoch: one thread, evaluation excluded. x first-order cost: over AdamW's seconds for the same epoch.")
    print("Both are medians over the epochs.")
    for name in dict.fromkeys(name for name, _ in runs):
        curves = [run["train_loss"] for (other, _), run in runs.items() if other == name]
        if len(curves) == 2 and len(curves[0]) == len(curves[1]):
            gap = max(abs(a - b) for a, b in zip(*curves, strict=True))
            same = "the same bits in every epoch" if curves[0] == curves[1] else f"at most {gap:.0e} apart"
            print(f"{name}: the train losses of C++ and Python are {same}.")


def draw(results: list[dict[str, Any]], path: str) -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (loss, accuracy) = plt.subplots(
        1, 2, figsize=(12, 5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    lowest = 100.0
    for result in results:
        for run in result["runs"]:
            style = {"color": COLORS[run["optimizer"]], **STYLES[result["language"]]}
            epochs = range(1, len(run["train_loss"]) + 1)
            style["marker"] = "o" if len(epochs) == 1 else ""  # one point makes no line
            percent = [100 * value for value in run["test_accuracy"]]
            loss.plot(epochs, run["train_loss"], **style)
            accuracy.plot(epochs, percent, **style)
            lowest = min(lowest, percent[min(2, len(percent) - 1)])
    for axes in (loss, accuracy):
        axes.set(xlabel="epoch", xlim=(0.5, results[0]["epochs"] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25, which="both", linewidth=0.6)
    loss.set(yscale="log", ylabel="mean cross-entropy (nats, log scale)", title="Train loss: lower is better")
    loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 0.1, not 10^-1
    accuracy.set(ylim=(lowest - 1, 100.2), ylabel="test rows classified right (%)")
    accuracy.set_title("Test accuracy: higher is better")

    names = dict.fromkeys(run["optimizer"] for result in results for run in result["runs"])
    handles = [Line2D([], [], color=COLORS[name], linewidth=3, label=name) for name in names]
    languages = dict.fromkeys(result["language"] for result in results)
    handles += [Line2D([], [], color="0.25", label=language, **STYLES[language]) for language in languages]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)
    rows = f"{results[0]['train_rows']} train and {results[0]['test_rows']} test rows, seed {results[0]['seed']}"
    methods = [*dict.fromkeys(name.split()[0] for name in names)]  # "MFAC int8" is a way to run MFAC
    listed = " and ".join([", ".join(methods[:-1]), methods[-1]] if len(methods) > 1 else methods)
    figure.suptitle(f"One program, one line exchanged: {listed} ({rows})", fontweight="bold")
    figure.savefig(path, dpi=100)  # 1200 x 500 pixels


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the curves of the train_digits or train_mfac programs.")
    parser.add_argument("results", nargs="+", help="files written with --json, one a language")
    parser.add_argument("--output", help="write the picture to this PNG file")
    parser.add_argument("--table", action="store_true", help="print one table of all results")
    args = parser.parse_args()
    results = read_results(args.results)
    if args.table:
        print_merged_table(results)
    if args.output:
        draw(results, args.output)
        print(f"curves: {args.output}")


if __name__ == "__main__":
    main()
