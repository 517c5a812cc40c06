"""Stubs of the compiled module: what the dispatcher cannot offer. Internal; csrc/**/*_bind.cpp defines it."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# core
def write_state_dict(value: Any, path: str | PathLike[str]) -> None: ...
def read_state_dict(path: str | PathLike[str], map_location: str | torch.device | None = None) -> Any: ...
def all_reduce_mean(tensors: Sequence[Tensor], group: ProcessGroup, /) -> list[Tensor]: ...

# curvature
def hvp_of_loss(loss: Tensor, params: Sequence[Tensor], v: Sequence[Tensor], /) -> list[Tensor]: ...
def hvp_of_function(
    loss: Callable[[], Any], params: Sequence[Tensor], v: Sequence[Tensor], mode: str, /
) -> list[Tensor]: ...
def hutchinson_diag(loss: Tensor, params: Sequence[Tensor], n_samples: int, seed: int, /) -> list[Tensor]: ...

# optim/base
def optimizers() -> list[str]: ...
def schema(optimizer: str) -> dict[str, Any]: ...
def check_options(optimizer: str, options: dict[str, Any]) -> dict[str, Any]: ...

class CppOptimizer:
    def __init__(self, optimizer: str, groups: list[dict[str, Any]], defaults: dict[str, Any], /) -> None: ...
    def step(self, closure: Callable[[], Any] | None = None, **inputs: Any) -> Tensor | None: ...
    def add_param_group(self, group: dict[str, Any], /) -> None: ...
    def set_option(self, group: int, name: str, value: Any, /) -> None: ...
    def option(self, group: int, name: str, /) -> Any: ...
    def zero_grad(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...
    def save_state_dict(self, path: str, /) -> None: ...
    def load_state_dict_file(self, path: str, /) -> None: ...
    @property
    def skipped_steps(self) -> Tensor: ...

# optim/adahessian
def adahessian_derivatives(
    params: Sequence[Tensor],
    ordinals: Sequence[int],
    n_params: int,
    options: dict[str, Any],
    refresh: bool,
    epoch: int,
    magnitude_only: bool,
    closure: Callable[[], Any] | None,
    curvature_closure: Callable[[], Any] | None,
    hessian: Sequence[Tensor | None] | None,
    scaler_unscaled: bool,
    probes: Sequence[Tensor],
    /,
) -> tuple[list[Tensor | None], list[Tensor], list[Tensor]]: ...
def adahessian_accumulate(
    grads: Sequence[Tensor | None],
    curvature: Sequence[Tensor],
    params: Sequence[Tensor],
    ordinals: Sequence[int],
    n_params: int,
    options: dict[str, Any],
    refresh: bool,
    epoch: int,
    magnitude_only: bool,
    loss: Tensor,
    weight: float,
    /,
) -> tuple[list[Tensor | None], list[Tensor]]: ...
def adahessian_check_loss_scale(scale: float, /) -> None: ...
def adahessian_check_same_params(summed: Sequence[Tensor], now: Sequence[Tensor], /) -> None: ...
def adahessian_apply(
    params: Sequence[Tensor],
    ordinals: Sequence[int],
    owners: Sequence[int],
    grads: Sequence[Tensor | None],
    curvature: Sequence[Tensor],
    states: list[dict[str, Any] | None],
    groups: list[dict[str, Any]],
    refresh: bool,
    found_inf: Tensor | None,
    skipped: Tensor,
    grad_scale: Tensor | None,
    loss_scale: float,
    grads_unscaled: bool,
    external_curvature: bool,
    /,
) -> None: ...
def adahessian_check_state(param: Tensor, options: dict[str, Any], state: dict[str, Tensor], /) -> None: ...
def sinkhorn_unconverged(op: str, info: Tensor) -> str: ...
