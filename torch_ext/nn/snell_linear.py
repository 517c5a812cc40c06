"""A frozen linear layer with a trainable SNELL branch (arXiv:2411.01800), and what puts it into a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import _C
from torch_ext.ops.snell import Sparsifier, snell_linear

Model = TypeVar("Model", bound=nn.Module)
_ADAPTER = ("lora_in", "lora_out", "sparsity", "start_seed")


class SnellLinear(nn.Module):
    """``linear(x) + x @ phi(W)`` with the wrapped layer frozen; :func:`torch_ext.ops.snell_linear` has the formula.

    Trainable are ``lora_in`` ``[2, in_features, rank / 2]`` and ``lora_out`` ``[2, out_features, rank / 2]``, float32
    (float64 beside a float64 layer), uniform in ``+-1 / sqrt(features * rank / 2)`` at first, as in the published code.
    The gradient carries a factor ``|w|`` of about 1e-3: train with an Adam, and do not clip by the global norm.

    Args:
        linear: its ``weight`` and ``bias`` become this module's under the same names and no longer require a gradient.
        rank: of both kernel pieces together, a multiple of 2; the paper uses 8, 16 and 32.
        sparsity: share of entries that is pruned, in [0, 1); differs by task, the published scripts use 0 to 0.995. An
            attribute that may be set while training.
        scale, sparsifier, grad: as in :func:`torch_ext.ops.snell_linear`; 0.1 is the published, untrained scale.
        dropout: of the branch's input; the paper trains with 0.1.
        start_from_zero: subtract the update of the initial factors, so that training starts from the frozen layer's own
            output. (Zero factors would do so too, but have no gradient.) They are drawn again from the seed when they
            are needed, not stored; the branch costs twice as much until the layer is merged.
        seed: of the initial factors; None draws one from torch's generator.

    State: ``weight``, ``bias``, ``lora_in``, ``lora_out``, ``sparsity`` and, with ``start_from_zero``, ``start_seed``;
    the same names as in C++.

    Raises:
        TypeError: not a floating-point ``torch.nn.Linear``.
        ValueError: an option out of range.
        RuntimeError: ``state_dict()`` of a merged layer.
    """

    lora_in: nn.Parameter
    lora_out: nn.Parameter

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 8,
        sparsity: float = 0.9,
        *,
        scale: float = 0.1,
        sparsifier: Sparsifier = "code",
        grad: Literal["detached", "exact"] = "detached",
        dropout: float = 0.0,
        start_from_zero: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if type(linear) is not nn.Linear:  # a subclass may compute something else, or be read by its owner directly
            raise TypeError(f"SnellLinear: a {type(linear).__name__} cannot be adapted, only torch.nn.Linear itself")
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.scale, self.sparsifier, self.grad, self.dropout = scale, sparsifier, grad, dropout
        self.start_from_zero = start_from_zero
        self.sparsity = sparsity
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._merged: tuple[Tensor, Tensor, float] | None = None
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        shapes = [(2, features, rank // 2) for features in (self.in_features, self.out_features)]
        empty = [torch.empty(shape, dtype=dtype, device=linear.weight.device) for shape in shapes]
        a, b = torch.ops.torch_ext.snell_init(*empty, self.seed)
        self.lora_in, self.lora_out = nn.Parameter(a), nn.Parameter(b)

    def _check(self, sparsity: float) -> None:
        _C.check_snell_options(
            self.in_features,
            self.out_features,
            self.rank,
            sparsity,
            self.scale,
            self.sparsifier,
            self.grad,
            self.dropout,
        )

    @property
    def sparsity(self) -> float:
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        self._check(value)
        self._sparsity = float(value)

    @property
    def merged(self) -> bool:
        return self._merged is not None

    def _branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return snell_linear(x, a, b, self.scale, self._sparsity, sparsifier=self.sparsifier, grad=self.grad)[0]

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight, self.bias)
        if self._merged is not None:
            return base
        x = F.dropout(x.to(base.dtype), self.dropout, self.training)  # the dtype that autocast made
        y = base + self._branch(x, self.lora_in, self.lora_out)
        if self.start_from_zero:
            a, b = torch.ops.torch_ext.snell_init(self.lora_in, self.lora_out, self.seed)
            y = y - self._branch(x, a, b)
        return y

    def _add_to(self, weight: Tensor, a: Tensor, b: Tensor, sparsity: float, factor: float) -> None:
        start = self.seed if self.start_from_zero else None
        _C.snell_add_(weight.detach(), a.detach(), b.detach(), self.scale, sparsity, self.sparsifier, factor, start)

    def merge(self) -> None:
        """Adds ``phi(W)`` to the weight: inference then costs what the plain layer costs."""
        if self._merged is None:
            self._merged = self.lora_in.detach().clone(), self.lora_out.detach().clone(), self._sparsity
            self._add_to(self.weight, *self._merged, 1)

    def unmerge(self) -> None:
        """Subtracts what :meth:`merge` added, which restores the weight to rounding."""
        if self._merged is not None:
            self._add_to(self.weight, *self._merged, -1)
            self._merged = None

    def to_linear(self) -> nn.Linear:
        """A new plain layer with the update in its weight."""
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        result = nn.Linear(self.in_features, self.out_features, self.bias is not None, **options)
        with torch.no_grad():
            result.weight.copy_(self.weight)
            if self.bias is not None:
                result.bias.copy_(self.bias)
        if self._merged is None:
            self._add_to(result.weight, self.lora_in, self.lora_out, self._sparsity, 1)
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._merged is not None:
            raise RuntimeError(
                "SnellLinear: a merged layer is not saved, since its update would count twice: call unmerge() first, "
                "or save what to_linear() returns"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "sparsity"] = torch.tensor(self._sparsity, dtype=torch.float64)
        if self.start_from_zero:
            destination[prefix + "start_seed"] = torch.tensor(self.seed)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        self.unmerge()
        sparsity, seed = (state_dict.pop(prefix + name, None) for name in ("sparsity", "start_seed"))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if sparsity is None:
            missing.append(prefix + "sparsity")
            return
        self.sparsity = float(sparsity)
        self.start_from_zero = seed is not None
        self.seed = self.seed if seed is None else int(seed)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"sparsity={self._sparsity:g}"
        )


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def apply_snell(
    model: Model,
    rank: int = 8,
    sparsity: float = 0.9,
    target_modules: str | Sequence[str] = "all-linear",
    **options: Any,
) -> Model:
    """Puts a :class:`SnellLinear` in the place of each target, and freezes everything else.

    Args:
        model: changed in place.
        rank, sparsity, options: of every layer, as in :class:`SnellLinear`.
        target_modules: ``"all-linear"``; a list of names, each matching itself and everything that ends in
            ``.<name>``; or a regular expression that the whole name must match. ``torch.nn.Linear`` only.

    Returns:
        ``model``. ``snell_state_dict(model)`` is the part that was trained.

    Raises:
        ValueError: nothing matches.
        TypeError: a target is another kind of module; it is named.
    """
    everything = target_modules == "all-linear"
    found: dict[int, SnellLinear] = {}  # a layer that stands in two places stays one
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or not (type(module) is nn.Linear if everything else _is_target(name, target_modules)):
            continue
        if type(module) is not nn.Linear:
            raise TypeError(
                f"apply_snell: target module '{name}' is a {type(module).__name__}; only torch.nn.Linear itself can be "
                "adapted"
            )
        if id(module) not in found:
            found[id(module)] = SnellLinear(module, rank, sparsity, **options).train(module.training)
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, found[id(module)])
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its inference path reads the weights of its layers and would leave the branch out; this turns it off.
            parent.activation_relu_or_gelu = 0
    if not found:
        raise ValueError(f"apply_snell: target_modules {target_modules!r} match no module of the model")
    model.requires_grad_(False)
    for layer in found.values():
        layer.lora_in.requires_grad_()
        layer.lora_out.requires_grad_()
    return model


def snell_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What training changed: the entries ``lora_in``, ``lora_out``, ``sparsity`` (and ``start_seed``) of every layer.

    ``model.load_state_dict(saved, strict=False)`` puts them into a model that ``apply_snell`` has prepared alike.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SnellLinear)]
    wanted = {f"{name}.{entry}" if name else entry for name in names for entry in _ADAPTER}
    return {key: value for key, value in model.state_dict().items() if key in wanted}


class SnellBudget:
    """Shares a falling budget of entries among the layers by their importance (SNELLA, arXiv:2510.24037).

    ``step()`` stands between ``backward`` and the optimizer's ``step``. The entries that all layers together may keep
    fall from ``(1 - initial)`` to ``(1 - target)`` of all by the cubic law ``(1 - progress)^3``. A layer's share is
    proportional to its score, ``mean(EMA(I) * EMA(|I - EMA(I)|))`` over ``lora_in`` plus the same over ``lora_out``
    with ``I = |p * grad|``, and at most all its entries; its sparsity becomes ``1 - share / entries``.

    Args:
        layers: a model or its :class:`SnellLinear` layers.
        total_steps: of the training.
        initial, target: sparsity of the whole model at first and in the end (0.01 and 0.8 in the published scripts).
        betas: of the two averages.
        init_warmup, final_warmup: steps at ``initial`` and at ``target``.

    Raises:
        ValueError: no layer, or an option out of range.
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[SnellLinear],
        total_steps: int,
        *,
        initial: float = 0.01,
        target: float = 0.8,
        betas: tuple[float, float] = (0.85, 0.85),
        init_warmup: int = 0,
        final_warmup: int = 0,
    ) -> None:
        modules = layers.modules() if isinstance(layers, nn.Module) else layers
        self.layers = [layer for layer in modules if isinstance(layer, SnellLinear)]
        self.betas = betas
        self._schedule = (total_steps, initial, target, betas, init_warmup, final_warmup)
        _C.snell_budget_check(len(self.layers), *self._schedule)
        self.steps = 0
        self._factors = [(layer.lora_in, layer.lora_out) for layer in self.layers]
        self._averages = [[(torch.zeros_like(p), torch.zeros_like(p)) for p in pair] for pair in self._factors]
        for layer in self.layers:
            layer.sparsity = initial

    @torch.no_grad()
    def step(self) -> None:
        scores = []
        for pair, averages in zip(self._factors, self._averages, strict=True):
            parts = [
                _C.snell_budget_score(p, torch.zeros_like(p) if p.grad is None else p.grad, *average, *self.betas)
                for p, average in zip(pair, averages, strict=True)
            ]
            scores.append(float(torch.stack(parts).sum()))
        self.steps += 1
        entries = [layer.weight.numel() for layer in self.layers]
        sparsities = _C.snell_budget_split(scores, entries, self.steps, *self._schedule)
        for layer, sparsity in zip(self.layers, sparsities, strict=True):
            layer.sparsity = sparsity

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "averages": [[list(a) for a in pair] for pair in self._averages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = int(state_dict["steps"])
        for mine, saved in zip(self._averages, state_dict["averages"], strict=True):
            for pair, values in zip(mine, saved, strict=True):
                for average, value in zip(pair, values, strict=True):
                    average.copy_(value)
