"""Optimal transport drawn: the colours of one photograph moved to those of another, and one digit flowing into another.

    python examples/python/sinkhorn_colour.py [--output sinkhorn.png] [--samples 800] [--steps 60] [--seed 0] [--quiet]

Colours: both photographs (scikit-learn's samples) give `samples` pixels; ops.sinkhorn_newton transports one sample to
the other, and its potential g extends the map to every pixel x of the first photograph:

    T(x) = sum_j w_j(x) y_j,   w(x) = softmax_j((g_j - |x - y_j|^2 / 2) / eps)

Digits: points drawn from a handwritten 3 follow the negative gradient of the debiased nn.SinkhornLoss to points drawn
from an 8. The printed divergences are that loss; 0 means equal clouds.
"""

from __future__ import annotations

import argparse
import sys
import time

import matplotlib

matplotlib.use("Agg")
import torch
from common import print_table
from matplotlib import pyplot as plt
from torch import Tensor

from torch_ext import nn, ops

COLOUR_EPS = 4e-3  # colours in [0, 1]^3
DIGIT_EPS = 1e-3  # positions in [0, 1]^2


def photographs() -> tuple[Tensor, Tensor]:
    """Two photographs [rows, columns, 3] in [0, 1], every third row and column."""
    from sklearn.datasets import load_sample_image

    names = ("china.jpg", "flower.jpg")
    first, second = (torch.from_numpy(load_sample_image(name)[::3, ::3].copy()).double() / 255 for name in names)
    return first, second


def half_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x[:, None] - y[None]).square().sum(-1)


def transferred(image: Tensor, palette: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """The image in the colours of the palette's image, the info of the solve, and divergences before and after."""
    pixels, colours = image.reshape(-1, 3), palette.reshape(-1, 3)
    x = pixels[torch.randperm(len(pixels))[:samples]]
    y = colours[torch.randperm(len(colours))[:samples]]
    uniform = torch.full((samples,), 1 / samples, dtype=x.dtype)
    result = ops.sinkhorn_newton(half_squared_distances(x, y), uniform, uniform, COLOUR_EPS)
    moved = [
        torch.softmax((result.g - half_squared_distances(part, y)) / COLOUR_EPS, dim=1) @ y
        for part in pixels.split(4096)
    ]
    new = torch.cat(moved)
    loss = nn.SinkhornLoss(COLOUR_EPS, debias=True)
    fresh = [torch.randperm(len(pixels))[:samples], torch.randperm(len(colours))[:samples]]
    before, after = loss(pixels[fresh[0]], colours[fresh[1]]), loss(new[fresh[0]], colours[fresh[1]])
    return new.reshape(image.shape), result.info, torch.stack([before, after])


def digit_points(index: int, count: int) -> Tensor:
    """Points drawn from the ink of one of scikit-learn's 8 x 8 digits, made finer; [count, 2] in [0, 1]."""
    from sklearn.datasets import load_digits

    fine = 64
    image = torch.from_numpy(load_digits().images[index])[None, None]
    ink = torch.nn.functional.interpolate(image, size=(fine, fine), mode="bicubic").clamp_min(0).square()
    cell = torch.multinomial(ink.reshape(-1), count, replacement=True)
    corner = torch.stack([cell % fine, fine - 1 - cell // fine], dim=1).double()
    return (corner + torch.rand(count, 2, dtype=corner.dtype)) / fine


def flow(start: Tensor, target: Tensor, steps: int) -> tuple[list[Tensor], list[float]]:
    """The clouds along x <- x - n grad loss, and their losses: n undoes the weight 1/n of a point in the gradient."""
    loss = nn.SinkhornLoss(DIGIT_EPS, debias=True)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.1 * len(x))
    clouds, losses = [], []
    for step in range(steps + 1):
        optimizer.zero_grad()
        value = loss(x, target)
        losses.append(float(value.detach()))
        clouds.append(x.detach().clone())
        if step < steps:
            value.backward()
            optimizer.step()
    return clouds, losses


def draw(pictures: list[tuple[str, Tensor]], clouds: list[tuple[str, Tensor]], target: Tensor, output: str) -> None:
    figure = plt.figure(figsize=(12, 4.9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    for axes, (title, picture) in zip(top.subplots(1, len(pictures)), pictures, strict=True):
        axes.imshow(picture.clamp(0, 1).numpy())
        axes.set_title(title)
        axes.axis("off")
    for axes, (title, cloud) in zip(bottom.subplots(1, len(clouds)), clouds, strict=True):
        axes.scatter(*target.T.numpy(), s=7, color="#c8c8c8", linewidths=0)
        axes.scatter(*cloud.T.numpy(), s=7, color="#0072b2", linewidths=0)
        axes.set(title=title, xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=[], yticks=[])
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="sinkhorn.png")
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    start = time.perf_counter()
    first, second = photographs()
    forward, info, there = transferred(first, second, arguments.samples)
    backward, info_back, back = transferred(second, first, arguments.samples)
    points, target = digit_points(3, 600), digit_points(8, 600)
    clouds, losses = flow(points, target, arguments.steps)
    if not arguments.quiet:
        print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)

    rows = [["transport", "divergence before", "after", "Newton steps", "passes", "marginal error"]]
    for name, report, (before, after) in (("china to flower", info, there), ("flower to china", info_back, back)):
        cells = [f"{float(before):.5f}", f"{float(after):.5f}"]
        rows.append([name, *cells, f"{int(report[1])}", f"{int(report[2])}", f"{float(report[0]):.1e}"])
    rows.append(["digit 3 to digit 8", f"{losses[0]:.5f}", f"{losses[-1]:.1e}", "-", "-", "-"])
    print_table(rows)

    chosen = sorted({round(arguments.steps * share) for share in (0, 0.05, 0.15, 0.35, 1)})
    draw(
        [
            ("china", first),
            ("flower", second),
            ("china in flower's colours", forward),
            ("flower in china's colours", backward),
        ],
        [(f"step {k}: {losses[k]:.1e}", clouds[k]) for k in chosen],
        target,
        arguments.output,
    )


if __name__ == "__main__":
    main()
