"""Adapts frozen networks with SNELL: a digits classifier to classes it has never seen, and a transformer by name.

    python examples/python/adapt_snell.py [--steps 300] [--output adapt_snell.png] [--json FILE]

1. A network 64 - 128 - 10 learns the digits 0 to 4 and is frozen. Rank-8 adapters of both layers then learn the digits
   5 to 9, full batch, Adam, at two learning rates: SNELL at three sparsities against LoRA. All train the same number of
   parameters, rank (in + out) per layer; three quarters of the rows of each part train, the others test.
2. A small decoder with the module names of Hugging Face's models and random weights: target_modules chooses the
   projections by name, and only what snell_state_dict returns has to be saved.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import CsvError, Progress, print_table, read_csv, scale_features
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.nn import apply_snell, snell_state_dict

RANK, SCALE = 8, 1.0
SPARSITIES = (0.0, 0.5, 0.9)
RATES = (1e-3, 1e-2)


class LoraLinear(nn.Module):
    """The usual low-rank adapter: linear(x) + x A^T B^T with B = 0 at first."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.a.t() @ self.b.t()


@dataclass
class Run:
    name: str
    rate: float
    model: nn.Module
    loss: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def with_lora(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(LoraLinear(part, RANK) if isinstance(part, nn.Linear) else part for part in model))


def adapters(frozen: nn.Sequential, seed: int) -> list[Run]:
    runs = []
    for rate in RATES:
        for sparsity in SPARSITIES:
            # The line that adapts a model.
            model = apply_snell(copy.deepcopy(frozen), RANK, sparsity, scale=SCALE, seed=seed)
            runs.append(Run(f"SNELL, sparsity {sparsity:g}", rate, model))
        torch.manual_seed(seed)
        runs.append(Run("LoRA", rate, with_lora(copy.deepcopy(frozen))))
    return runs


def train(run: Run, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(run.parameters(), run.rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        optimizer.step()
        run.loss.append(loss.item())


def part(x: Tensor, y: Tensor, classes: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three quarters of the rows of some classes, and the others."""
    rows = torch.isin(y, torch.tensor(classes)).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows))]
    learn, test = rows.tensor_split([len(rows) * 3 // 4])
    return x[learn], y[learn], x[test], y[test]


def adapt_digits(args: argparse.Namespace) -> list[Run]:
    data = read_csv(args.data)
    x = scale_features(data.x, False)
    torch.manual_seed(args.seed)
    known, new = part(x, data.y, range(5)), part(x, data.y, range(5, data.classes))
    base = Run("frozen", 1e-2, nn.Sequential(nn.Linear(x.size(1), 128), nn.ReLU(), nn.Linear(128, data.classes)))
    train(base, known[0], known[1], 200)
    runs = adapters(base.model, args.seed)
    progress = Progress("adapter", len(runs), args.quiet)
    for number, run in enumerate(runs, start=1):
        train(run, new[0], new[1], args.steps)
        with torch.no_grad():
            run.accuracy = float((run.model(new[2]).argmax(1) == new[3]).float().mean())
        progress.update(number, f"{run.name}: loss {run.loss[-1]:.3f}")
    rows = [["adapter", "lr", "trained parameters", "final train loss", "test accuracy of 5 to 9"]]
    for run in runs:
        count = sum(p.numel() for p in run.parameters())
        rows.append([run.name, f"{run.rate:g}", f"{count}", f"{run.loss[-1]:.3f}", f"{run.accuracy:.3f}"])
    print_table(rows)
    return runs


# --- a model with the names of Hugging Face's -------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(width, heads), MLP(width)
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, tokens: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.lm_head = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def adapt_transformer(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = Decoder(tokens=32)
    total = sum(p.numel() for p in model.parameters())
    apply_snell(model, RANK, 0.5, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], scale=SCALE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(max(2, args.steps // 3)):  # the token after each is the one before it: a b a b ...
        pair = torch.randint(32, (16, 2))
        tokens = pair.repeat(1, 8)
        loss = F.cross_entropy(model(tokens[:, :-1])[:, 2:].flatten(0, 1), tokens[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    saved = snell_state_dict(model)
    names = list(saved)
    print(f"\nTransformer: {sum(p.numel() for p in trained)} of {total} parameters trained, loss {losses[0]:.2f} -> "
          f"{losses[-1]:.2f}; saved are {len(names)} entries, such as {names[0]} and {names[-2]}.")  # fmt: skip


def draw(runs: list[Run], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip([r.name for r in runs], ["#0072b2", "#56b4e9", "#009e73", "#d55e00"], strict=False))
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, len(RATES), figsize=(12, 5), sharey=True, layout="constrained")
    for axes, rate in zip(panels, RATES, strict=True):
        for run in (r for r in runs if r.rate == rate):
            style = {"linewidth": 2.4, "dashes": (5, 2)} if run.name == "LoRA" else {"linewidth": 2}
            steps = range(1, len(run.loss) + 1)
            axes.plot(steps, run.loss, color=colors[run.name], label=run.name, marker="o" * (len(steps) == 1), **style)
        axes.set(yscale="log", xlabel="step", title=f"Adam, learning rate {rate:g}")
        axes.yaxis.set_major_formatter("{x:g}")  # 0.1, not 10^-1
        axes.grid(alpha=0.25, which="both", linewidth=0.6)
    panels[0].set_ylabel("mean cross-entropy of the digits 5 to 9\n(nats, log scale): lower is better")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"Rank-{RANK} adapters of a frozen 64-128-10 network learn new digits", fontweight="bold")
    figure.savefig(path, dpi=100)


def parse_arguments() -> argparse.Namespace:
    digits = Path(__file__).parent.parent / "data" / "digits.csv"
    parser = argparse.ArgumentParser(
        description="Adapts frozen networks with SNELL and compares it with LoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=str(digits), help="CSV: numeric features, last column an integer label")
    add("--steps", type=int, default=300, help="of each adapter")
    add("--seed", type=int, default=0, help="of the split, the weights and the adapters")
    add("--json", help="write the curves to this file")
    add("--output", help="draw the curves into this PNG file (needs matplotlib)")
    add("--quiet", action="store_true", help="no progress")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)
    try:
        runs = adapt_digits(args)
    except CsvError as error:
        print(error, file=sys.stderr)
        return 2
    adapt_transformer(args)
    curves = [{"adapter": r.name, "lr": r.rate, "loss": r.loss, "accuracy": r.accuracy} for r in runs]
    if args.json:
        Path(args.json).write_text(json.dumps({"seed": args.seed, "runs": curves}) + "\n")
    if args.output:
        draw(runs, args.output)
        print(f"curves: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
