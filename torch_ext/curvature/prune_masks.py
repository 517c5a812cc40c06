"""Keeps pruned weights at zero while any optimizer trains the model."""

from __future__ import annotations

import contextlib
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

    ``torch.func.functional_call`` runs with the tensors it is given as they are: neither they nor their gradients are
    masked. ``torch.jit.script`` does not take the hooks: script after :meth:`remove`.

    Args:
        model: whose forward pass is used in training.
        masks: parameter name -> bool tensor of its shape, True = kept. A tied weight may go by any of its names.

    Raises:
        ValueError: a name that the model does not have, or a shape.
        TypeError: a mask that is not bool.
        RuntimeError: later, in the model's forward pass, a load or the step of its optimizer: a masked parameter that
            the model no longer has, or of another shape. ``PruneMasks.of(model).remove()`` takes the masks off.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        masks = by_first_name(model, masks, "PruneMasks: the model has no parameter '{}'")
        for name, mask in masks.items():
            _check_mask(name, mask, model.get_parameter(name))
        self.__setstate__({name: mask.detach().clone() for name, mask in masks.items()})
        try:
            self._attach(model)
            model.register_forward_pre_hook(self)
            model.register_load_state_dict_post_hook(self._after_load)  # type: ignore[no-untyped-call]
        except BaseException:
            self.remove()
            raise

    def __getstate__(self) -> dict[str, Tensor]:
        return self._masks

    def __setstate__(self, masks: dict[str, Tensor]) -> None:
        self._masks = masks
        self._model: weakref.ref[nn.Module] | None = None  # of a copy: set by its first forward pass
        self._hooks: dict[str, tuple[weakref.ref[Tensor], Any]] = {}  # gradient hooks, and on which tensor
        self._versions: dict[str, tuple[int, int]] = {}  # which tensor, and its version

    @staticmethod
    def of(model: nn.Module) -> PruneMasks | None:
        """The masks that are applied to this model, such as those of a copy."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, PruneMasks):
                with contextlib.suppress(_ModelChanged):  # remove() must be within reach
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
            masks = [self._masks[name] for name in weights]
            torch.ops.torch_ext.prune_model_apply_masks_(list(weights.values()), masks)
        self._versions = {name: stamp for name, weight in weights.items() if (stamp := _stamp(weight)) is not None}

    def check(self) -> None:
        """Raises RuntimeError, as the forward pass would, where the model has changed under the masks."""
        self._weights()

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
        weights = self._weights()
        if len(weights) < len(self._masks):
            return  # inside functional_call
        # Writing to unchanged weights would invalidate the graph of an earlier forward pass.
        if any(self._versions.get(name) != _stamp(weight) for name, weight in weights.items()):
            self.apply()
        for name, weight in weights.items():
            hooked = self._hooks.get(name)
            if weight.requires_grad and (hooked is None or hooked[0]() is not weight):
                if hooked is not None:
                    hooked[1].remove()
                hook = functools.partial(_mask_gradient, weakref.ref(self), name)
                handle = weight.register_hook(hook)  # type: ignore[no-untyped-call]
                self._hooks[name] = (weakref.ref(weight), handle)
        _live.update((self,))
        _register_once()

    def _weights(self) -> dict[str, Tensor]:
        """The masked parameters, less those for which functional_call has swapped a tensor in."""
        model = None if self._model is None else self._model()
        if model is None:
            raise RuntimeError("PruneMasks: the model is gone, or this copy has not run yet: PruneMasks.of(model)")
        weights: dict[str, Tensor] = {}
        for name, mask in self._masks.items():
            weight = _find(model, name)
            if weight is None:
                raise _ModelChanged(name, "is no longer a parameter of the model")
            if not isinstance(weight, nn.Parameter):
                continue
            if weight.shape != mask.shape:
                raise _ModelChanged(name, f"has shape {list(weight.shape)} now, and its mask {list(mask.shape)}")
            weights[name] = weight
        return weights

    def _after_load(self, module: nn.Module, incompatible: Any) -> None:
        self._attach(module)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        model = None if self._model is None else self._model()
        if model is None:
            return
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        if any(id(_find(model, name)) in stepped for name in self._masks):
            self.apply()  # whatever the version counters say: torch's fused optimizers leave them alone


class _ModelChanged(RuntimeError):
    def __init__(self, name: str, what: str) -> None:
        super().__init__(
            f"PruneMasks: the masked parameter '{name}' {what}; PruneMasks.of(model).remove() takes the masks off"
        )


_live: weakref.WeakSet[PruneMasks] = weakref.WeakSet()


@functools.cache
def _register_once() -> Any:
    return register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for masks in list(_live):
        masks._after_step(optimizer)


def _stamp(weight: Tensor) -> tuple[int, int] | None:
    return None if weight.is_inference() else (id(weight), weight._version)


def _find(model: nn.Module, name: str) -> Tensor | None:
    """What is registered under this name: a parameter, whatever functional_call has swapped in, or nothing.

    Not ``getattr``, which would compute a parametrised tensor.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(owner)._parameters.get(leaf)
    except AttributeError:
        return None


def _check_mask(name: str, mask: Tensor, weight: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"PruneMasks: the mask of parameter '{name}' must be bool, True = kept, got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"PruneMasks: the mask of parameter '{name}' has shape {list(mask.shape)}, the parameter "
            f"{list(weight.shape)}"
        )


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the name under which ``named_parameters`` lists it; they differ where tied."""
    first = {id(weight): name for name, weight in model.named_parameters()}
    return {name: first[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}


def by_first_name(model: nn.Module, masks: Mapping[str, Tensor], unknown: str) -> dict[str, Tensor]:
    """The masks under the first names of their parameters; ``unknown`` is the message for any other name."""
    first = first_names(model)
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name not in first:
            raise ValueError(unknown.format(name))
        if first[name] in found:
            raise ValueError(f"masks names parameter '{first[name]}' twice, also as '{name}': the two are tied")
        found[first[name]] = mask
    return found


def _mask_gradient(owner: weakref.ref[PruneMasks], name: str, gradient: Tensor) -> Tensor:
    masks = owner()
    if masks is None:
        return gradient
    masked: Tensor = torch.ops.torch_ext.prune_model_mask_gradient(gradient, masks._masks[name].to(gradient.device))
    return masked
