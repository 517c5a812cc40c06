"""From a Python module to the list of layers that the Lipschitz operators take."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from torch_ext import _C

#: tensors, layers, numbers, names: the first four arguments of the operators.
Encoded = tuple[list[Tensor], list[int], list[float], str]

_PLAIN = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
_PASSED_ON = (nn.Dropout, nn.Identity)
_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    nn.functional.relu: "relu",
    torch.tanh: "tanh",
    nn.functional.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    nn.functional.sigmoid: "sigmoid",
    nn.functional.silu: "silu",
}
_METHODS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}
_SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


def encode(model: nn.Module) -> Encoded:
    """The layers of a model: Sequential and Residual by their structure, other containers by tracing ``forward``.

    Raises:
        TypeError: a layer or function that has no bound, named by its path.
        ValueError: a setting that is not supported, such as a BatchNorm in training mode.
    """
    walk = _Walk()
    walk.module(model, "", 0)
    layers = walk.layers
    return layers.tensors, layers.layers, layers.numbers, layers.names


def _joined(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child


class _Tracer(fx.Tracer):
    """Goes into ``forward`` of the given module only; what it calls is looked at module by module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Walk:
    def __init__(self) -> None:
        from torch_ext.nn.residual import Residual  # here: torch_ext.nn imports this module

        self.residual = Residual
        self.layers = _C.LipschitzLayers()

    def module(self, module: nn.Module, path: str, value: int) -> int:
        """Adds a module that reads a value; the number of the value that it makes."""
        if isinstance(module, nn.Sequential):
            for name, child in module._modules.items():  # a module in two places counts twice
                value = value if child is None else self.module(child, _joined(path, name), value)
            return value
        if isinstance(module, self.residual):
            body = self.module(module.body, _joined(path, "body"), value)
            shortcut = (
                value if module.shortcut is None else self.module(module.shortcut, _joined(path, "shortcut"), value)
            )
            return self.layers.add(path, body, shortcut)
        if isinstance(module, _PASSED_ON):
            return value
        made = self.leaf(module, path, value)
        if made is not None:
            return made
        if type(module).__module__.startswith("torch.nn."):
            self.layers.refuse(path, type(module).__name__)
        return self.traced(module, path, value)

    def leaf(self, module: nn.Module, path: str, value: int) -> int | None:
        layers = self.layers
        for kind, name in _PLAIN.items():
            if isinstance(module, kind):
                return layers.activation(path, value, name, 0.0, 0.0)
        if isinstance(module, nn.Linear):
            return layers.linear(path, value, module.weight, module.bias)
        if isinstance(module, nn.Conv2d):
            return self.conv2d(module, path, value)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m = module
            return layers.batch_norm(path, value, m.running_mean, m.running_var, m.weight, m.bias, m.eps, m.training)
        if isinstance(module, nn.Flatten):
            return layers.flatten(path, value, module.start_dim, module.end_dim)
        if isinstance(module, nn.LeakyReLU):
            return layers.activation(path, value, "leaky_relu", module.negative_slope, 0.0)
        if isinstance(module, nn.Softplus):
            return layers.activation(path, value, "softplus", module.beta, module.threshold)
        if isinstance(module, nn.GELU):
            return self.gelu(path, value, module.approximate)
        return None

    def conv2d(self, module: nn.Conv2d, path: str, value: int) -> int:
        named = {"valid": [0, 0], "same": [-1, -1]}
        padding = named[module.padding] if isinstance(module.padding, str) else list(module.padding)
        return self.layers.conv2d(
            path,
            value,
            module.weight,
            module.bias,
            list(module.stride),
            padding,
            list(module.dilation),
            module.groups,
            module.padding_mode,
        )

    def gelu(self, path: str, value: int, approximate: str) -> int:
        if approximate != "none":
            self.layers.refuse_setting(path, 'is an approximate GELU; use approximate "none"')
        return self.layers.activation(path, value, "gelu", 0.0, 0.0)

    # --- a container with a forward of its own ------------------------------------------------------------------------
    def traced(self, module: nn.Module, path: str, value: int) -> int:
        try:
            graph = _Tracer().trace(module)
        except Exception as error:
            raise TypeError(
                f"local_lipschitz: the forward of '{path}' ({type(module).__name__}) cannot be traced: {error}. Build "
                "it of torch.nn.Sequential and torch_ext.nn.Residual"
            ) from error
        values: dict[fx.Node, int] = {}
        inputs = 0
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs += 1
                if inputs > 1 and not node.args:  # a default makes it optional
                    self.refuse_node(node, path, "a second input")
                values[node] = value
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node) or result not in values:
                    self.refuse_node(node, path, "more than one output")
                return values[result]
            else:
                values[node] = self.node(module, node, path, values)
        raise AssertionError("a graph has an output")

    def node(self, module: nn.Module, node: fx.Node, path: str, values: dict[fx.Node, int]) -> int:
        name = _joined(path, node.name)
        read = [values[a] for a in node.args if isinstance(a, fx.Node) and a in values]
        if len(read) != len(node.all_input_nodes) and node.target not in _SUMS:
            self.refuse_node(node, path, _target_name(node))
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            target = str(node.target)
            return self.module(module.get_submodule(target), _joined(path, target), read[0])
        if node.target in _SUMS and len(read) == 2 and not node.kwargs:
            return self.layers.add(name, read[0], read[1])
        if len(read) != 1:
            self.refuse_node(node, path, _target_name(node))
        if node.op == "call_function" and node.target in _FUNCTIONS:
            return self.layers.activation(name, read[0], _FUNCTIONS[node.target], 0.0, 0.0)
        if node.op == "call_method" and node.target in _METHODS and len(node.args) == 1:
            return self.layers.activation(name, read[0], _METHODS[str(node.target)], 0.0, 0.0)
        if node.target is nn.functional.gelu:
            return self.gelu(name, read[0], str(node.kwargs.get("approximate", "none")))
        if node.target in (torch.flatten, "flatten"):
            dims: list[Any] = [*node.args[1:], *([0, -1][len(node.args) - 1 :])]
            start, end = (
                node.kwargs.get(key, given) for key, given in zip(("start_dim", "end_dim"), dims, strict=True)
            )
            return self.layers.flatten(name, read[0], int(str(start)), int(str(end)))
        self.refuse_node(node, path, _target_name(node))

    def refuse_node(self, node: fx.Node, path: str, what: str) -> NoReturn:
        self.layers.refuse(_joined(path, node.name), what)


def _target_name(node: fx.Node) -> str:
    target: Callable[..., Any] | str = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
