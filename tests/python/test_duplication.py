"""The arithmetic of an update exists once, in C++: the Python faces gather, check and call.

Over the syntax tree of torch_ext/{optim,curvature,moe}: no ``math``, no ``**`` and no ``@``, and ``+ - * / // %`` only
between integers that count or text (names in ALLOWED and literals). Schedules, bias corrections and updates belong to
the ops.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import torch_ext
from torch_ext import _C, optim

PACKAGE = Path(torch_ext.__file__).parent
FILES = [f for area in ("optim", "curvature", "moe") for f in sorted((PACKAGE / area).glob("**/*.py"))]

#: What arithmetic may be about: running numbers of parameters, and the period of a schedule (integers).
COUNTERS = {"ordinal", "count", "number", "len", "int", "_counter_value", "range"}


def is_count(node: ast.expr) -> bool:
    """A literal int or str, a counter's name, or a call of a function that returns a count."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, str))
    if isinstance(node, ast.JoinedStr):
        return True
    if isinstance(node, ast.Name):
        return node.id in COUNTERS
    if isinstance(node, ast.Call):
        function = node.func
        return (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) in COUNTERS
    if isinstance(node, ast.BinOp):
        return is_count(node.left) and is_count(node.right)
    return False


def arithmetic(tree: ast.AST) -> list[str]:
    """What the rule forbids, as "line: source"."""
    found = []
    for node in ast.walk(tree):
        bad = False
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):  # X | None is a type
            bad = isinstance(node.op, (ast.Pow, ast.MatMult)) or not (is_count(node.left) and is_count(node.right))
            if isinstance(node.op, ast.Add) and isinstance(node.left, ast.List):
                bad = False  # joining lists
        elif isinstance(node, ast.AugAssign):
            bad = isinstance(node.op, (ast.Pow, ast.MatMult)) or not (is_count(node.target) and is_count(node.value))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            bad = not isinstance(node.operand, ast.Constant)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            bad = "math" in {module, *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            bad = name in TENSOR_METHODS and not is_counter_update(node)
        if bad:
            found.append(f"{getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    return found


#: The same arithmetic spelled as a method or function of torch.
TENSOR_METHODS = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "pow", "pow_", "sqrt", "sqrt_", "lerp", "lerp_"),
    *("addcmul", "addcmul_", "addcdiv", "addcdiv_", "neg", "neg_", "abs", "abs_", "clamp", "clamp_", "mean", "sum"),
    *("matmul", "mm", "dot", "square", "rsqrt", "reciprocal", "exp", "log", "sign", "norm"),
}


def is_counter_update(node: ast.Call) -> bool:
    """``self._counter(...).add_(1)``."""
    assert isinstance(node.func, ast.Attribute)
    inner = node.func.value
    return (
        node.func.attr == "add_"
        and isinstance(inner, ast.Call)
        and isinstance(inner.func, ast.Attribute)
        and inner.func.attr == "_counter"
        and [ast.unparse(a) for a in node.args] == ["1"]
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_faces_do_no_arithmetic(file: Path) -> None:
    assert arithmetic(ast.parse(file.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "p = p - lr * g",
        "v *= beta",
        "b = beta**step",
        "y = a @ b",
        "import math",
        "from math import sqrt",
        "-grad",
        "x.mul_(2)",
        "torch.sqrt(v)",
        "1 - beta1",
        "p.add_(g, alpha=lr)",
        "step.add_(1)",
        "x / 2",
        "p[0] + 1",
    ],
)
def test_the_rule_sees(code: str) -> None:
    assert arithmetic(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "ordinal += 1",
        "calls = self._counter_value('a') // int(group['n'])",
        "x: int | None",
        "a = 'b' + 'c'",
        "x = -1",
        "len(a) + 1",
        "self._counter('global_calls').add_(1)",
        "read[len(grads) :]",
    ],
)
def test_the_rule_lets_pass(code: str) -> None:
    assert arithmetic(ast.parse(code)) == []


@pytest.mark.parametrize("name", _C.optimizers())
def test_signatures_are_the_field_table(name: str) -> None:
    """Names, defaults and order; what is neither parameters nor option is run-time only."""
    parameters = list(inspect.signature(getattr(optim, name)).parameters.values())
    assert parameters[0].name == "params"
    assert parameters[-1].name == "process_group"
    assert parameters[-1].default is None
    options = parameters[1:-1]
    fields = _C.schema(name)["fields"]
    assert [p.name for p in options] == [f["name"] for f in fields]
    for parameter, field in zip(options, fields, strict=True):
        assert parameter.default == field["default"]
        assert type(parameter.default) is type(field["default"])
        for choice in field["choices"]:
            assert f'"{choice}"' in str(parameter.annotation) or f"'{choice}'" in str(parameter.annotation)


def test_every_optimizer_has_both_faces_and_a_row() -> None:
    from torch_ext.testing import cases

    assert set(_C.optimizers()) == set(optim.__all__) == {case.optimizer for case in cases()}
