"""What every optimizer of the pack shares: options from the C++ field table; state that survives load, copy, pickle."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from torch_ext import _C

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Closure: TypeAlias = Callable[[], Any]

_schema = functools.cache(_C.schema)  # a fixed table; building the dict takes 0.1 ms
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}


class Optimizer(torch.optim.Optimizer):
    """Base of the pack's optimizers. Subclasses set ``_name``, the key of their field table."""

    _name: str
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, options: dict[str, Any], process_group: ProcessGroup | None) -> None:
        self._process_group = process_group
        self._lost_process_group = False
        self._seen_options: dict[int, dict[str, Any]] = {}  # of each group, as the last step found them
        super().__init__(params, {**options, **self._checked(options)})

    # --- options -----------------------------------------------------------------------------------------------------

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options in their own types; a tensor learning rate stays the tensor that its scheduler writes to."""
        lr = options.get("lr")
        given = {}
        for name in (field["name"] for field in _schema(self._name)["fields"]):
            if name in options:
                given[name] = value = _plain(options[name])
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise ValueError(f"Tensor {name} must have one element")
        checked = _C.check_options(self._name, given)
        if isinstance(lr, Tensor):
            checked["lr"] = lr
        return checked

    def _check_edited_options(self) -> None:
        """Options edited in ``param_groups`` since the last step: ValueError or TypeError if they are wrong."""
        for number, group in enumerate(self.param_groups):
            values = {field["name"]: group[field["name"]] for field in _schema(self._name)["fields"]}
            if isinstance(values["lr"], Tensor):
                del values["lr"]  # reading it could wait for the device
            if self._seen_options.get(number) == values:
                continue
            self._checked(values)
            self._check_shared(group, self.param_groups[0])
            for param in group["params"]:
                state = self.state.get(param, {})
                self._check_state(param, group, {k: v for k, v in state.items() if isinstance(v, Tensor)})
            self._seen_options[number] = values

    def _shared_options(self) -> list[str]:
        return [field["name"] for field in _schema(self._name)["fields"] if field["global"]]

    def _check_shared(self, group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
        for name in self._shared_options():
            if group[name] != first[name]:
                raise ValueError(
                    f"{self._name}: option {name} is the same for all parameters and cannot differ in a group"
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options that it does not name are the defaults.

        Raises ValueError for a parameter that is already in a group or twice in this one, for an option out of range,
        and for a global option that differs from the other groups.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("optimizer parameters need to be organized in ordered collections: use a list, not a set")
        params = [params] if isinstance(params, Tensor) else list(params)
        first = self.param_groups[0] if self.param_groups else self.defaults
        shared = {name: first[name] for name in self._shared_options()}
        group = {**self.defaults, **shared, **param_group, "params": params}
        group = {**group, **self._checked(group)}
        self._check_shared(group, shared)
        for number, param in enumerate(p[1] if isinstance(p, tuple) else p for p in params):
            if type(param).__module__.startswith("torch.distributed.tensor"):
                raise TypeError(f"{self._name} does not support DTensor parameters: parameter {number} of the group")
        ids = [id(p[1] if isinstance(p, tuple) else p) for p in params]
        if len(set(ids)) != len(ids):
            raise ValueError("some parameters appear more than once in a parameter group")
        super().add_param_group(group)

    # --- distribution ------------------------------------------------------------------------------------------------

    @property
    def process_group(self) -> ProcessGroup | None:
        """Group over which a step averages what it reads; None: not distributed. Never saved."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._process_group = group
        self._lost_process_group = False

    def _group_of_step(self) -> ProcessGroup | None:
        """The process group of a step; RuntimeError if it was lost in a pickle."""
        if self._lost_process_group:
            raise RuntimeError(
                f"this {self._name} was distributed when it was pickled: set opt.process_group (to a group or to None) "
                "before the next step()"
            )
        return self._process_group

    def _mean_over_processes(self, tensors: list[Tensor]) -> list[Tensor]:
        group = self._group_of_step()
        return tensors if group is None else _C.all_reduce_mean(tensors, group)

    # --- gradients ---------------------------------------------------------------------------------------------------

    def _first_order_gradients(self, closure: Closure | None) -> tuple[Any, list[Tensor | None]]:
        """What the closure returned, a loss without its graph, and the gradient of each parameter of all groups.

        The closure calls ``backward`` itself or only returns the loss; without one ``.grad`` is the answer.
        """
        returned: Any = None

        def run() -> Any:
            nonlocal returned
            assert closure is not None
            value = closure()
            returned = value.detach() if isinstance(value, Tensor) else value
            return value

        every = [param for group in self.param_groups for param in group["params"]]
        ordinals = [number for number, param in enumerate(every) if param.requires_grad]
        found = _C.first_order_gradients(
            self._name, run if closure is not None else None, [every[i] for i in ordinals], ordinals
        )
        grads: list[Tensor | None] = [None for _ in every]
        for ordinal, grad in zip(ordinals, found, strict=True):
            grads[ordinal] = grad
        return returned, grads

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def _first_param(self) -> Tensor:
        for group in self.param_groups:
            if group["params"]:
                first: Tensor = group["params"][0]
                return first
        raise ValueError(f"{self._name} has no parameters")

    def _counter(self, name: str, *, on_cpu: bool = False) -> Tensor:
        """An optimizer-wide 0-dim int64 counter; it sits in the first parameter's state."""
        first = self._first_param
        state = self.state[first]
        device = torch.device("cpu") if on_cpu else first.device
        counter: Tensor | None = state.get(name)
        if counter is None or counter.device != device:
            counter = torch.zeros((), dtype=torch.int64, device=device) if counter is None else counter.to(device)
            state[name] = counter
        return counter

    def _counter_value(self, name: str) -> int:
        state = self.state.get(self._first_param, {})
        return int(state[name]) if name in state else 0

    @property
    def skipped_steps(self) -> Tensor:
        """Steps that changed nothing because a gradient was not finite: 0-dim int64 on the first parameter's device."""
        first = self._first_param
        counter: Tensor | None = self.state.get(first, {}).get("global_skipped")
        return torch.zeros((), dtype=torch.int64, device=first.device) if counter is None else counter.clone()

    def _check_state(self, param: Tensor, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        """ValueError if loaded state does not fit the parameter."""

    def _check_loaded(self, groups: list[dict[str, Any]], states: dict[int, dict[str, Any]]) -> None:
        """The same for rules that concern several parameters: groups as loaded, states by the parameter's id."""

    def _abandon_step(self) -> None:
        """What every step() does before an exception leaves it."""
        for name in ("grad_scale", "found_inf"):  # GradScaler leaves its scale behind; the next step has another
            self.__dict__.pop(name, None)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.requires_grad:  # a graph in .grad is a reference cycle
                    param.grad = param.grad.detach()

    # --- saving and loading ------------------------------------------------------------------------------------------

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As in torch, with an entry ``torch_ext`` that names optimizer and format; C++ reads and writes the same."""
        result: dict[str, Any] = super().state_dict()
        result["torch_ext"] = {"optimizer": self._name, "format_version": _schema(self._name)["format_version"]}
        return result

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its own dtype (torch casts it to the parameter's) and errors change nothing.

        Raises ValueError for the state_dict of another optimizer or a newer format, for options out of range and for
        state that does not fit its parameter.
        """
        pre_hooks, post_hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = dict(state_dict)
        for pre_hook in pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        loaded = self._loadable(state_dict)
        own = [{k: v for k, v in group.items() if k in self.defaults} for group in self.param_groups]
        groups = [{**mine, **saved} for mine, saved in zip(own, state_dict["param_groups"], strict=True)]
        # An option that an older version did not know stays ours. The tensors stay out of torch's hands: it would cast
        # each to its parameter's dtype first, a window of many rows included.
        listed = {index for group in groups for index in group["params"]}
        rest = {index: {} if index in listed else entry for index, entry in state_dict["state"].items()}
        state_dict = {**state_dict, "state": rest, "param_groups": groups}
        try:  # the base runs both kinds of hooks; ours frame the restored dtypes as well
            self._optimizer_load_state_dict_pre_hooks = OrderedDict()
            self._optimizer_load_state_dict_post_hooks = OrderedDict()
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = pre_hooks
            self._optimizer_load_state_dict_post_hooks = post_hooks
        for param, tensors in loaded:
            self.state[param].update(tensors)
        for post_hook in post_hooks.values():
            post_hook(self)

    def _loadable(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Checks a state_dict against this optimizer; returns each parameter's state in its right dtype and device."""
        groups, states, about = (state_dict.get(key) for key in ("param_groups", "state", "torch_ext"))
        if not isinstance(groups, (list, tuple)) or not isinstance(states, Mapping):
            raise ValueError("not an optimizer's state_dict: it has no 'param_groups' or no 'state'")
        if not all(isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple)) for g in groups):
            raise ValueError("not an optimizer's state_dict: a parameter group has no 'params'")
        if "torch_ext" not in state_dict:
            about = {}
        if not isinstance(about, Mapping) or not isinstance(about.get("format_version", 1), int):
            raise ValueError("state_dict: 'torch_ext' must hold an optimizer's name and an integer format_version")
        schema = _schema(self._name)
        if about.get("optimizer", self._name) != self._name:
            raise ValueError(f"this state_dict is of {about['optimizer']}, not of {self._name}")
        if about.get("format_version", 1) > schema["format_version"]:
            raise ValueError(
                f"this state_dict has format version {about['format_version']}; this build of torch_ext reads up to "
                f"{schema['format_version']}: update torch_ext"
            )
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"loaded state dict has {len(groups)} parameter groups, the optimizer {len(self.param_groups)}"
            )
        fields = {field["name"]: field for field in schema["state"]}
        loaded, as_loaded = [], []
        for number, (saved, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"loaded state dict has {len(saved['params'])} parameters in group {number}, the optimizer "
                    f"{len(group['params'])}"
                )
            options = self._checked({**group, **saved})
            as_loaded.append({**options, "params": group["params"]})
            for index, param in zip(saved["params"], group["params"], strict=True):
                if index not in states:
                    continue
                if not isinstance(states[index], Mapping):
                    raise ValueError(f"state_dict: the state of parameter {index} is not a dict")
                state = {
                    name: self._adopt(name, value, param, fields.get(name)) for name, value in states[index].items()
                }
                self._check_state(param, options, {k: v for k, v in state.items() if isinstance(v, Tensor)})
                loaded.append((param, state))
        listed = {index for group in groups for index in group["params"]}
        for index in states:
            if index not in listed and str(index).isdigit():
                raise ValueError(f"loaded state dict has state of parameter {index!r}, which none of its groups lists")
        self._check_loaded(as_loaded, {id(param): state for param, state in loaded})
        return loaded

    def _adopt(self, name: str, value: Any, param: Tensor, field: dict[str, Any] | None) -> Any:
        """A loaded state value, or a plain number, on the device and in the dtype of its field."""
        if field is None:
            return value.to(device=param.device, copy=True) if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor):
            if not isinstance(value, (int, float)):
                raise ValueError(f"{self._name}: state {name!r} is no tensor")
            value = torch.tensor(float(value), dtype=torch.float64)
        if value.is_complex() or value.layout != torch.strided:
            raise ValueError(f"{self._name}: state {name!r} is complex or sparse")
        if field["dtype"] == "stored":
            return value.detach().clone(memory_format=torch.contiguous_format)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        device = torch.device("cpu") if field["on_cpu"] else param.device
        return value.detach().to(device=device, dtype=_DTYPES.get(field["dtype"], wide), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state["_lost_process_group"] = self._process_group is not None or self._lost_process_group
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen_options = {}
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("_lost_process_group", False)
        self.defaults.pop("differentiable", None)
        for field in _schema(self._name)["fields"]:
            self.defaults.setdefault(field["name"], field["default"])
            for group in self.param_groups:
                group.setdefault(field["name"], field["default"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        """Copies parameters and state; the process group, which cannot be copied, is shared."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._process_group, new._lost_process_group = self._process_group, self._lost_process_group
        return new


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's own numbers."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(element) for element in value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
