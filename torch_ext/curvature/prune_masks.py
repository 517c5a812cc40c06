"""Keeps pruned weights at zero while any optimizer trains the model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class PruneMasks:
    """Masks that stay applied to a model's parameters until :meth:`remove`.

    Gradients of pruned weights are zero, and after the step of any ``torch.optim.Optimizer`` the weights are set to
    zero again, whatever momentum, decay or noise did to them; so they are after ``load_state_dict`` and, for loops
    without such an optimizer, before the next forward pass. Names, shapes and ``state_dict`` of the model do not
    change. A copy of the model (``deepcopy``, pickle) carries masks of its own, which :meth:`of` finds. To take them up
    in another process, save ``masks`` beside the model's state and construct ``PruneMasks(model, masks)``.

    Args:
        model: whose forward pass is used in training.
        masks: parameter name -> bool tensor of its shape, True = kept.

    Raises:
        ValueError: a name that the model does not have, or a shape.
        TypeError: a mask that is not bool.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        for name in masks:
            if name not in parameters:
                raise ValueError(f"PruneMasks: the model has no parameter '{name}'")
        self.__setstate__({name: mask.detach().clone() for name, mask in masks.items()})
        self._attach(model)  # checks dtypes and shapes before anything is registered
        model.register_forward_pre_hook(self)
        model.register_load_state_dict_post_hook(self._after_load)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Tensor]:
        return self._masks

    def __setstate__(self, masks: dict[str, Tensor]) -> None:
        self._masks = masks
        self._model: weakref.ref[nn.Module] | None = None  # of a copy: set by its first forward pass
        self._hooks: dict[str, tuple[weakref.ref[Tensor], Any]] = {}  # gradient hooks, and on which tensor
        self._versions: dict[str, int] = {}

    @staticmethod
    def of(model: nn.Module) -> PruneMasks | None:
        """The masks that are applied to this model, such as those of a copy."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, PruneMasks):
                hook._attach(model)
                return hook
        return None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor, True = kept; for ``torch.save``."""
        return dict(self._masks)

    def apply(self) -> None:
        """Sets the pruned weights to zero now."""
        weights = self._weights()
        for name, weight in weights.items():
            self._masks[name] = self._masks[name].to(weight.device)
        with torch.no_grad():
            torch.ops.torch_ext.prune_model_apply_masks_(list(weights.values()), list(self._masks.values()))
        self._versions = {name: weight._version for name, weight in weights.items() if not weight.is_inference()}

    def remove(self) -> None:
        """Lets the weights go: they keep their values and are trained like all others from now on."""
        model = None if self._model is None else self._model()
        if model is not None:
            for hooks in (model._forward_pre_hooks, model._load_state_dict_post_hooks):
                for key in [key for key, hook in hooks.items() if hook in (self, self._after_load)]:
                    del hooks[key]
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        _live.discard(self)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """The forward pre-hook."""
        if torch.compiler.is_compiling():
            return  # the step hook has done it
        self._attach(module)

    def _attach(self, model: nn.Module) -> None:
        if self._model is None or self._model() is not model:
            self._model = weakref.ref(model)
            _live.update((self,))
            _register_once()
        weights = self._weights()
        # Writing to unchanged weights would invalidate the graph of an earlier forward pass.
        if any(self._versions.get(name) != _version(weight) for name, weight in weights.items()):
            self.apply()
        for name, weight in weights.items():
            hooked = self._hooks.get(name)
            if weight.requires_grad and (hooked is None or hooked[0]() is not weight):
                hook = functools.partial(_mask_gradient, weakref.ref(self), name)
                handle = weight.register_hook(hook)  # type: ignore[no-untyped-call]
                self._hooks[name] = (weakref.ref(weight), handle)

    def _weights(self) -> dict[str, Tensor]:
        model = None if self._model is None else self._model()
        if model is None:
            raise RuntimeError("PruneMasks: the model is gone, or this copy has not run yet: PruneMasks.of(model)")
        return {name: model.get_parameter(name) for name in self._masks}

    def _after_load(self, module: nn.Module, incompatible: Any) -> None:
        self._attach(module)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._model is None or self._model() is None:
            return
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        if any(id(weight) in stepped for weight in self._weights().values()):
            self.apply()  # whatever the version counters say: torch's fused optimizers leave them alone


_live: weakref.WeakSet[PruneMasks] = weakref.WeakSet()


@functools.cache
def _register_once() -> Any:
    return register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for masks in list(_live):
        masks._after_step(optimizer)


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def _mask_gradient(owner: weakref.ref[PruneMasks], name: str, gradient: Tensor) -> Tensor:
    masks = owner()
    if masks is None:
        return gradient
    masked: Tensor = torch.ops.torch_ext.prune_model_mask_gradient(gradient, masks._masks[name].to(gradient.device))
    return masked
