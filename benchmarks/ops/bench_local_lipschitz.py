"""local_lipschitz over 64 boxes against the same bound in eager torch.

PYTHONPATH=. python benchmarks/ops/bench_local_lipschitz.py [--json FILE] [--rounds 15]

Both peers are our own eager versions, since auto_LiRPA is no package that this project pins:

- "batched" over boxes and outputs: the first product shared, A and -A together, the last layer as an interval;
- "one by one" is torch_ext.reference: one box and one output at a time, as auto_LiRPA's Jacobian bounds work, though
  without its graph.

Forward CROWN and backward tight in all, float32, one thread.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext import ops
from torch_ext.reference.ops import local_lipschitz as one_by_one
from torch_ext.reference.ops.local_lipschitz import product_lines

BOXES, RADIUS = 64, 0.05
NETS = [(16, 64, 64, 10), (64, 72, 32, 10), (16, 64, 64, 64, 10)]

Interval = tuple[Tensor, Tensor]


def relu_lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    is_open = (lower < 0) & (upper > 0)
    slope = torch.where(is_open, upper / torch.where(is_open, upper - lower, 1), (lower >= 0).to(lower))
    return slope, torch.where(is_open, -slope * lower, 0), torch.where(is_open, (upper > -lower).to(lower), slope)


def substitute(a: Tensor, lines: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Rows [groups, rows, width] through lines [groups, width]: coefficients and constants."""
    au, iu, al, il = (line[:, None] for line in lines)
    above = a > 0
    return a * torch.where(above, au, al), (a * torch.where(above, iu, il)).sum(2)


class Eager:
    """Batched over boxes and outputs."""

    def __init__(self, model: nn.Sequential) -> None:
        linear = [layer for layer in model if isinstance(layer, nn.Linear)]
        self.w = [layer.weight.detach() for layer in linear]
        self.b = [layer.bias.detach() for layer in linear]

    def forward(self, lo: Tensor, hi: Tensor) -> list[Interval]:
        bounds: list[Interval] = []
        h = (lo, hi)
        for k in range(len(self.w) - 1):
            middle, radius = (h[0] + h[1]) / 2 @ self.w[k].t() + self.b[k], (h[1] - h[0]) / 2 @ self.w[k].t().abs()
            z = middle - radius, middle + radius
            if k > 0:
                a = torch.cat([self.w[k], -self.w[k]]).expand(len(lo), -1, -1)
                c = torch.cat([self.b[k], -self.b[k]]).expand(len(lo), -1)
                for q in range(k - 1, -1, -1):
                    au, iu, al = relu_lines(*bounds[q])
                    a, more = substitute(a, (au, iu, al, torch.zeros_like(al)))
                    c = c + more + a @ self.b[q]
                    a = a @ self.w[q]
                c = c + (a * torch.where(a > 0, hi[:, None], lo[:, None])).sum(2)
                rows = len(self.w[k])
                z = torch.maximum(z[0], -c[:, rows:]), torch.minimum(z[1], c[:, :rows])
            bounds.append(z)
            h = z[0].relu(), z[1].relu()
        return bounds

    def __call__(self, lo: Tensor, hi: Tensor) -> Tensor:
        outputs, boxes = len(self.w[-1]), len(lo)
        slopes = [
            ((z[0] > 0).to(lo).repeat_interleave(outputs, 0), 1 - (z[1] < 0).to(lo).repeat_interleave(outputs, 0))
            for z in self.forward(lo, hi)
        ]
        last = self.w[-1].repeat(boxes, 1)
        lines = [product_lines(last, last, *slopes[-1], False)]
        ends = lines[0][2] * last, lines[0][0] * last  # the interval of the last product
        for k in range(len(self.w) - 2, -1, -1):
            size = self.w[k].size(1)
            if len(lines) == 1:
                middle, radius = (ends[0] + ends[1]) / 2 @ self.w[k], (ends[1] - ends[0]) / 2 @ self.w[k].abs()
                g = middle - radius, middle + radius
            else:
                c = self.push(torch.cat([self.w[k].t(), -self.w[k].t()])[None], k, lines, ends)
                g = -c[:, size:], c[:, :size]
            if k > 0:
                lines.insert(0, product_lines(*g, *slopes[k - 1], False))
        is_open = (g[0] < 0) & (g[1] > 0)
        width = torch.where(is_open, g[1] - g[0], 1)
        slope = torch.where(is_open, (g[1] + g[0]) / width, torch.where(g[0] >= 0, 1.0, -1.0))
        constant = torch.where(is_open, -2 * g[1] * g[0] / width, 0).sum(1)
        return (self.push((slope @ self.w[0].t())[:, None], 0, lines, ends)[:, 0] + constant).view(boxes, outputs)

    def push(self, a: Tensor, k: int, lines: list[tuple[Tensor, ...]], ends: Interval) -> Tensor:
        c = torch.zeros((), dtype=a.dtype)
        for q, line in enumerate(lines[len(lines) - (len(self.w) - 1 - k) : -1]):
            a, more = substitute(a, line)
            c = c + more
            a = a @ self.w[k + q + 1].t()
        return c + (a * torch.where(a > 0, ends[1][:, None], ends[0][:, None])).sum(2)


def measure(sizes: tuple[int, ...], rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        linear = nn.Linear(a, b)
        nn.init.normal_(linear.weight, std=(2 / a) ** 0.5)
        nn.init.normal_(linear.bias, std=0.3)
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    x = torch.randn(BOXES, sizes[0])
    eager = Eager(model)

    def ours() -> Tensor:
        with torch.no_grad():
            return ops.local_lipschitz(model, x, RADIUS).L

    def train() -> None:
        ops.local_lipschitz(model, x, RADIUS).L.sum().backward()

    def train_detached() -> None:
        ops.local_lipschitz(model, x, RADIUS, detach_intermediate=True).L.sum().backward()

    def batched() -> Tensor:
        return eager(x - RADIUS, x + RADIUS)

    def single(boxes: int) -> Tensor:
        with torch.no_grad():
            rows = [one_by_one(eager.w, eager.b, row - RADIUS, row + RADIUS)[0] for row in x[:boxes]]
        return torch.stack(rows)

    torch.testing.assert_close(ours(), batched(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours()[:2], single(2), rtol=1e-4, atol=1e-4)
    few = 4  # boxes of the slow side in a round; its time per box counts
    sides: dict[str, paired.Side] = {
        "ours": (ours, 1),
        "batched": (batched, 1),
        "one by one": (lambda: single(few), 1),
        "train": (train, 1),
        "train detached": (train_detached, 1),
    }
    times = paired.rounds(sides, rounds)
    times["one by one"] = [t * BOXES / few for t in times["one by one"]]
    return {
        "eager, one by one / ours": paired.ratio(times, "one by one", "ours"),
        "eager, batched / ours": paired.ratio(times, "batched", "ours"),
        "with gradient / without": paired.ratio(times, "train", "ours"),
        "with detached gradient / without": paired.ratio(times, "train detached", "ours"),
        "self": paired.ratio(times, "self", "ours"),
        "ours, ms": paired.milliseconds(times, "ours"),
    }


def run(arguments: argparse.Namespace) -> paired.Results:
    for sizes in NETS:
        title = f"local_lipschitz, {BOXES} boxes of radius {RADIUS}, network {'-'.join(map(str, sizes))}"
        yield title, measure(sizes, arguments.rounds)


if __name__ == "__main__":
    paired.main(__doc__, run)
