"""M-FAC: natural gradient steps with the full empirical Fisher matrix of the last m gradients.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
arXiv:2107.03356. All parameters of a window are one vector, in the order of the groups, each row-major. With g the
gradient (negated for maximize), t the rows in the window and F as in
:mod:`torch_ext.reference.curvature.fisher_window`::

    row = g + weight_decay p            coupled decay; a parameter without a gradient gives zeros
    q   = the stored row
    u   = F^-1 q                        times t/m with warmup_scaling: damping m/t lambda and an average over t rows
    u   = m q / (m lambda + |q|^2)      instead, for the first warmup_steps rows (times t/m too): one row alone
    b   = momentum b + (1 - dampening) u
    p   = p (1 - lr weight_decay)       with decoupled decay only
    p   = p - lr b

``dampening`` None is ``momentum`` (an average); 0 is the heavy ball. A parameter without a gradient is not written and
its momentum stays. A row that is not finite changes nothing but the count of skipped steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from torch_ext.reference.curvature.fisher_window import FORMATS, FisherWindowReference


@dataclass(frozen=True)
class MFACReferenceOptions:
    """The options of one parameter group; those of ``GLOBAL`` must be the same in every group."""

    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    dampening: float | None = None
    decoupled_weight_decay: bool = False
    num_grads: int = 1024
    damping: float = 1e-5
    window_format: str = "float32"
    topk: float = 0.01
    error_feedback: bool = False
    warmup_scaling: bool = False
    warmup_steps: int = 0
    blocks: str = "global"
    maximize: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"MFAC: {name} must be {rule}, got {getattr(self, name)!r}")

        require(0 <= self.lr < math.inf, "lr", "finite and >= 0")
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "finite and >= 0")
        require(self.dampening is None or 0 <= self.dampening < 1, "dampening", "None or in [0, 1)")
        require(self.num_grads >= 1, "num_grads", ">= 1")
        require(0 < self.damping < math.inf, "damping", "finite and > 0")
        require(self.window_format in FORMATS, "window_format", f"one of {FORMATS}")
        require(0 < self.topk <= 1, "topk", "in (0, 1]")
        require(
            not self.error_feedback or self.window_format not in ("float32", "float64"),
            "error_feedback",
            "False with window_format float32 or float64",
        )
        require(self.warmup_steps >= 0, "warmup_steps", ">= 0")
        require(self.blocks in ("global", "per_group"), "blocks", "'global' or 'per_group'")


GLOBAL = (
    "num_grads",
    "damping",
    "window_format",
    "topk",
    "error_feedback",
    "warmup_scaling",
    "warmup_steps",
    "blocks",
    "maximize",
)


@dataclass
class _Param:
    tensor: Tensor
    options: MFACReferenceOptions
    opmath: torch.dtype
    group: int
    state: dict[str, Tensor] = field(default_factory=dict)


class MFACReference:
    """M-FAC in plain torch on the CPU, the oracle of the compiled optimizer.

    ``step(grads)`` takes the gradients; ``step_closure`` differentiates a loss first. ``params`` is a list of tensors
    or of groups ``{"params": [...], **options}``. State of a parameter: ``step`` (0-dim float32, accepted steps that
    wrote it) and, with momentum, ``momentum_buffer`` (float64 for float64 parameters, else float32).
    """

    def __init__(self, params: Sequence[Tensor] | Sequence[Mapping[str, Any]], **options: Any) -> None:
        base = MFACReferenceOptions(**options)
        self.params: list[_Param] = []
        for number, item in enumerate(params):
            group: Mapping[str, Any] = item if isinstance(item, Mapping) else {"params": [item]}
            merged = replace(base, **{k: v for k, v in group.items() if k != "params"})
            for f in GLOBAL:
                if getattr(merged, f) != getattr(base, f):
                    raise ValueError(f"MFAC: {f} must be the same in every group")
            for p in group["params"]:
                opmath = torch.float64 if p.dtype == torch.float64 else torch.float32
                self.params.append(_Param(p, merged, opmath, number if isinstance(item, Mapping) else 0))
        self.options = base
        self.damping = base.damping
        self.global_skipped = 0
        self.windows: dict[int, FisherWindowReference] = {}

    @property
    def tensors(self) -> list[Tensor]:
        return [p.tensor for p in self.params]

    @property
    def window_count(self) -> int:
        """Rows in the (first) window."""
        return next((w.count for w in self.windows.values()), 0)

    def set_damping(self, damping: float) -> None:
        """Another lambda from the next step on; the rows stay."""
        replace(self.options, damping=damping)  # checks it
        self.damping = damping
        for window in self.windows.values():
            window.damping = damping

    def blocks(self) -> list[list[int]]:
        """The indices of the parameters of each window."""
        indices = list(range(len(self.params)))
        if self.options.blocks == "global":
            return [indices]
        groups = dict.fromkeys(p.group for p in self.params)
        return [[i for i in indices if self.params[i].group == g] for g in groups]

    def flat(self, block: Sequence[int], grads: Sequence[Tensor | None]) -> Tensor:
        """The row of one window before encoding."""
        parts = []
        for i in block:
            p, g = self.params[i], grads[i]
            o = p.options
            if g is None:
                parts.append(torch.zeros(p.tensor.numel(), dtype=p.opmath))
                continue
            row = -g.to(p.opmath) if o.maximize else g.to(p.opmath)
            if o.weight_decay != 0 and not o.decoupled_weight_decay:
                row = row + p.tensor.detach().to(p.opmath) * o.weight_decay
            parts.append(row.reshape(-1))
        wide = torch.float64 if self.options.window_format == "float64" else torch.float32
        return torch.cat([part.to(wide) for part in parts])

    def window(self, number: int, dim: int) -> FisherWindowReference:
        o = self.options
        if number not in self.windows:
            self.windows[number] = FisherWindowReference(
                o.num_grads, dim, self.damping, o.window_format, topk=o.topk, error_feedback=o.error_feedback
            )
        return self.windows[number]

    def update(self, window: FisherWindowReference) -> Tensor:
        """u, in the arithmetic of the window."""
        o, m, q = self.options, self.options.num_grads, window.matrix[-1]
        if window.accepted <= o.warmup_steps:
            u = q * (m / (m * self.damping + float(q @ q)))
        else:
            u = window.solve_newest()
        if o.warmup_scaling:
            u = u * (window.count / m)
        return u.to(window.dtype)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One update from dL/dp like each parameter; None: the parameter has no gradient."""
        if all(g is None for g in grads):
            return
        blocks = [b for b in self.blocks() if any(grads[i] is not None for i in b)]
        rows = [self.flat(block, grads) for block in blocks]
        windows = [self.window(self.params[b[0]].group, row.numel()) for b, row in zip(blocks, rows, strict=True)]
        before = [(w.rows, w.error, w.accepted) for w in windows]
        if not all(w.push(row) for w, row in zip(windows, rows, strict=True)):
            for w, kept in zip(windows, before, strict=True):
                w.rows, w.error, w.accepted = kept
            self.global_skipped += 1
            return
        for block, window in zip(blocks, windows, strict=True):
            u = self.update(window)
            sizes = [self.params[i].tensor.numel() for i in block]
            for i, part in zip(block, torch.split(u, sizes), strict=True):
                if grads[i] is not None:
                    self._write(self.params[i], part.reshape(self.params[i].tensor.shape).to(self.params[i].opmath))

    def _write(self, param: _Param, u: Tensor) -> None:
        o, state = param.options, param.state
        p = param.tensor.to(param.opmath)
        if o.decoupled_weight_decay and o.weight_decay != 0:
            p = p * (1 - o.lr * o.weight_decay)
        if o.momentum != 0:
            dampening = o.momentum if o.dampening is None else o.dampening
            buffer = state.get("momentum_buffer", torch.zeros_like(p))
            u = state["momentum_buffer"] = buffer * o.momentum + u * (1 - dampening)
        param.tensor.copy_(p - u * o.lr)
        state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1

    def step_closure(self, closure: Callable[[], Tensor]) -> Tensor:
        """Differentiates the loss that ``closure`` returns, then :meth:`step`. Returns the loss."""
        with torch.enable_grad():
            loss = closure()
            grads = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        self.step(grads)
        return loss.detach()

    def precondition(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """F^-1 of any vector given like the parameters, by the window of the last step."""
        out = [v.clone() for v in vectors]
        for block in self.blocks():
            x = torch.cat([vectors[i].reshape(-1).double() for i in block])
            y = self.window(self.params[block[0]].group, x.numel()).ihvp(x)
            for i, part in zip(block, torch.split(y, [vectors[i].numel() for i in block]), strict=True):
                out[i] = part.reshape(vectors[i].shape).to(vectors[i].dtype)
        return out


OPTION_NAMES = tuple(f.name for f in fields(MFACReferenceOptions))
