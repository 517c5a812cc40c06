"""Online assignment with stochastic rewards and capacities."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torch_ext import _C


class BalanceResult(NamedTuple):
    """What :func:`stochastic_balance` returns."""

    choice: Tensor  #: ``[..., R, n, K]`` int32, -1: dropped
    success: Tensor  #: ``[..., R, n, K]`` bool
    load: Tensor  #: ``[..., R, m]`` float64
    value: Tensor  #: ``[..., R]`` float64: sum of the weights of the successes


def _discount(g: str | Tensor) -> tuple[str, Tensor | None]:
    return ("table", g) if isinstance(g, Tensor) else (g, None)


def _capacities(capacity: int | Tensor | None, prob: Tensor) -> Tensor | None:
    if isinstance(capacity, int):
        return torch.full((prob.size(-1),), capacity, dtype=torch.int64)
    return capacity


def stochastic_balance(
    prob: Tensor,
    weight: Tensor | None = None,
    capacity: int | Tensor | None = None,
    *,
    rule: Literal["discount", "balance", "load", "greedy"] = "discount",
    g: Literal["auto", "exp", "survival"] | Tensor = "auto",
    top_k: int = 1,
    overflow: Literal["drop", "spill"] = "drop",
    seed: int = 0,
    replicates: int = 1,
) -> BalanceResult:
    """Sends arrivals, one by one and for good, to servers that leave after ``capacity`` successes. Experimental.

    An attempt on server u succeeds with probability p_uv. Among the servers with p > 0 and room left an arrival goes to
    the one with the largest key, of equal ones the lowest number; load_u is the sum of p over the attempts on u /
    capacity_u::

        discount   weight p (1 - g(load))
        balance    - attempts / capacity       the rule for equal p (Mehta and Panigrahi, FOCS 2012)
        load       - load, of equal ones the larger p (weak for unequal p; for comparison)
        greedy     weight p                    1/2-competitive

    Analyses: arXiv:2002.01802, arXiv:2309.10289, with capacities arXiv:2411.16947 (1 - 1/e as they grow). Their own
    discount functions solve differential equations and can be given as a table; no ratio is claimed for unequal p.

    Tokens to experts: ``stochastic_balance(ones, scores, C, top_k=K, overflow="spill")`` with scores ``[T, E]`` is a
    causal assignment that exceeds no capacity while any expert has room. Routing then depends on the tokens before, so
    training and inference must begin a sequence alike; take the gates afterwards from the scores.

    Args:
        prob: ``[..., n arrivals, m servers]`` in [0, 1]; 0: no edge.
        weight: >= 0, ``[m]``, ``[n, m]`` or like ``prob``; 1 if None.
        capacity: integers >= 1 ``[m]``, or one for all; 1 if None.
        g: ``"exp"`` exp(x - 1); ``"survival"`` 1 - exp(-x); ``"auto"``: the first if every capacity is at least 10; or
            a table ``[points, 2]`` of x (increasing) and g(x) in [0, 1) (not decreasing), linear between.
        top_k: K servers per arrival, all different, by their keys before the arrival.
        overflow: where fewer than K servers have room: ``"drop"`` (-1), or ``"spill"`` to the least loaded.
        seed: of the outcomes.
        replicates: R runs with other outcomes.

    Returns:
        choice, success, load, value; no gradients. Computed in float64: CPU and CUDA choose alike, to the bit. An
        outcome depends on seed, place in the batch, replicate, arrival and slot alone, so that rules can be compared on
        common chances.

    Raises:
        ValueError: shapes, options, and on the CPU values out of range (on CUDA such a p is no edge).
        TypeError: dtypes.
    """
    kind, table = _discount(g)
    return BalanceResult(
        *torch.ops.torch_ext.stochastic_balance(
            prob,
            weight,
            _capacities(capacity, prob),
            table,
            rule=rule,
            g=kind,
            top_k=top_k,
            overflow=overflow,
            seed=seed,
            replicates=replicates,
        )
    )


def stochastic_balance_exact(
    prob: Tensor,
    weight: Tensor | None = None,
    capacity: int | Tensor | None = None,
    *,
    rule: Literal["discount", "balance", "load", "greedy"] = "discount",
    g: Literal["auto", "exp", "survival"] | Tensor = "auto",
) -> float:
    """The expected value of a rule on one problem ``[n, m]``, n <= 16, by recursion over the outcomes."""
    return _C.stochastic_balance_exact(prob, weight, _capacities(capacity, prob), rule, *_discount(g))


def stochastic_optimum(prob: Tensor, weight: Tensor | None = None) -> float:
    """The most that a policy reaches which knows all of ``prob`` ``[n, m]``, m <= 16, and sees outcomes; capacities 1.

    No rule exceeds it in expectation.
    """
    return _C.stochastic_optimum(prob, weight)


def fluid_lp_equal_p(edges: Tensor, p: float, capacity: int | Tensor | None = None) -> float:
    """max sum p x over ``edges`` ``[n, m]`` bool, sum_v p x <= capacity_u, sum_u x <= 1, x >= 0: no policy has more."""
    return _C.fluid_lp_equal_p(edges, p, _capacities(capacity, edges))


class OnlineAssigner:
    """The rules of :func:`stochastic_balance` where the outcomes come from outside.

    Args:
        servers: m.
        weight, capacity: ``[m]``; ``weight`` may also come with each arrival.
        rule, g: as in :func:`stochastic_balance`.

    Attributes:
        load: float64 ``[m]``; attempts, done: int64 ``[m]``; on the CPU.
    """

    def __init__(
        self,
        servers: int,
        weight: Tensor | None = None,
        capacity: int | Tensor | None = None,
        *,
        rule: Literal["discount", "balance", "load", "greedy"] = "discount",
        g: Literal["auto", "exp", "survival"] | Tensor = "auto",
    ) -> None:
        self.load = torch.zeros(max(servers, 0), dtype=torch.float64)
        self.attempts, self.done = (torch.zeros(max(servers, 0), dtype=torch.int64) for _ in range(2))
        self._weight, self._capacity = weight, _capacities(capacity, self.load)
        self._rule = (rule, *_discount(g))
        _C.balance_check(servers, self._weight, self._capacity, *self._rule)

    def assign(self, prob: Tensor, weight: Tensor | None = None) -> int:
        """The server for an arrival with these probabilities ``[m]``, or -1; counts the attempt."""
        given = self._weight if weight is None else weight
        return _C.balance_assign(prob, given, self._capacity, *self._rule, self.load, self.attempts, self.done)

    def report(self, server: int, success: bool) -> None:
        """How the attempt on a server ended."""
        _C.balance_report(self.attempts, self.done, server, success)

    def state_dict(self) -> dict[str, Any]:
        """Loads, attempts and successes."""
        return {"load": self.load, "attempts": self.attempts, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them; ValueError if they are of another number of servers."""
        for name in ("load", "attempts", "done"):
            if state_dict[name].shape != self.load.shape:
                raise ValueError(f"OnlineAssigner: {name} has shape {list(state_dict[name].shape)}")
        for name in ("load", "attempts", "done"):
            getattr(self, name).copy_(state_dict[name])
