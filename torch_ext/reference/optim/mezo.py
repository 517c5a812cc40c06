"""MeZO: fine-tuning with the memory of inference, from two losses a step.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333, Algorithm 1. z is the noise of
tag 2 of stream 0 with the number of the step as epoch::

    slope = (loss(p + eps z) - loss(p - eps z)) / (2 eps)      negated with maximize
    p     = p - lr (slope z + weight_decay p)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from torch_ext.reference.ops.eggroll import eggroll_noise


@dataclass(frozen=True)
class MeZOReferenceOptions:
    """The options of one parameter group; eps, seed and maximize are the same in every group."""

    lr: float = 1e-6
    eps: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    maximize: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"MeZO: {name} must be {rule}, got {getattr(self, name)!r}")

        require(0 <= self.lr < math.inf, "lr", "finite and >= 0")
        require(0 < self.eps < math.inf, "eps", "finite and > 0")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "finite and >= 0")


OPTION_NAMES = tuple(f.name for f in fields(MeZOReferenceOptions))


class MeZOReference:
    """``groups`` are tensors or dicts ``{"params": [...], **options}``."""

    def __init__(self, groups: Sequence[Tensor] | Sequence[dict[str, Any]], **defaults: Any) -> None:
        items = list(groups)
        dicts = [dict(item) for item in items if isinstance(item, dict)] or [{"params": items}]
        self.params: list[Tensor] = []
        self.options: list[MeZOReferenceOptions] = []  # of each parameter
        for group in dicts:
            own = MeZOReferenceOptions(**{**defaults, **{k: v for k, v in group.items() if k != "params"}})
            for p in group["params"]:
                self.params.append(p)
                self.options.append(own)
        self.calls = 0

    def noise(self, ordinal: int) -> Tensor:
        """z of one parameter, float64."""
        p = self.params[ordinal]
        key: dict[str, Any] = {"seed": self.options[0].seed, "ordinal": ordinal, "epoch": self.calls}
        return eggroll_noise(p.numel(), 1, tag=2, pair_begin=0, pair_end=1, **key).double().view(p.shape)

    @torch.no_grad()
    def step_closure(self, loss: Callable[[], Tensor]) -> Tensor:
        """One update; the mean of both losses."""
        o = self.options[0]
        start = [p.detach().clone() for p in self.params]
        noise = [self.noise(k) for k in range(len(self.params))]
        losses = []
        for sign in (1, -1):
            for p, p0, z in zip(self.params, start, noise, strict=True):
                p.copy_(p0.double() + sign * o.eps * z)
            losses.append(loss().detach().double())
        slope = (losses[0] - losses[1]) * ((-1 if o.maximize else 1) / (2 * o.eps))
        for p, p0, z, own in zip(self.params, start, noise, self.options, strict=True):
            p.copy_(p0.double() - own.lr * (slope * z + own.weight_decay * p0.double()))
        self.calls += 1
        return (losses[0] + losses[1]) / 2
