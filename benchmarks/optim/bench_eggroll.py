"""A generation of EGGROLL against plain inference of the same rows, and against dense evolution strategies.

    PYTHONPATH=. python benchmarks/optim/bench_eggroll.py [--json FILE] [--rounds 15] [--width 1024]
                                                          [--cases 4096x1 512x8]

One thread, an MLP of three linear layers of `width` with relu, float32. Rows are members x rows of each member.

  inference   the plain model on all rows at once: what a population could cost at best
  forward     the population's forward pass, noise made on the fly, of each law; inference / forward in percent
  generation  forward and tell(): the same in percent
  dense       torch.func.functional_call under vmap with a full-rank perturbation of its own for each of 64 members,
              drawn anew; per member, over the population's forward pass per member. Written here
  evotorch    its PGPE with a problem that evaluates a batch of parameter vectors in one pass, per member, where it is
              installed

Times are of the thread, so that what other programs take does not count. `memory` is the growth of a process's largest
size while it does one generation with members in chunks of 256, for populations of 256 and 65,536.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext.nn import eggroll_convert
from torch_ext.optim import Eggroll

LAWS = ("gaussian", "binomial16", "binomial64", "rademacher")
DENSE_MEMBERS = 64


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers).requires_grad_(True)


class Generation:
    """A population of one law on fixed rows."""

    def __init__(self, width: int, members: int, rows: int, law: Any) -> None:
        self.model = eggroll_convert(network(width))
        self.optimizer = Eggroll(self.model.parameters(), lr=1e-12, sigma=0.01, population=members, noise=law)
        self.x = torch.randn(members, rows, width)

    def forward(self) -> Tensor:
        pop = self.optimizer.ask()
        with pop.applied_to(self.model):
            y: Tensor = self.model(self.x)
        return y

    def whole(self) -> None:
        self.optimizer.tell(self.forward()[:, 0, 0])


def dense(width: int, rows: int) -> Any:
    """Members with a perturbation of every weight, evaluated by vmap."""
    model = network(width)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(DENSE_MEMBERS, rows, width)

    def one(noise: dict[str, Tensor], x: Tensor) -> Tensor:
        perturbed = {name: p + 0.01 * noise[name] for name, p in params.items()}
        y: Tensor = torch.func.functional_call(model, perturbed, (x,))
        return y

    def run() -> Tensor:
        noise = {name: torch.randn(DENSE_MEMBERS, *p.shape) for name, p in params.items()}
        y: Tensor = torch.vmap(one)(noise, x)
        return y

    return run


def evotorch(width: int, rows: int) -> Any:
    """A generation of PGPE, or None."""
    if importlib.util.find_spec("evotorch") is None:
        return None
    from evotorch import Problem
    from evotorch.algorithms import PGPE

    model = network(width)
    names, shapes = zip(*[(name, p.shape) for name, p in model.named_parameters()], strict=True)
    sizes = [shape.numel() for shape in shapes]
    x = torch.randn(rows, width)

    def one(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        perturbed = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        y: Tensor = torch.func.functional_call(model, perturbed, (x,))
        return y[0, 0]

    problem = Problem("min", torch.vmap(one), solution_length=sum(sizes), initial_bounds=(-0.01, 0.01), vectorized=True)
    search = PGPE(
        problem,
        popsize=DENSE_MEMBERS,
        center_learning_rate=0.01,
        stdev_learning_rate=0.1,
        stdev_init=0.01,
        ranking_method="centered",
    )
    return search.step


def measure(width: int, members: int, rows: int, count: int) -> list[dict[str, Any]]:
    plain, x = network(width), torch.randn(members * rows, width)
    made = {law: Generation(width, members, rows, law) for law in LAWS}
    sides: dict[str, paired.Side] = {"inference": (lambda: plain(x), 1)}
    for law, generation in made.items():
        sides[f"forward {law}"] = (generation.forward, 1)
        sides[f"generation {law}"] = (generation.whole, 1)
    sides["dense"] = (dense(width, rows), 1)
    other = evotorch(width, rows)
    if other is not None:
        sides["evotorch"] = (other, 1)
    times = paired.rounds(sides, count, clock=time.thread_time)
    found = []
    for name in [*list(sides)[1:], "self"]:
        row: dict[str, Any] = {"case": f"{members} x {rows}", "side": name}
        row["milliseconds"] = round(paired.milliseconds(times, name), 1)
        if name in ("dense", "evotorch"):
            pairs = zip(times[name], times["forward gaussian"], strict=True)
            row["per member"] = round(statistics.median(a / DENSE_MEMBERS / (b / members) for a, b in pairs), 2)
        else:
            row["percent"] = round(100 * paired.ratio(times, "inference", name), 1)
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def memory(width: int, members: int) -> int:
    """Bytes by which a process grows, from the end of a first generation of 256 members to that of `members`."""
    model = eggroll_convert(network(width))

    def generation(population: int) -> None:
        optimizer = Eggroll(model.parameters(), lr=1e-12, population=population, chunk_members=256)
        x = torch.randn(256, 1, width)

        def values(pop: Any) -> Tensor:
            with pop.applied_to(model):
                y: Tensor = model(x)
            return y[:, 0, 0]

        optimizer.step(values)

    with torch.no_grad():
        generation(256)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        generation(members)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description="EGGROLL against inference and dense evolution strategies.")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--cases", nargs="+", default=["4096x1", "512x8"], help="members x rows of each")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print(memory(args.width, args.memory))
        return 0
    paired.steady_heap()
    print(paired.machine(), flush=True)
    print("evotorch:", "installed" if importlib.util.find_spec("evotorch") else "not installed", flush=True)
    rows = []
    for case in args.cases:
        members, each = map(int, case.split("x"))
        rows += measure(args.width, members, each, args.rounds)
    for members in (256, 65536):
        command = [sys.executable, __file__, "--width", str(args.width), "--memory", str(members)]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append({"case": f"{members} members", "side": "memory", "MiB": round(grown / 2**20, 1)})
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        figures: dict[str, dict[str, float]] = {}
        for row in rows:
            title = f"EGGROLL, {row['case']}, width {args.width}"
            for name in ("milliseconds", "percent", "per member", "MiB"):
                if name in row:
                    figures.setdefault(title, {})[f"{row['side']}, {name}"] = row[name]
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
