"""The window as state of the optimizer: parameters that join, options edited while training, files that do not fit."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_ext.optim import MFAC
from torch_ext.testing import LANGUAGES, bits, cpp_optimizer

ROOT = Path(__file__).resolve().parents[3]
FORMATS = ("float32", "float64", "bfloat16", "int8", "topk")
both_languages = pytest.mark.parametrize("language", LANGUAGES)


def make(language: str, params: Any, **options: Any) -> Any:
    options = {"lr": 0.05, "num_grads": 6, "damping": 0.05, **options}
    return MFAC(params, **options) if language == "python" else cpp_optimizer("MFAC", params, **options)


def call(optimizer: Any, name: str, *arguments: Any) -> Any:
    """A method or property of either language's object."""
    if not isinstance(optimizer, MFAC):
        return optimizer.call(name, *arguments)
    member = getattr(optimizer, name)
    return member(*arguments) if callable(member) else member


def leaf(numel: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 1, numel, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(*numels: int) -> Callable[[], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return lambda: [torch.randn(n, generator=generator, dtype=torch.float64) for n in numels]


def take(optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


# ---- parameters that join


@both_languages
@pytest.mark.parametrize("window_format", FORMATS)
def test_parameters_that_join_had_missing_gradients_before(language: str, window_format: str) -> None:
    """1500 columns are two tiles, the second half full; 3000 more fill it and add three. To the bit, state included."""
    a, b = leaf(1500), leaf(3000)
    a2, b2 = leaf(1500), leaf(3000)
    options = {"window_format": window_format, "momentum": 0.5, "topk": 0.02}
    joined = make(language, [a], **options)
    ever = make(language, [{"params": [a2]}, {"params": [b2]}], **options)
    draw = gradients(1500, 3000)
    for _ in range(9):
        g, _ = draw()
        take(joined, [a], [g])
        take(ever, [a2, b2], [g, None])
    joined.add_param_group({"params": [b]})
    for _ in range(9):
        grads = draw()
        take(joined, [a, b], list(grads))
        take(ever, [a2, b2], list(grads))
    assert bits([a, b]) == bits([a2, b2])
    assert bits(joined.state_dict()["state"]) == bits(ever.state_dict()["state"])


@both_languages
def test_a_checkpoint_from_before_a_parameter_joined(language: str) -> None:
    a, b = leaf(300), leaf(300)
    first = make(language, [{"params": [a]}, {"params": [b]}], num_grads=4)
    draw = gradients(300, 300)
    for _ in range(5):
        take(first, [a, b], [draw()[0], None])
    saved = copy.deepcopy(first.state_dict())
    saved["state"][0]["window_layout"] = torch.tensor(
        [300, 0, 1, 300]
    )  # as it was written before b joined; the rest of the tile is zero
    second = make(language, [{"params": [a]}, {"params": [b]}], num_grads=4)
    second.load_state_dict(saved)
    copies = [leaf(300), leaf(300)]
    with torch.no_grad():
        copies[0].copy_(a)
    third = make(language, [{"params": [copies[0]]}, {"params": [copies[1]]}], num_grads=4)
    third.load_state_dict(first.state_dict())
    grads = draw()
    take(second, [a, b], list(grads))
    take(third, copies, list(grads))
    assert bits([a, b]) == bits(copies)


@both_languages
def test_a_parameter_may_thaw(language: str) -> None:
    """Frozen parameters have columns, so that nothing moves when they begin to train."""
    outcomes = []
    for frozen in (True, False):
        a, b = leaf(30), leaf(40)
        b.requires_grad_(not frozen)
        optimizer = make(language, [b, a])
        draw = gradients(40, 30)
        for _ in range(4):
            _, g = draw()
            take(optimizer, [b, a], [None, g])
        b.requires_grad_()
        for _ in range(4):
            take(optimizer, [b, a], list(draw()))
        outcomes.append(bits([a, b, optimizer.state_dict()["state"]]))
    assert outcomes[0] == outcomes[1]


@both_languages
def test_integer_and_complex_parameters_have_no_columns(language: str) -> None:
    outcomes = []
    for others in ([], [torch.arange(5000)], [torch.ones(9, dtype=torch.complex64)]):
        a = leaf(30)
        optimizer = make(language, [*others, a])
        draw = gradients(30)
        for _ in range(3):
            take(optimizer, [a], list(draw()))
        state = optimizer.state_dict()["state"]
        outcomes.append(bits([a, state[len(others)]["window_rows"], call(optimizer, "memory_bytes")]))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@both_languages
@pytest.mark.parametrize("blocks", ["global", "per_group"])
def test_blocks_per_group_are_optimizers_of_their_own(language: str, blocks: str) -> None:
    a, b, a2, b2 = leaf(30), leaf(40), leaf(30), leaf(40)
    together = make(language, [{"params": [a]}, {"params": [b], "lr": 0.01}], blocks=blocks, momentum=0.5)
    alone = [make(language, [a2], momentum=0.5), make(language, [b2], lr=0.01, momentum=0.5)]
    draw = gradients(30, 40)
    for _ in range(9):
        grads = draw()
        take(together, [a, b], list(grads))
        take(alone[0], [a2], [grads[0]])
        take(alone[1], [b2], [grads[1]])
    assert (bits([a, b]) == bits([a2, b2])) == (blocks == "per_group")
    assert call(together, "window_count") == 6
    state = together.state_dict()["state"]
    assert [("window_rows" in state[i]) for i in (0, 1)] == [True, blocks == "per_group"]
    whole = sum(call(o, "memory_bytes") for o in alone)
    assert (call(together, "memory_bytes") == whole) == (blocks == "per_group")


# ---- options edited while training


@both_languages
def test_the_damping_of_a_group_may_be_edited(language: str) -> None:
    """As set_damping, and as an object that had this damping when it loaded the rows."""
    outcomes = []
    for how in ("set_damping", "option", "loaded"):
        p, draw = leaf(40), gradients(40)
        optimizer = make(language, [p], window_format="float64")
        for _ in range(8):
            take(optimizer, [p], list(draw()))
        if how == "set_damping":
            call(optimizer, "set_damping", 0.5)
        elif how == "loaded":
            saved = copy.deepcopy(optimizer.state_dict())
            saved["param_groups"][0]["damping"] = 0.5
            optimizer = make(language, [p], damping=0.5)
            optimizer.load_state_dict(saved)
        elif language == "python":
            optimizer.param_groups[0]["damping"] = 0.5
        else:
            optimizer.set_option(0, "damping", 0.5)
        x = torch.linspace(0, 1, 40, dtype=torch.float64)
        (before,) = call(optimizer, "precondition", [x])
        for _ in range(3):
            take(optimizer, [p], list(draw()))
        outcomes.append(bits([p, before, optimizer.state_dict()]))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@both_languages
@pytest.mark.parametrize(
    ("option", "value"), [("num_grads", 7), ("window_format", "float64"), ("window_format", "topk")], ids=str
)
def test_what_shapes_the_window_may_not_change_under_it(language: str, option: str, value: Any) -> None:
    p, draw = leaf(40), gradients(40)
    optimizer = make(language, [p])
    take(optimizer, [p], list(draw()))
    if language == "python":
        optimizer.param_groups[0][option] = value
    else:
        optimizer.set_option(0, option, value)
    before = bits([p, optimizer.state_dict()["state"]])
    with pytest.raises(ValueError, match=r"MFAC.*(rows|num_grads)"):
        take(optimizer, [p], list(draw()))
    assert bits([p, optimizer.state_dict()["state"]]) == before


def test_momentum_may_begin_late() -> None:
    p, draw = leaf(40), gradients(40)
    optimizer = make("python", [p])
    take(optimizer, [p], list(draw()))
    assert "momentum_buffer" not in optimizer.state[p]
    optimizer.param_groups[0]["momentum"] = 0.9
    take(optimizer, [p], list(draw()))
    assert optimizer.state[p]["momentum_buffer"].any()


def test_a_device_as_torch_has_it() -> None:
    p = leaf(40)
    optimizer = make("python", [p], window_device=torch.device("cpu"))
    take(optimizer, [p], list(gradients(40)()))
    assert optimizer.state_dict()["param_groups"][0]["window_device"] == "cpu"


# ---- files


@both_languages
def test_a_damaged_window_is_refused(language: str) -> None:
    p, draw = leaf(40), gradients(40)
    optimizer = make(language, [p], momentum=0.5)
    take(optimizer, [p], list(draw()))
    good = optimizer.state_dict()
    before = bits(good)

    def edited(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        bad = copy.deepcopy(good)
        change(bad["state"][0])
        return bad

    bad = [
        (f"lacks {name}", edited(lambda s, name=name: s.pop(name))) for name in good["state"][0] if "window_" in name
    ]
    bad += [
        ("window_layout has shape", edited(lambda s: s.update(window_layout=torch.zeros(2, dtype=torch.int64)))),
        ("window_layout is", edited(lambda s: s.update(window_layout=torch.tensor([40, 1, 1, 40])))),
        ("40 elements", edited(lambda s: s["window_layout"][:1].fill_(39))),
        ("rows", edited(lambda s: s.update(window_rows=s["window_rows"].double()))),
        ("gram", edited(lambda s: s.update(window_gram=s["window_gram"][:3]))),
        ("is of another optimizer", edited(lambda s: s.update(exp_avg=torch.zeros(40)))),
        ("momentum_buffer but no step", edited(lambda s: s.pop("step"))),
        ("momentum_buffer has shape", edited(lambda s: s.update(momentum_buffer=torch.zeros(3)))),
    ]
    for message, value in bad:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(value)
        assert bits(optimizer.state_dict()) == before
    take(optimizer, [p], list(draw()))


@both_languages
@pytest.mark.parametrize(("saved", "other"), [((6, 2), (8, 2)), ((2, 3), (3, 2)), ((4, 4), (4, 3))])
def test_a_window_of_other_parameters_is_refused(language: str, saved: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Also where the number of columns happens to be that of some of the parameters."""
    params, others = [leaf(n) for n in saved], [leaf(n) for n in other]
    optimizer, target = make(language, params), make(language, others)
    take(optimizer, params, list(gradients(*saved)()))
    before = bits(target.state_dict())
    with pytest.raises(ValueError, match="the window has the columns of other parameters"):
        target.load_state_dict(optimizer.state_dict())
    assert bits(target.state_dict()) == before


@both_languages
@pytest.mark.parametrize("first", ["global", "per_group"])
def test_blocks_may_not_change_under_a_window(language: str, first: str) -> None:
    second = "per_group" if first == "global" else "global"
    a, b = leaf(30), leaf(40)
    optimizer = make(language, [{"params": [a]}, {"params": [b]}], blocks=first)
    draw = gradients(30, 40)
    take(optimizer, [a, b], list(draw()))
    before = bits([a, b])
    for number in range(2):
        if language == "python":
            optimizer.param_groups[number]["blocks"] = second
        else:
            optimizer.set_option(number, "blocks", second)
    with pytest.raises(ValueError, match="include_window=False"):
        take(optimizer, [a, b], list(draw()))
    assert bits([a, b]) == before


@both_languages
def test_a_slice_of_a_window_is_refused_outside_its_group(language: str) -> None:
    p, draw = leaf(40), gradients(40)
    optimizer = make(language, [p])
    take(optimizer, [p], list(draw()))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["window_layout"] = torch.tensor([40, 1, 4, 40])
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"holds slice 1 of 4, this is process 0 of 1.*include_window=False"):
        take(optimizer, [p], list(draw()))


def test_loading_does_not_convert_a_window() -> None:
    """torch's own load_state_dict would make a float64 copy of the int8 rows of a float64 parameter."""
    p, draw = leaf(5000), gradients(5000)
    optimizer = make("python", [p], window_format="int8")
    take(optimizer, [p], list(draw()))
    seen: list[torch.dtype] = []
    cast = torch.optim.Optimizer._process_value_according_to_param_policy

    def spy(param: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append(value.dtype)
        return cast(param, value, *rest, **named)

    torch.optim.Optimizer._process_value_according_to_param_policy = staticmethod(spy)
    try:
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.optim.Optimizer._process_value_according_to_param_policy = staticmethod(cast)
    assert seen == []
    assert optimizer.state[p]["window_rows"].dtype == torch.int8


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_the_memory_is_printed_before_it_is_taken(level: str) -> None:
    code = (
        "import torch, torch_ext; p = torch.ones(5000, requires_grad=True); q = torch.ones(7);"
        "o = torch_ext.optim.MFAC([p, q], num_grads=8); print(o.memory_bytes); o.step(lambda: (p * p).sum())"
    )
    environment = {"TORCH_CPP_LOG_LEVEL": level, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    said = f"a window of 8 x 5007 in float32 on cpu takes {int(result.stdout)} bytes; 7 columns are of parameters"
    assert (said in result.stderr) == (level == "INFO")
