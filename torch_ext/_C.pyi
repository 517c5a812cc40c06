"""Stubs of the compiled module: what the dispatcher cannot offer. Internal; csrc/**/*_bind.cpp defines it."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# core
def write_state_dict(value: Any, path: str | PathLike[str]) -> None: ...
def read_state_dict(path: str | PathLike[str], map_location: str | torch.device | None = None) -> Any: ...
def all_reduce_mean(tensors: Sequence[Tensor], group: ProcessGroup, /) -> list[Tensor]: ...
def all_reduce_sum(tensors: Sequence[Tensor], group: ProcessGroup, /) -> list[Tensor]: ...

# curvature
def hvp_of_loss(loss: Tensor, params: Sequence[Tensor], v: Sequence[Tensor], /) -> list[Tensor]: ...
def hvp_of_function(
    loss: Callable[[], Any], params: Sequence[Tensor], v: Sequence[Tensor], mode: str, /
) -> list[Tensor]: ...
def hutchinson_diag(loss: Tensor, params: Sequence[Tensor], n_samples: int, seed: int, /) -> list[Tensor]: ...
def prune_model(
    names: Sequence[str],
    weights: Sequence[Tensor],
    next_loss: Callable[[], Any] | None,
    sparsity: float,
    method: str,
    num_grads: int,
    damping: float,
    block: int | None,
    recomputations: int,
    masks: Sequence[Tensor],
    progress: Callable[[int, int], None] | None,
    /,
) -> tuple[list[Tensor], list[float], float, float | None]: ...
def sparsity_schedule(sparsity: float, recomputations: int, initial: float, /) -> list[float]: ...
def fisher_window_check(
    num_grads: int, dim: int, damping: float, window_format: str, topk: float, error_feedback: bool, /
) -> None: ...
def fisher_window_bytes(num_grads: int, dim: int, window_format: str, topk: float, error_feedback: bool, /) -> int: ...
def fisher_window_state(
    num_grads: int, dim: int, window_format: str, topk: float, error_feedback: bool, device: torch.device, /
) -> dict[str, Tensor]: ...
def fisher_window_about(damping: float, dim: int, /) -> Tensor: ...
def fisher_window_load(
    num_grads: int,
    dim: int,
    window_format: str,
    topk: float,
    error_feedback: bool,
    damping: float,
    state: dict[str, Tensor],
    saved: dict[str, Tensor],
    /,
) -> None: ...
def fisher_window_check_row(row: Tensor, dim: int, what: str, /) -> None: ...

# ops/local_lipschitz
class LipschitzLayers:
    tensors: list[Tensor]
    layers: list[int]
    numbers: list[float]
    names: str
    def __init__(self) -> None: ...
    def linear(self, path: str, input: int, weight: Tensor, bias: Tensor | None, /) -> int: ...
    def conv2d(
        self,
        path: str,
        input: int,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        padding_mode: str,
        /,
    ) -> int: ...
    def batch_norm(
        self,
        path: str,
        input: int,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        training: bool,
        /,
    ) -> int: ...
    def activation(self, path: str, input: int, kind: str, a: float, b: float, /) -> int: ...
    def add(self, path: str, first: int, second: int, /) -> int: ...
    def flatten(self, path: str, input: int, start_dim: int, end_dim: int, /) -> int: ...
    @staticmethod
    def refuse(path: str, type: str, /) -> NoReturn: ...
    @staticmethod
    def refuse_setting(path: str, what: str, /) -> NoReturn: ...

# nn/snell_linear
def check_snell_options(
    in_features: int,
    out_features: int,
    rank: int,
    sparsity: float,
    scale: float,
    sparsifier: str,
    grad: str,
    dropout: float,
    /,
) -> None: ...
def snell_add_(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    sparsity: float,
    sparsifier: str,
    factor: float,
    start_seed: int | None,
    /,
) -> None: ...
def snell_budget_score(
    param: Tensor, grad: Tensor, importance: Tensor, uncertainty: Tensor, beta1: float, beta2: float, /
) -> Tensor: ...
def snell_budget_check(
    layers: int,
    total_steps: int,
    initial: float,
    target: float,
    betas: tuple[float, float],
    init_warmup: int,
    final_warmup: int,
    /,
) -> None: ...
def snell_budget_split(
    scores: Sequence[float],
    entries: Sequence[int],
    step: int,
    total_steps: int,
    initial: float,
    target: float,
    betas: tuple[float, float],
    init_warmup: int,
    final_warmup: int,
    /,
) -> list[float]: ...

# optim/base
def optimizers() -> list[str]: ...
def schema(optimizer: str) -> dict[str, Any]: ...
def check_options(optimizer: str, options: dict[str, Any]) -> dict[str, Any]: ...
def first_order_gradients(
    optimizer: str, closure: Callable[[], Any] | None, params: Sequence[Tensor], ordinals: Sequence[int], /
) -> list[Tensor | None]: ...

class CppOptimizer:
    def __init__(self, optimizer: str, groups: list[dict[str, Any]], defaults: dict[str, Any], /) -> None: ...
    def step(self, closure: Callable[[], Any] | None = None, **inputs: Any) -> Tensor | None: ...
    def call(self, method: str, *arguments: Any) -> Any: ...
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

# optim/alflb
def alflb_apply(
    biases: Sequence[Tensor],
    owners: Sequence[int],
    loads: Sequence[Tensor],
    histograms: Sequence[Tensor | None],
    bounds: Sequence[Tensor | None],
    top_k: Sequence[int],
    states: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    found_inf: Tensor | None,
    skipped: Tensor,
    /,
) -> None: ...
def alflb_check_bias(bias: Tensor, ordinal: int, /) -> None: ...
def alflb_check_state(bias: Tensor, options: dict[str, Any], state: dict[str, Tensor], /) -> None: ...
def alflb_make_histogram(bias: Tensor, bins: int, /) -> tuple[Tensor, Tensor]: ...
def load_report(load: Tensor, bias: Tensor, top_k: int, /) -> dict[str, Any]: ...
def sampling_floor(tokens: float, num_experts: int, top_k: int, /) -> float: ...

# optim/mfac
class MFACBlocks:
    def __init__(
        self,
        groups: list[dict[str, Any]],
        values: Sequence[Tensor | None],
        states: list[dict[str, Any] | None],
        process_group: ProcessGroup | None,
        /,
    ) -> None: ...
    def check_columns(self) -> None: ...
    def prepare(self) -> bool: ...
    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None, skipped: Tensor, /) -> None: ...
    def precondition(self) -> list[Tensor | None]: ...
    def states(self) -> dict[int, dict[str, Tensor]]: ...
    def window_count(self) -> int: ...
    def memory_bytes(self) -> int: ...

def mfac_check_state(param: Tensor, options: dict[str, Any], state: dict[str, Tensor], /) -> None: ...
def mfac_check_vectors(params: Sequence[Tensor], x: Sequence[Tensor | None], /) -> None: ...
def mfac_is_window(name: str, /) -> bool: ...

# optim/eggroll
class Population:
    def __init__(self, groups: list[dict[str, Any]], updates: int, begin: int, end: int, /) -> None: ...
    @property
    def begin(self) -> int: ...
    @property
    def baseline(self) -> int: ...
    def __len__(self) -> int: ...
    def noise(self) -> tuple[int, int, int, bool, float, int, str]: ...
    def params(self) -> list[tuple[Tensor, int, str]]: ...
    def unperturbed_rows(self) -> Tensor: ...
    def same_as(self, now: Population, /) -> bool: ...
    def perturb(self, i: int, /) -> list[Tensor]: ...
    def restore(self, saved: Sequence[Tensor], /) -> None: ...

def eggroll_members(group: dict[str, Any], process_group: ProcessGroup | None, /) -> tuple[int, int]: ...
def eggroll_chunks(group: dict[str, Any], process_group: ProcessGroup | None, /) -> list[tuple[int, int]]: ...
def eggroll_check_values(values: Tensor | None, size: int, /) -> None: ...
def eggroll_shaped(
    group: dict[str, Any], values: Tensor, process_group: ProcessGroup | None, /
) -> tuple[Tensor, Tensor, Tensor]: ...
def eggroll_update(
    groups: list[dict[str, Any]],
    asked: Population,
    state_of: Callable[[Tensor], dict[str, Any]],
    coefficients: Tensor,
    nonfinite: Tensor,
    skipped: Tensor,
    update: bool,
    process_group: ProcessGroup | None,
    sharded: bool,
    /,
) -> None: ...
def eggroll_check_state(param: Tensor, options: dict[str, Any], state: dict[str, Tensor], /) -> None: ...
def eggroll_check_equal(tensors: Sequence[Tensor], process_group: ProcessGroup | None, /) -> None: ...
def pack_trits(signs: Tensor, count: int, /) -> Tensor: ...
def unpack_trits(bytes: Tensor, count: int, /) -> Tensor: ...

# optim/mezo
def mezo_losses(
    groups: list[dict[str, Any]],
    epoch: int,
    closure: Callable[[], Any] | None,
    process_group: ProcessGroup | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def mezo_update(
    groups: list[dict[str, Any]],
    epoch: int,
    slope: Tensor,
    skipped: Tensor,
    state_of: Callable[[Tensor], dict[str, Any]],
    /,
) -> None: ...
def mezo_check_state(param: Tensor, state: dict[str, Tensor], /) -> None: ...

class MezoPerturbation:
    def __init__(self, params: Sequence[Tensor], scale: float, seed: int, epoch: int, /) -> None: ...
    def restore(self) -> None: ...
    def bytes(self) -> int: ...
    def kept(self) -> int: ...

# ops/sinkhorn_newton
def sinkhorn_unconverged(op: str, info: Tensor) -> str: ...

# moe/stochastic_balance
def stochastic_balance_exact(
    prob: Tensor, weight: Tensor | None, capacity: Tensor | None, rule: str, g: str, table: Tensor | None, /
) -> float: ...
def stochastic_optimum(prob: Tensor, weight: Tensor | None, /) -> float: ...
def fluid_lp_equal_p(edges: Tensor, p: float, capacity: Tensor | None, /) -> float: ...
def balance_check(
    servers: int, weight: Tensor | None, capacity: Tensor | None, rule: str, g: str, table: Tensor | None, /
) -> None: ...
def balance_assign(
    prob: Tensor,
    weight: Tensor | None,
    capacity: Tensor | None,
    rule: str,
    g: str,
    table: Tensor | None,
    load: Tensor,
    attempts: Tensor,
    done: Tensor,
    /,
) -> int: ...
def balance_report(attempts: Tensor, done: Tensor, server: int, success: bool, /) -> None: ...
