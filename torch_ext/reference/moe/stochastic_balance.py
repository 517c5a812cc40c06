"""Online assignment with stochastic rewards, written the slow way.

Arrivals come in order; of the servers with p > 0 and room left an arrival goes to the one with the largest key, of
equal ones the lowest number. load_u is the sum of p over the attempts on u divided by its capacity::

    discount   weight p (1 - g(load))       g = exp(x - 1) below 1 - 2^-20 ("exp"), or 1 - exp(-x) ("survival")
    balance    - attempts / capacity
    load       - load, of equal ones the larger p
    greedy     weight p

Mehta and Panigrahi (FOCS 2012); arXiv:2002.01802, arXiv:2309.10289, arXiv:2411.16947.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

Matrix = Sequence[Sequence[float]]
#: Whether attempt k of arrival v on server u succeeds.
Outcome = Callable[[int, int, int], bool]


def room_left(g: str, load: float) -> float:
    """1 - g(load)."""
    if g == "survival":
        return math.exp(-load)
    return max(1 - math.exp(min(load, 1.0) - 1), 2.0**-20)


class Server:
    """What happened to one server so far."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.attempts, self.done, self.load = capacity, 0, 0, 0.0

    def key(self, rule: str, g: str, weight: float, p: float) -> tuple[float, float]:
        if rule == "discount":
            return weight * p * room_left(g, self.load), 0.0
        if rule == "greedy":
            return weight * p, 0.0
        if rule == "load":
            return -self.load, p
        return -self.attempts / self.capacity, 0.0

    def attempt(self, p: float) -> None:
        self.attempts += 1
        self.load += p / self.capacity


def choose(
    servers: Sequence[Server], p: Sequence[float], weight: Sequence[float], rule: str, g: str, top_k: int, overflow: str
) -> list[int]:
    """The servers of one arrival, -1 where none is left."""
    every = [u for u in range(len(servers)) if p[u] > 0]
    free = [u for u in every if servers[u].done < servers[u].capacity]
    chosen = sorted(free, key=lambda u: [-x for x in servers[u].key(rule, g, weight[u], p[u])] + [u])[:top_k]
    if overflow == "spill":
        rest = sorted((u for u in every if u not in chosen), key=lambda u: (servers[u].load, u))
        chosen += rest[: top_k - len(chosen)]
    return chosen + [-1] * (top_k - len(chosen))


def stochastic_balance_reference(
    prob: Matrix,
    weight: Matrix,
    capacity: Sequence[int],
    outcome: Outcome,
    *,
    rule: str = "discount",
    g: str = "survival",
    top_k: int = 1,
    overflow: str = "drop",
) -> tuple[list[list[int]], float]:
    """Choices ``[n][K]`` and the value of one run; ``weight`` ``[n][m]``."""
    servers = [Server(b) for b in capacity]
    choices, value = [], 0.0
    for v, (p, w) in enumerate(zip(prob, weight, strict=True)):
        chosen = choose(servers, p, w, rule, g, top_k, overflow)
        choices.append(chosen)
        for k, u in enumerate(chosen):
            if u < 0:
                continue
            servers[u].attempt(p[u])
            if outcome(v, k, u):
                servers[u].done += 1
                value += w[u]
    return choices, value


def expected_value(prob: Matrix, weight: Matrix, capacity: Sequence[int], *, rule: str, g: str) -> float:
    """The expected value of a rule, summed over all 2^n vectors of outcomes of n arrivals."""
    total = 0.0
    for outcomes in itertools.product((False, True), repeat=len(prob)):

        def outcome(v: int, k: int, u: int, outcomes: tuple[bool, ...] = outcomes) -> bool:
            return outcomes[v]

        choices, value = stochastic_balance_reference(prob, weight, capacity, outcome, rule=rule, g=g)
        chance = 1.0
        for v, (u,) in enumerate(choices):
            p = prob[v][u] if u >= 0 else 0.0  # who is dropped fails; the vectors in which it succeeds have chance 0
            chance *= p if outcomes[v] else 1 - p
        total += chance * value
    return total
