"""Trains a small byte-level mixture-of-experts transformer with each way to balance its experts, and with none.

    python examples/python/train_moe.py [--text FILE] [--steps 200] [--seed 0] [--json FILE] [--output FILE.png]

The text is that of Python's own help, pydoc_data/topics.py, or your file; nine tenths train. The model: bytes embedded
in 64 numbers, two layers of attention and a mixture of 16 experts (2 per token, one shared), AdamW with a rate that
falls linearly to 0. All runs see the same batches and start from the same weights:

  nothing        the router alone
  aux loss       the balance loss of Switch and GShard, coefficient 0.01
  sign, proportional, momentum, quantile        torch_ext.optim.ALFLB with this rule

The table:
  train, valid loss    cross-entropy per byte in nats, over the last tenth of the steps, and over a fixed part of the
                       rest of the text after the last
  MaxVio               load of the fullest expert over the mean load, minus 1: per batch, mean of the layers and of the
                       last tenth of the steps; valid: over all tokens of the validation at once
  floor                the MaxVio that a perfect balance leaves if the tokens of a batch were drawn independently
  dead                 experts without a token in the validation, of both layers
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Progress, print_table
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import moe
from torch_ext.optim import ALFLB

RUNS: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "aux loss": None,
    "sign": {"lr": 5e-3},
    "proportional": {"rule": "proportional", "lr": 0.2},
    "momentum": {"rule": "momentum", "lr": 5e-3},
    "quantile": {"rule": "quantile", "ema": 0.5},
}
DIM, HEADS, LAYERS, EXPERTS, TOP_K, HIDDEN = 64, 4, 2, 16, 2, 64


class Block(nn.Module):
    """Causal attention, then a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.experts = moe.MoELayer(DIM, HIDDEN, EXPERTS, shared_experts=1, top_k=TOP_K)

    def forward(self, x: Tensor, aux: float) -> tuple[Tensor, Tensor]:
        """The new x, and ``aux`` times the balance loss."""
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, DIM))
        inner = self.norms[1](x)
        return x + self.experts(inner), self.balance_loss(inner, aux)

    def balance_loss(self, inner: Tensor, aux: float) -> Tensor:
        if not aux:
            return torch.zeros(())
        router, tokens = self.experts.router, inner.flatten(0, 1)
        with torch.no_grad():
            counts = moe.route(tokens @ router.weight.t(), router.expert_bias, top_k=TOP_K).counts
        return moe.balance_loss(tokens @ router.weight.t(), counts, aux, score="sigmoid")


class Model(nn.Module):
    """Next-byte prediction."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, DIM), nn.Embedding(length, DIM)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 256)

    def forward(self, tokens: Tensor, aux: float = 0.0) -> tuple[Tensor, Tensor]:
        """``tokens`` [B, T + 1] -> mean cross-entropy, and ``aux`` times the balance losses."""
        x = self.bytes(tokens[:, :-1]) + self.places.weight[: tokens.size(1) - 1]
        extra = torch.zeros(())
        for block in self.blocks:
            x, loss = block(x, aux)
            extra = extra + loss
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), extra

    def routers(self) -> list[moe.MoERouter]:
        return [block.experts.router for block in self.blocks]


class Run:
    """A model, what balances it, and what became of them."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.aux = name, args.aux if name == "aux loss" else 0.0
        torch.manual_seed(args.seed)
        self.model = Model(args.length)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        # A rate of 0 only reads the loads, for the curve of the runs that nothing balances.
        options = RUNS[name]
        self.balancer = ALFLB(self.model, **({"lr": 0.0} if options is None else options))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / args.steps)
        self.curves: dict[str, list[float]] = {"loss": [], "max_vio": []}
        self.floor = 0.0
        self.seconds = 0.0
        self.first_loads: list[list[int]] = []
        self.valid: dict[str, Any] = {}

    def step(self, tokens: Tensor) -> None:
        begin = time.perf_counter()
        loss, extra = self.model(tokens, self.aux)
        (loss + extra).backward()
        self.optimizer.step()
        self.balancer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds += time.perf_counter() - begin
        report = list(self.balancer.report().values())
        self.curves["loss"].append(loss.item())
        self.curves["max_vio"].append(sum(entry["max_vio"] for entry in report) / len(report))
        self.floor = report[0]["floor"]
        if not self.first_loads:
            state = self.balancer.state
            self.first_loads = [state[r.expert_bias]["last_load"].tolist() for r in self.model.routers()]

    @torch.no_grad()
    def validate(self, batches: list[Tensor]) -> None:
        """Loss, and loads over all tokens: counted in the forward pass for once."""
        for router in self.model.routers():
            router.options["count_in"] = "forward"
        losses = [self.model(tokens)[0].item() for tokens in batches]
        report = list(self.balancer.report(pending=True).values())
        self.valid = {
            "loss": sum(losses) / len(losses),
            "max_vio": sum(entry["max_vio"] for entry in report) / len(report),
            "dead": sum(entry["dead"] for entry in report),
            "loads": [load.tolist() for load in self.balancer.loads()],
        }
        self.balancer.discard()
        for router in self.model.routers():
            router.options["count_in"] = "backward"


def late(values: list[float]) -> float:
    """Mean of the last tenth."""
    part = values[-max(1, len(values) // 10) :]
    return sum(part) / len(part)


def print_results(runs: list[Run]) -> None:
    rows = [["balance", "train loss", "valid loss", "MaxVio", "floor", "MaxVio valid", "dead", "ms/step"]]
    for run in runs:
        pace = 1e3 * run.seconds / len(run.curves["loss"])
        numbers = [late(run.curves["loss"]), run.valid["loss"], late(run.curves["max_vio"]), run.floor]
        cells = [f"{x:.4f}" for x in numbers] + [f"{run.valid['max_vio']:.4f}", str(run.valid["dead"]), f"{pace:.1f}"]
        rows.append([run.name, *cells])
    print_table(rows)


def draw(runs: list[dict[str, Any]], path: str) -> None:
    """MaxVio over steps, and the load of every expert before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, *maps) = pyplot.subplots(1, 3, figsize=(15, 4.5), width_ratios=[1.3, 1, 1], layout="constrained")
    for run in runs:
        width = max(1, len(run["max_vio"]) // 60)
        values = torch.tensor(run["max_vio"]).unfold(0, width, 1).mean(1)
        curve.plot(range(len(values)), values, label=run["name"], linewidth=1.2)
    curve.axhline(runs[0]["floor"], color="grey", linestyle=":", label="sampling alone")
    curve.set(xlabel="step", ylabel="MaxVio of the batch", yscale="log", title="imbalance")
    curve.legend(fontsize=8)
    for axis, key, title in zip(maps, ("first_loads", "valid_loads"), ("first step", "validation"), strict=True):
        loads = torch.tensor([[n for layer in run[key] for n in layer] for run in runs], dtype=torch.float64)
        share = loads / loads.sum(1, keepdim=True) * loads.size(1)
        image = axis.imshow(share, aspect="auto", cmap="magma", vmin=0, vmax=3)
        axis.set(title=f"load over mean load, {title}", xlabel="experts of both layers")
        axis.set_yticks(range(len(runs)), [run["name"] for run in runs])
    figure.colorbar(image, ax=maps)
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small mixture-of-experts transformer with each way to balance its experts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", default=pydoc_data.topics.__file__, help="any file of at least 100 kB; its bytes are the tokens")
    add("--steps", type=int, default=200, help="of training")
    add("--batch", type=int, default=64, help="sequences per step")
    add("--length", type=int, default=64, help="bytes per sequence")
    add("--lr", type=float, default=3e-3, help="of AdamW")
    add("--aux", type=float, default=1e-2, help="coefficient of the balance loss")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--only", nargs="*", choices=list(RUNS), default=list(RUNS), help="some of the runs")
    add("--json", help="write the curves to this file")
    add("--output", help="draw them into this file")
    add("--quiet", action="store_true", help="no progress, only the table")
    args = parser.parse_args()
    if min(args.steps, args.batch, args.length) < 1 or not args.only:
        parser.error("--steps, --batch and --length must be at least 1")
    return args


def load(args: argparse.Namespace) -> tuple[Tensor, list[Tensor], torch.Generator]:
    """The training bytes, the validation batches, and the generator of the training batches."""
    try:
        data = torch.frombuffer(bytearray(Path(args.text).read_bytes()), dtype=torch.uint8).long()
    except OSError as error:
        raise SystemExit(f"{args.text}: cannot be read: {error.strerror}") from None
    if len(data) < 100_000:
        raise SystemExit(f"{args.text}: {len(data)} bytes, expected at least 100000")
    cut = len(data) * 9 // 10
    rest = data[cut:]
    rows = min(16 * args.batch, len(rest) // (args.length + 1))
    valid = rest[: rows * (args.length + 1)].reshape(rows, -1)
    return data[:cut], list(valid.split(args.batch)), torch.Generator().manual_seed(args.seed)


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)  # a network this small gains nothing from more
    train, valid, generator = load(args)
    runs = [Run(name, args) for name in args.only]
    progress = Progress("step", args.steps, args.quiet)
    window = torch.arange(args.length + 1)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(train) - args.length, (args.batch, 1), generator=generator)
        tokens = train[starts + window]
        for run in runs:
            run.step(tokens)
        progress.update(step, "  ".join(["MaxVio", *(f"{run.name} {run.curves['max_vio'][-1]:.2f}" for run in runs)]))
    for run in runs:
        run.validate(valid)
    print_results(runs)
    results = [
        {
            "name": run.name,
            **run.curves,
            "floor": run.floor,
            "first_loads": run.first_loads,
            **{f"valid_{key}": value for key, value in run.valid.items()},
        }
        for run in runs
    ]
    if args.json:
        header = {"language": "Python", "torch": torch.__version__, "seed": args.seed, "steps": args.steps}
        Path(args.json).write_text(json.dumps({**header, "runs": results}) + "\n")
    if args.output:
        draw(results, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
