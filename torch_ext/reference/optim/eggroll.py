"""EGGROLL: evolution strategies with low-rank perturbations.

Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv:2511.16652. N members i evaluate W + s_i sigma E_p, with
s_i = +1, -1 and p = i div 2 (without antithetic pairs s_i = 1 and p = i); E_p as in
:mod:`torch_ext.reference.ops.eggroll`: A_p B_p^T / sqrt(rank) for a matrix, full noise for a vector. With f = -value
(value with maximize)::

    z = shaping(f)                              see shaped()
    c_p = z_2p - z_2p+1                         (z_p without pairs)
    G = -kappa sum_p c_p E_p                    kappa = sigma / sqrt(N), 1 / N or 1 / (N sigma)
    b = momentum b + (G + weight_decay p)
    p = p - lr b

The noise of update t has epoch t div noise_reuse (0 for noise_reuse 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from torch_ext.reference.ops.eggroll import eggroll_noise

SHAPINGS = ("zscore", "grouped", "centered_rank", "sign", "raw", "softmax", "baseline")
LAWS = ("gaussian", "binomial16", "binomial64", "rademacher")


@dataclass(frozen=True)
class EggrollReferenceOptions:
    """The options of one parameter group; all but the first four are the same in every group."""

    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    kind: str | None = None
    sigma: float = 1e-2
    rank: int = 1
    population: int = 256
    antithetic: bool = True
    group_size: int = 0
    noise_reuse: int = 1
    shaping: str = "zscore"
    temperature: float = 1.0
    noise: str = "gaussian"
    update_scale: str = "reference"
    nonfinite: str = "error"
    chunk_members: int | None = None
    seed: int = 0
    maximize: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"Eggroll: {name} must be {rule}, got {getattr(self, name)!r}")

        pairs = self.antithetic
        require(0 <= self.lr < math.inf, "lr", "finite and >= 0")
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "finite and >= 0")
        require(self.kind in (None, "matrix", "embedding", "vector"), "kind", "matrix, embedding, vector or None")
        require(0 < self.sigma < math.inf, "sigma", "finite and > 0")
        require(self.rank >= 1, "rank", ">= 1")
        require(
            self.population >= 2 and not (pairs and self.population % 2), "population", "even, or >= 2 without pairs"
        )
        divides = self.group_size > 0 and self.group_size % 2 == 0 and self.population % self.group_size == 0
        require(self.group_size == 0 or divides, "group_size", "0 or an even divisor of population")
        require(self.noise_reuse >= 0, "noise_reuse", ">= 0")
        require(self.shaping in SHAPINGS and (self.shaping != "sign" or pairs), "shaping", f"one of {SHAPINGS}")
        require(self.shaping != "grouped" or self.group_size > 0, "group_size", "given with shaping='grouped'")
        require(self.shaping != "baseline" or self.baseline >= 4, "group_size", ">= 4 with shaping='baseline'")
        require(0 < self.temperature < math.inf, "temperature", "finite and > 0")
        require(self.noise in LAWS, "noise", f"one of {LAWS}")
        require(self.update_scale in ("reference", "paper", "unbiased"), "update_scale", "reference, paper or unbiased")
        require(self.nonfinite in ("error", "min"), "nonfinite", "error or min")
        chunk = self.chunk_members
        require(chunk is None or (chunk >= 1 and not (pairs and chunk % 2)), "chunk_members", "None or even")

    @property
    def baseline(self) -> int:
        """Members of a group whose first pair carries no noise; 0 without."""
        return (self.group_size or self.population) if self.shaping == "baseline" else 0

    @property
    def kappa(self) -> float:
        n = self.population
        return {
            "reference": self.sigma / math.sqrt(n),
            "paper": 1 / n,
            "unbiased": 1 / (n * self.sigma),
        }[self.update_scale]


OPTION_NAMES = tuple(f.name for f in fields(EggrollReferenceOptions))


def shaped(values: Tensor, o: EggrollReferenceOptions) -> Tensor:
    """Coefficients of the noise, float64 [pairs] (or [members]), from the values of all members."""
    f = values.double() * (1 if o.maximize else -1)
    finite = f.isfinite()
    if not bool(finite.all()):
        if o.nonfinite == "error" or not bool(finite.any()):
            raise ValueError("Eggroll: some values are infinite or NaN")
        f = torch.where(finite, f, f[finite].min())
    if f.min() == f.max():
        z = torch.zeros_like(f)
    elif o.shaping == "zscore":
        z = (f - f.mean()) / torch.sqrt(f.var(correction=0) + 1e-5)
    elif o.shaping == "grouped":
        mean = f.view(-1, o.group_size).mean(1, keepdim=True)
        z = (f.view(-1, o.group_size) - mean).view(-1) / torch.sqrt(f.var(correction=0) + 1e-5)
    elif o.shaping == "centered_rank":
        below = (f[:, None] > f[None, :]).sum(1).double()
        equal = (f[:, None] == f[None, :]).sum(1).double()
        z = (below + (equal - 1) / 2) / (len(f) - 1) - 0.5
    elif o.shaping == "softmax":
        z = torch.softmax(f / o.temperature, 0)
    elif o.shaping == "baseline":
        groups = f.view(-1, o.baseline)
        z = (groups - groups[:, :2].mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-8)
        z[:, :2] = 0
        z = z.reshape(-1)
    else:
        z = f
    if not o.antithetic:
        return z
    difference = z[0::2] - z[1::2]
    return torch.sign(f[0::2] - f[1::2]) if o.shaping == "sign" else difference


class EggrollReference:
    """``groups`` are tensors or dicts ``{"params": [...], **options}``; ``step(values)`` or ``step_closure(loss)``."""

    def __init__(self, groups: Sequence[Tensor] | Sequence[dict[str, Any]], **defaults: Any) -> None:
        items = list(groups)
        dicts = [dict(item) for item in items if isinstance(item, dict)] or [{"params": items}]
        self.params: list[Tensor] = []
        self.options: list[EggrollReferenceOptions] = []  # of each parameter
        for group in dicts:
            own = EggrollReferenceOptions(**{**defaults, **{k: v for k, v in group.items() if k != "params"}})
            for p in group["params"]:
                self.params.append(p)
                self.options.append(own)
        self.buffers = [torch.zeros_like(p, dtype=torch.float64) for p in self.params]
        self.updates = 0
        for p, o in zip(self.params, self.options, strict=True):
            if self.kind(p, o) != "vector" and o.rank > min(p.size(0), p[0].numel()):
                raise ValueError(f"Eggroll: rank must be at most min(m, n), got {o.rank} for shape {tuple(p.shape)}")

    @staticmethod
    def kind(p: Tensor, o: EggrollReferenceOptions) -> str:
        return o.kind or ("matrix" if p.dim() >= 2 else "vector")

    def noise(self, ordinal: int, pair_begin: int, pair_end: int) -> Tensor:
        """E of pairs [pair_begin, pair_end), float64 [pairs, *shape]."""
        p, o = self.params[ordinal], self.options[ordinal]
        key: dict[str, Any] = {
            "seed": o.seed,
            "ordinal": ordinal,
            "pair_begin": pair_begin,
            "pair_end": pair_end,
            "epoch": self.updates // o.noise_reuse if o.noise_reuse else 0,
            "law": o.noise,
        }
        if self.kind(p, o) == "vector":
            return eggroll_noise(p.numel(), 1, tag=2, **key).double().view(-1, *p.shape)
        rows, columns = p.size(0), p[0].numel()
        a = eggroll_noise(rows, o.rank, tag=0, **key).double()
        b = eggroll_noise(columns, o.rank, tag=1, **key).double()
        return (a @ b.transpose(1, 2) / math.sqrt(o.rank)).view(-1, *p.shape)

    @torch.no_grad()
    def values(self, loss: Callable[[], Tensor]) -> Tensor:
        """The loss of every member, which stands in the parameters meanwhile."""
        o = self.options[0]
        pairs = o.population // (2 if o.antithetic else 1)
        noise = [self.noise(k, 0, pairs) for k in range(len(self.params))]
        start = [p.detach().clone() for p in self.params]
        values = []
        for i in range(o.population):
            pair, sign = (i // 2, 1 - 2 * (i % 2)) if o.antithetic else (i, 1)
            plain = o.baseline > 0 and i % o.baseline < 2
            for p, p0, e in zip(self.params, start, noise, strict=True):
                p.copy_(p0 if plain else p0.double() + sign * o.sigma * e[pair])
            values.append(loss().detach())
        for p, p0 in zip(self.params, start, strict=True):
            p.copy_(p0)
        return torch.stack(values)

    @torch.no_grad()
    def step(self, values: Tensor) -> Tensor:
        """One update from the values of all members; their mean."""
        coefficients = shaped(values, self.options[0])
        for k, (p, o) in enumerate(zip(self.params, self.options, strict=True)):
            e = self.noise(k, 0, len(coefficients))
            g = -o.kappa * (coefficients.view(-1, *[1] * p.dim()) * e).sum(0)
            self.buffers[k] = o.momentum * self.buffers[k] + (g + o.weight_decay * p.double())
            p.copy_(p.double() - o.lr * self.buffers[k])
        self.updates += 1
        return values.double().mean()

    def step_closure(self, loss: Callable[[], Tensor]) -> Tensor:
        return self.step(self.values(loss))
