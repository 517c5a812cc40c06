"""Online assignment: replicates of a random problem, and tokens to experts, against the loop in numpy that peers have.

PYTHONPATH=. python benchmarks/moe/bench_stochastic_balance.py [--json FILE] [--rounds 15]

Peers are scripts without a package; "numpy" is the same rule over one row at a time, vectorised over servers; we wrote
it. The unit of "ns per entry" is one arrival and one server.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import paired

from torch_ext import moe


def numpy_run(prob: np.ndarray, chance: np.ndarray) -> float:
    """The default rule with g = 1 - exp(-load) and capacities 1."""
    servers = prob.shape[1]
    load, free, value = np.zeros(servers), np.ones(servers, dtype=bool), 0.0
    for v in range(len(prob)):
        key = np.where(free & (prob[v] > 0), prob[v] * np.exp(-load), -1.0)
        u = int(key.argmax())
        if key[u] < 0:
            continue
        load[u] += prob[v, u]
        if chance[v] < prob[v, u]:
            free[u] = False
            value += 1.0
    return value


def numpy_experts(scores: np.ndarray, top_k: int, capacity: int) -> np.ndarray:
    """Tokens to experts with room, key score (1 - exp(load - 1))."""
    load = np.zeros(scores.shape[1])
    chosen = np.empty((len(scores), top_k), dtype=np.int64)
    for t in range(len(scores)):
        key = np.where(load < 1, scores[t] * (1 - np.exp(load - 1)), -1.0)
        chosen[t] = np.argpartition(-key, top_k)[:top_k]
        load[chosen[t]] += 1 / capacity
    return chosen


def measure(rounds: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    n, m, replicates = 1000, 32, 100
    prob: Tensor = torch.from_numpy(rng.random((n, m)) * 0.05)
    chance = rng.random(n)
    tokens, experts, top_k = 4096, 64, 8
    capacity = tokens * top_k // experts
    scores = torch.sigmoid(torch.from_numpy(rng.normal(size=(tokens, experts)) + rng.normal(size=experts)))
    ones = torch.ones_like(scores)
    sides: dict[str, paired.Side] = {
        "replicates": (lambda: moe.stochastic_balance(prob, replicates=replicates), replicates),
        "numpy replicate": (lambda: numpy_run(prob.numpy(), chance), 1),
        "experts": (lambda: moe.stochastic_balance(ones, scores, capacity, top_k=top_k, overflow="spill"), 1),
        "numpy experts": (lambda: numpy_experts(scores.numpy(), top_k, capacity), 1),
    }
    times = paired.rounds(sides, rounds)
    return {
        f"stochastic_balance, {n} arrivals, {m} servers, {replicates} replicates, one thread": {
            "numpy / ours, per replicate": paired.ratio(times, "numpy replicate", "replicates"),
            "ns per entry": paired.milliseconds(times, "replicates") * 1e6 / (n * m),
            "self": paired.ratio(times, "self", "replicates"),
        },
        f"stochastic_balance, {tokens} tokens to {top_k} of {experts} experts, one thread": {
            "numpy / ours": paired.ratio(times, "numpy experts", "experts"),
            "us per token": paired.milliseconds(times, "experts") * 1e3 / tokens,
        },
    }


if __name__ == "__main__":
    paired.main(__doc__, lambda arguments: measure(arguments.rounds).items())
