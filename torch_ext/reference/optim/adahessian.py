"""AdaHessian: Adam whose second moment is built from the Hessian diagonal.

Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning",
arXiv:2006.00719. With ``g`` the gradient and ``z`` a Rademacher probe (ours: signs from Philox4x32-10)::

    every update_each steps:   D = average of |(1/S) sum_s z_s * (H z_s)| over blocks of weights that share a role
                               v = b2 v + (1 - b2) D^2,                b2 = beta2^update_each
    every step:                m = beta1 m + (1 - beta1) g
                               mh = m / (1 - beta1^t),  vh = v / (1 - b2^r)         t steps, r refreshes
                               p = p - lr (mh / (vh^(k/2) + eps) + weight_decay p)  k = hessian_power

Blocks (always contiguous in row-major order; L is their length, v holds one number per block):

    ============================  =======================  ==================
    parameter                     L                        shape of v
    ============================  =======================  ==================
    0-D, 1-D, more than 5-D       1                        that of p
    2-D, linear_averaging none    1                        [rows, cols]
    2-D, linear_averaging row     cols                     [rows, 1]
    2-D, linear_averaging block   block_size               [rows, cols / L]
    3-D to 5-D, average_conv      product of dims 2 ...    [out, in, 1, ...]
    ============================  =======================  ==================

Arithmetic: float64 for float64 parameters, else float32 (also for bfloat16 and float16 parameters); scalars are
computed in double and cast once; no fused multiply-add; block sums in float64 in the fixed order of
:func:`block_sum`. The compiled optimizer repeats these operations in this order, so its results are equal to the bit
(``hessian_power`` other than 0, 0.5 and 1 excepted).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_ext.reference.curvature.hvp import LossFn, gradients, hvp, hvp_of_gradients
from torch_ext.reference.ops.rademacher import rademacher


@dataclass(frozen=True)
class AdaHessianReferenceOptions:
    """The options of one parameter group; those of ``GLOBAL`` must be the same in every group."""

    lr: float = 0.15
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-4
    weight_decay: float = 0.0
    hessian_power: float = 1.0
    n_samples: int = 1
    update_each: int = 1
    linear_averaging: str = "none"
    block_size: int = 0
    average_conv: bool = True
    averaging: str = "abs_mean"
    max_update: float | None = None
    hvp: str = "double_backward"
    seed: int = 0
    maximize: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"AdaHessian: {name} must be {rule}, got {getattr(self, name)!r}")

        require(0 <= self.lr < math.inf, "lr", "finite and >= 0")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)")
        require(0 <= self.eps < math.inf, "eps", "finite and >= 0")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "finite and >= 0")
        require(0 <= self.hessian_power <= 1, "hessian_power", "in [0, 1]")
        require(self.n_samples >= 1, "n_samples", ">= 1")
        require(self.update_each >= 1, "update_each", ">= 1")
        require(self.linear_averaging in ("none", "row", "block"), "linear_averaging", "'none', 'row' or 'block'")
        require(self.block_size >= (1 if self.linear_averaging == "block" else 0), "block_size", "positive")
        require(self.averaging in ("abs_mean", "signed_mean"), "averaging", "'abs_mean' or 'signed_mean'")
        require(self.max_update is None or self.max_update > 0, "max_update", "None or > 0")
        require(self.hvp in ("double_backward", "finite_difference"), "hvp", "'double_backward' or 'finite_difference'")


GLOBAL = ("n_samples", "update_each", "hvp", "seed")


def block_length(shape: Sequence[int], options: AdaHessianReferenceOptions, name: str = "parameter") -> int:
    """L of the table above."""
    if len(shape) == 2 and options.linear_averaging == "row":
        return shape[1] or 1
    if len(shape) == 2 and options.linear_averaging == "block":
        if shape[1] % options.block_size:
            raise ValueError(
                f"AdaHessian: block_size must divide dimension 1 of {name} {list(shape)}, got {options.block_size}"
            )
        return options.block_size
    if 3 <= len(shape) <= 5 and options.average_conv:
        return math.prod(shape[2:]) or 1
    return 1


def reduced_shape(shape: Sequence[int], length: int) -> list[int]:
    """The shape of v for blocks of ``length`` elements."""
    if length == 1:
        return list(shape)
    if len(shape) == 2:
        return [shape[0], shape[1] // length]
    return [*shape[:2], *([1] * (len(shape) - 2))]


def block_sum(c: Tensor, length: int) -> Tensor:
    """Sums of the consecutive blocks of ``length`` elements in float64, in a fixed order that 32 lanes can follow.

    Below 32 elements: one after the other. Otherwise in segments of 1024 elements: lane l (0 to 31) adds elements l,
    l + 32, ... of the segment in order; lane i then adds lane i + 16, i + 8, 4, 2, 1; the segments are added in
    order.
    """
    rows = c.double().reshape(-1, length)
    total = torch.zeros(rows.size(0), dtype=torch.float64)
    if length < 32:
        for i in range(length):
            total = total + rows[:, i]
        return total
    for begin in range(0, length, 1024):
        segment = rows[:, begin : begin + 1024]
        lanes = torch.zeros(rows.size(0), 32, dtype=torch.float64)
        for i in range(0, segment.size(1), 32):
            part = segment[:, i : i + 32]
            lanes[:, : part.size(1)] = lanes[:, : part.size(1)] + part
        for width in (16, 8, 4, 2, 1):
            lanes = lanes[:, :width] + lanes[:, width : 2 * width]
        total = total + lanes[:, 0]
    return total


def averaged_diagonal(c: Tensor, length: int, *, scale: float, averaging: str) -> Tensor:
    """D, up to its sign when ``length`` is 1 (only D^2 is used): one number per block, in the dtype of ``c``."""
    if length == 1:
        return c * scale
    if averaging == "abs_mean":
        mean = block_sum(c.abs(), length) / length
    else:
        mean = (block_sum(c, length) / length).abs()
    return mean.to(c.dtype).reshape(reduced_shape(c.shape, length)) * scale


def exact_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root, as in C and CUDA.

    ``torch.sqrt`` is not: on x86 it calls MKL, which is 1 ulp off in a fifth of all float32 arguments.
    """
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))


def root(vh: Tensor, hessian_power: float) -> Tensor:
    """``vh^(k/2)``."""
    if hessian_power == 1:
        return exact_sqrt(vh)
    if hessian_power == 0.5:
        return exact_sqrt(exact_sqrt(vh))
    if hessian_power == 0:
        return torch.ones_like(vh)
    return vh.double().pow(hessian_power / 2).to(vh.dtype)


def spread(v: Tensor, shape: Sequence[int], length: int) -> Tensor:
    """One number per block -> one per element."""
    return v if length == 1 else v.reshape(-1, 1).expand(-1, length).reshape(tuple(shape))


@dataclass
class _Param:
    tensor: Tensor
    options: AdaHessianReferenceOptions
    length: int
    opmath: torch.dtype
    state: dict[str, Tensor] = field(default_factory=dict)


class AdaHessianReference:
    """AdaHessian in plain torch on the CPU, the oracle of the compiled optimizer.

    ``step(grads, curvature)`` is the arithmetic alone; ``step_closure`` differentiates a loss first. ``params`` is a
    list of tensors or of groups ``{"params": [...], **options}``.

    State of a parameter, empty before its first accepted step: ``step`` (0-dim float32), ``exp_avg`` (like p),
    ``exp_hessian_diag_sq`` (one number per block), ``bias_products`` (float64 [2]: product of beta1 over the accepted
    steps, of b2 over the refreshes). For all parameters: ``global_calls``, completed steps that saw a gradient, and
    ``global_skipped``, those of them that met a non-finite number and changed nothing else.
    """

    def __init__(self, params: Sequence[Tensor] | Sequence[Mapping[str, Any]], **options: Any) -> None:
        base = AdaHessianReferenceOptions(**options)
        self.params: list[_Param] = []
        for item in params:
            group: Mapping[str, Any] = {"params": [item]} if isinstance(item, Tensor) else item
            merged = replace(base, **{k: v for k, v in group.items() if k != "params"})
            for f in GLOBAL:
                if getattr(merged, f) != getattr(base, f):
                    raise ValueError(f"AdaHessian: {f} must be the same in every group")
            for p in group["params"]:
                length = block_length(p.shape, merged, f"parameter {len(self.params)}")
                opmath = torch.float64 if p.dtype == torch.float64 else torch.float32
                self.params.append(_Param(p, merged, length, opmath))
        self.options = base
        self.global_calls = 0
        self.global_skipped = 0

    @property
    def tensors(self) -> list[Tensor]:
        return [p.tensor for p in self.params]

    @property
    def is_refresh(self) -> bool:
        """The next step needs the curvature."""
        return self.global_calls % self.options.update_each == 0

    def probe(self, sample: int) -> list[Tensor]:
        """The signs z of one sample of the next refresh, for all parameters, with or without gradient."""
        epoch = self.global_calls // self.options.update_each
        return [
            rademacher(
                p.tensor.shape, seed=self.options.seed, stream=sample, ordinal=i, epoch=epoch, dtype=p.tensor.dtype
            )
            for i, p in enumerate(self.params)
        ]

    def curvature(self, products: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """c = sum_s z_s * (H z_s) * (1/S) from the products ``H z_s`` of all samples.

        With one sample and abs_mean, |z * Hz| = |Hz| and only |c| matters: the compiled optimizer then takes c = Hz.
        """
        c = [torch.zeros(p.tensor.shape, dtype=p.opmath) for p in self.params]
        for s, sample in enumerate(products):
            for i, (p, h, z) in enumerate(zip(self.params, sample, self.probe(s), strict=True)):
                c[i] = c[i] + z.to(p.opmath) * h.to(p.opmath) * (1 / self.options.n_samples)
        return c

    @torch.no_grad()
    def step(
        self,
        grads: Sequence[Tensor | None],
        curvature: Sequence[Tensor | None] | None = None,
        *,
        loss_scale: float = 1.0,
        hessian: Sequence[Tensor | None] | None = None,
    ) -> None:
        """One update.

        Args:
            grads: dL/dp like each parameter; a parameter with None is left alone. curvature: c of :meth:`curvature`,
            like the parameters; needed when :attr:`is_refresh`. None in it is zero. loss_scale: the loss, hence
            ``grads`` and ``curvature``, carried this factor. hessian: D from outside, like the parameters, instead of
            ``curvature``, at any step; not divided by loss_scale.
        """
        live = [
            (p, g.to(p.opmath), i) for i, (p, g) in enumerate(zip(self.params, grads, strict=True)) if g is not None
        ]
        if not live:
            return
        source = curvature if hessian is None else hessian
        if source is None and self.is_refresh:
            raise RuntimeError("AdaHessian: this step refreshes the curvature and none was given")
        c: dict[int, Tensor] = {}
        if source is not None:
            for p, _, i in live:
                entry = source[i]
                c[i] = torch.zeros(p.tensor.shape, dtype=p.opmath) if entry is None else entry.to(p.opmath)
        self.global_calls += 1
        if not all(bool(t.isfinite().all()) for t in [*(g for _, g, _ in live), *c.values()]):
            self.global_skipped += 1
            return
        for p, g, i in live:
            self._update(p, g, c.get(i), 1 / loss_scale, 1.0 if hessian is not None else 1 / loss_scale)

    def _update(self, param: _Param, g: Tensor, c: Tensor | None, g_scale: float, c_scale: float) -> None:
        o, length, state = param.options, param.length, param.state
        if c is None and not state:
            return  # no curvature yet: wait for the refresh, nothing is counted
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros(param.tensor.shape, dtype=param.opmath)
            state["exp_hessian_diag_sq"] = torch.zeros(reduced_shape(param.tensor.shape, length), dtype=param.opmath)
            state["bias_products"] = torch.ones(2, dtype=torch.float64)
        beta1, b2 = o.betas[0], o.betas[1] ** o.update_each
        bias1, bias2 = state["bias_products"].tolist()
        p, m, v = param.tensor.to(param.opmath), state["exp_avg"], state["exp_hessian_diag_sq"]

        g = g * (-g_scale if o.maximize else g_scale)
        if c is not None:
            d = averaged_diagonal(c, length, scale=c_scale, averaging=o.averaging)
            v = v * b2 + (d * d) * (1 - b2)
            bias2 *= b2
        m = m * beta1 + g * (1 - beta1)
        bias1 *= beta1

        mh = m * (1 / (1 - bias1))
        vh = v * (1 / (1 - bias2))
        u = mh / spread(root(vh, o.hessian_power) + o.eps, p.shape, length)
        if o.max_update is not None:
            u = u.clamp(-o.max_update, o.max_update)
        param.tensor.copy_(p - (u + p * o.weight_decay) * o.lr)  # decoupled decay of the old p

        state["step"] = state["step"] + 1
        state["exp_avg"], state["exp_hessian_diag_sq"] = m, v
        state["bias_products"] = torch.tensor([bias1, bias2], dtype=torch.float64)

    def step_closure(
        self,
        closure: LossFn,
        *,
        curvature_closure: LossFn | None = None,
        hessian: Sequence[Tensor | None] | None = None,
        loss_scale: float = 1.0,
    ) -> Tensor:
        """Differentiates the loss that ``closure`` returns, then :meth:`step`. Returns the loss.

        ``curvature_closure`` returns a loss on part of the batch, used for H only.
        """
        o = self.options
        refresh = self.is_refresh and hessian is None
        double = refresh and o.hvp == "double_backward"
        with torch.enable_grad():
            loss = closure()
            grads = gradients(loss, self.tensors, create_graph=double and curvature_closure is None)
        c = None
        if refresh:
            z = [self.probe(s) for s in range(o.n_samples)]
            if double:
                source = grads
                if curvature_closure is not None:
                    with torch.enable_grad():
                        source = gradients(curvature_closure(), self.tensors, create_graph=True)
                products = [
                    hvp_of_gradients(source, self.tensors, zs, retain_graph=s < o.n_samples - 1)
                    for s, zs in enumerate(z)
                ]
            else:
                products = [hvp(curvature_closure or closure, self.tensors, zs, mode=o.hvp) for zs in z]
            c = self.curvature(products)
        self.step([None if g is None else g.detach() for g in grads], c, loss_scale=loss_scale, hessian=hessian)
        return loss.detach()


OPTION_NAMES = tuple(f.name for f in fields(AdaHessianReferenceOptions))
