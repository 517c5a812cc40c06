"""Prunes a model in one call."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from torch_ext import _C
from torch_ext.curvature.prune_masks import PruneMasks, by_first_name, first_names

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PruneModelResult:
    """What :func:`prune_model` did."""

    masks: dict[str, Tensor]  #: parameter name -> bool tensor, True = kept
    sparsity: dict[str, float]  #: zeros / elements of each parameter
    total_sparsity: float  #: over all of them
    predicted_loss_increase: float | None  #: sum over the rounds; None for ``method="magnitude"``
    guard: PruneMasks | None  #: keeps the zeros, and earlier ones, while training; ``guard.remove()`` lets them go

    def __str__(self) -> str:
        lines = [f"{name}: {value:.1%} zeros" for name, value in self.sparsity.items()]
        return "\n".join([*lines, f"total: {self.total_sparsity:.1%} zeros"])


def prune_model(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    batches: Iterable[Any] | None,
    sparsity: float,
    *,
    method: Literal["joint", "independent", "magnitude"] = "joint",
    num_grads: int = 256,
    damping: float = 1e-5,
    block: int | None = None,
    recomputations: int = 1,
    micro_batch: int | None = None,
    parameters: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    keep_masks: bool = True,
    progress: bool | Progress = True,
) -> PruneModelResult:
    """Sets a fraction of a model's weights to zero, chosen over all layers together, and keeps them there.

    Collects ``num_grads`` gradients, builds a :class:`StaticFisher` for each parameter and prunes with
    :func:`obs_prune`; ``recomputations`` times, with fresh gradients, along :func:`sparsity_schedule`. The model is in
    evaluation mode meanwhile (no dropout, no running statistics); ``.grad`` and all flags are left as they were.

    Args:
        model: pruned in place.
        loss_fn: ``loss_fn(model, batch)`` -> scalar loss.
        batches: what ``loss_fn`` takes, such as a DataLoader. One gradient a batch; started again from the beginning
            when it ends before ``num_grads`` (an iterator cannot be: ValueError). Small batches make a better Fisher
            matrix.
        sparsity: zeros / number of elements of the pruned parameters, in [0, 1).
        method: ``"joint"`` or ``"independent"`` (see :func:`obs_prune`), or ``"magnitude"``: the smallest \\|w\\|,
            without any gradient; ``loss_fn`` and ``batches`` may be None.
        num_grads: m, exactly as many gradients a round. Memory: 4 m bytes an element (8 for float64).
        damping: of the Fisher matrix. The default is the published pruner's; it belongs on the scale of the squared
            gradients.
        block: columns a block of the Fisher matrix; None: a whole parameter.
        recomputations: rounds.
        micro_batch: cuts every batch into pieces of so many samples, one gradient each: 1 gives per-sample gradients.
            Batches must then be a tensor, or tuples, lists or dicts of tensors with the samples in dimension 0.
        parameters: names or patterns such as ``"encoder.*.weight"``. Default: all trainable ones of two or more
            dimensions, which leaves out biases and normalisation. What a weight is computed from (weight_norm,
            spectral_norm, orthogonal ...) is pruned only where its own name stands here; else it is a ValueError.
        exclude: names or patterns to leave out; ``"0.weight"`` also stands for what a parametrised 0.weight is computed
            from. A tied weight goes by all its names, here and in ``parameters`` and ``masks``.
        masks: of an earlier call, to prune further; default: those that are applied to the model, if any. Applied masks
            of parameters that this call does not prune stay applied.
        keep_masks: apply the masks as :class:`PruneMasks` while you fine-tune. False: the zeros are only values.
        progress: True shows a bar when standard error is a terminal (tqdm's, where it is installed); or a function
            ``progress(gradients done, gradients in all)``.

    Raises:
        RuntimeError: masks are applied and the model has changed under them (see :class:`PruneMasks`).
        ValueError: a sparsity or option out of range; a name without parameter; batches that end early; a gradient that
            is not finite or that no loss depends on, named. In any case, whatever ``loss_fn`` raises included, weights
            and flags are as before.
    """
    applied = PruneMasks.of(model)
    if applied is not None:
        applied.check()
    names = _select(model, parameters, exclude)
    weights = [model.get_parameter(name) for name in names]
    stay = {} if applied is None else applied.masks
    before = _given_masks(model, masks, names) if masks is not None else stay
    given = [_mask_for(name, weight, before) for name, weight in zip(names, weights, strict=True)] if before else []
    needs_loss = method != "magnitude"
    if needs_loss and (loss_fn is None or batches is None):
        raise ValueError(f'prune_model: method="{method}" needs loss_fn and batches')
    next_loss = _losses(model, loss_fn, batches, micro_batch) if loss_fn is not None and batches is not None else None
    with _evaluation_mode(model), _shown(progress) as show:
        kept, each, total, increase = _C.prune_model(
            *(names, weights, next_loss, sparsity, method, num_grads, damping, block, recomputations, given, show)
        )
    found = dict(zip(names, kept, strict=True))
    stay = {name: mask for name, mask in stay.items() if name not in found}
    if keep_masks:
        stay.update(found)
    guard = PruneMasks(model, stay) if stay else None
    if applied is not None:
        applied.remove()
    return PruneModelResult(found, dict(zip(names, each, strict=True)), total, increase, guard)


def _select(model: nn.Module, parameters: Sequence[str] | None, exclude: Sequence[str]) -> list[str]:
    names = _all_names(model)
    for option, patterns in (("parameters", parameters or ()), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(f"prune_model: {option} must be a list of names, got the string '{patterns}'")
        for pattern in patterns:
            if not any(_matches(known, (pattern,)) for known in names.values()):
                raise ValueError(f"prune_model: {option} names '{pattern}', which is no parameter of the model")
    if parameters is None:
        chosen = [name for name, p in model.named_parameters() if p.requires_grad and p.dim() >= 2]
    else:
        chosen = [name for name in names if _matches(names[name], parameters)]
    chosen = [name for name in chosen if not _matches(names[name], exclude)]
    for name in chosen:
        computed = _computes(model, name)
        if computed is not None and name not in (parameters or ()):
            raise ValueError(
                f"prune_model: '{computed}' is parametrised: remove_parametrizations first (remove_weight_norm and the "
                f"like for older ones), or leave it out with exclude=['{computed}']"
            )
    return chosen


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter -> all it goes by: those of tied weights, and of the tensor computed from it."""
    names: dict[str, list[str]] = {name: [] for name, _ in model.named_parameters()}
    for name, first in first_names(model).items():
        computed = _computes(model, name)
        names[first].extend([name] if computed is None else [name, computed])
    return names


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _computes(model: nn.Module, name: str) -> str | None:
    """The name of the tensor that is computed from this parameter, if it is part of a reparametrisation."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part == "parametrizations":
            path, tensor = parts[:i], parts[i:][1]
            if isinstance(model.get_submodule(".".join([*path, part, tensor])), ParametrizationList):
                return ".".join([*path, tensor])
    owner, _, leaf = name.rpartition(".")
    for hook in model.get_submodule(owner)._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # weight_norm, spectral_norm, prune of old
            target = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
            if target is not None and leaf in (f"{target}_g", f"{target}_v", f"{target}_orig"):
                return f"{owner}.{target}" if owner else str(target)
    return None


def _given_masks(model: nn.Module, masks: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    unknown = "prune_model: masks names '{}', which is not among the parameters to prune"
    found = by_first_name(model, masks, unknown)
    for name in found:
        if name not in names:
            raise ValueError(unknown.format(name))
    return found


def _mask_for(name: str, weight: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    if name not in masks:
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    return masks[name].to(weight.device)


def _losses(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any], micro_batch: int | None
) -> Callable[[], Tensor]:
    pieces = _pieces(batches, micro_batch)

    def next_loss() -> Tensor:
        try:
            piece = next(pieces)
        except StopIteration:
            raise ValueError(
                "prune_model: batches ended before num_grads gradients (times recomputations) were collected; pass a "
                "list or a DataLoader, which can be started again, or lower num_grads"
            ) from None
        return loss_fn(model, piece)

    return next_loss


def _pieces(batches: Iterable[Any], micro_batch: int | None) -> Iterator[Any]:
    while True:
        passed = iter(batches)
        empty = True
        for batch in passed:
            empty = False
            yield from [batch] if micro_batch is None else _split(batch, micro_batch)
        if empty or passed is batches:  # an iterator: it has nothing more to give
            return


def _split(batch: Any, size: int) -> Iterator[Any]:
    if size < 1:
        raise ValueError(f"prune_model: micro_batch must be at least 1, got {size}")
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            raise ValueError("prune_model: micro_batch cuts dimension 0, and a tensor of the batch has no dimension")
        yield from batch.split(size)  # type: ignore[no-untyped-call]
    elif isinstance(batch, Mapping):
        columns = [_split(value, size) for value in batch.values()]
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True))
    elif isinstance(batch, (tuple, list)):
        make = getattr(batch, "_make", list if isinstance(batch, list) else tuple)  # _make: of a namedtuple
        yield from (make(row) for row in zip(*(_split(value, size) for value in batch), strict=True))
    else:
        raise TypeError(f"prune_model: micro_batch cuts tensors, tuples, lists and dicts of them, not {type(batch)}")


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress | None]:
    """What C++ calls after each gradient."""
    if callable(progress):
        yield progress
    elif not (progress and sys.stderr.isatty()):
        yield None
    else:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            yield lambda done, total: print(f"\rgradients {done}/{total}", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            return
        with tqdm(desc="gradients", file=sys.stderr) as bar:
            yield functools.partial(_advance, bar)


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(1)
