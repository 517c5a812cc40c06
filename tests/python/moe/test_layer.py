"""moe.MoELayer and moe.grouped_mm against one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from torch_ext import moe
from torch_ext.reference.moe import experts as reference_experts
from torch_ext.reference.moe import grouped_mm as reference_grouped_mm
from torch_ext.reference.moe.layer import swiglu

ops = torch.ops.torch_ext


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_layer_is_its_experts_one_token_at_a_time(shared: int) -> None:
    layer = moe.MoELayer(6, 10, 5, shared_experts=shared, top_k=2, dtype=torch.float64)
    x = draw(3, 4, 6, dtype=torch.float64).requires_grad_()
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 2:] = False
    y = layer(x, valid)
    routed = moe.route(x.reshape(12, 6) @ layer.router.weight.T, None, top_k=2, valid=valid.flatten())
    tokens = x.reshape(12, 6)
    want = reference_experts(tokens, routed.gates, routed.ids, layer.gate_proj, layer.up_proj, layer.down_proj)
    if shared:
        want = want + swiglu(tokens, layer.shared_gate_proj, layer.shared_up_proj, layer.shared_down_proj)
    torch.testing.assert_close(y.reshape(12, 6), want, rtol=1e-12, atol=1e-14)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad(y.square().sum(), inputs)
    expected = torch.autograd.grad(want.square().sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert int(layer.router.load.sum()) == 2 * 10


def test_second_derivatives_of_the_layer() -> None:
    layer = moe.MoELayer(3, 4, 4, top_k=2, dtype=torch.float64)
    x = draw(5, 3, dtype=torch.float64).requires_grad_()
    assert gradgradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_mm(dtype: torch.dtype) -> None:
    x, weight = draw(9, 5).to(dtype), draw(4, 3, 5, seed=1).to(dtype)
    for bounds in ([0, 2, 2, 6, 8], [0, 0, 0, 0, 0], [0, 9, 9, 9, 9]):
        offsets = torch.tensor(bounds, dtype=torch.int32)
        got = moe.grouped_mm(x, weight, offsets)
        torch.testing.assert_close(got, reference_grouped_mm(x, weight, offsets))
        assert got[bounds[-1] :].count_nonzero() == 0


def test_derivatives_of_grouped_mm() -> None:
    x, weight = draw(7, 3, dtype=torch.float64).requires_grad_(), draw(3, 2, 3, dtype=torch.float64).requires_grad_()
    u = draw(7, 2, seed=2, dtype=torch.float64).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    for function, inputs in [(moe.grouped_mm, (x, weight)), (ops.moe_grouped_outer, (u, x))]:
        assert gradcheck(lambda a, b, f=function: f(a, b, offsets), inputs)
        assert gradgradcheck(lambda a, b, f=function: f(a, b, offsets), inputs)


def test_opcheck() -> None:
    x, weight, u = draw(7, 3).requires_grad_(), draw(3, 2, 3).requires_grad_(), draw(7, 2).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    torch.library.opcheck(ops.moe_grouped_mm.default, (x, weight, offsets))
    torch.library.opcheck(ops.moe_grouped_outer.default, (u, x, offsets))


def test_compile() -> None:
    layer = moe.MoELayer(6, 10, 5, shared_experts=1)
    x = draw(9, 6).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.square().sum().backward()
    assert int(layer.router.load.sum()) == 18


def test_autocast_runs_the_experts_in_the_narrow_type() -> None:
    layer, x = moe.MoELayer(8, 16, 4, shared_experts=1), draw(20, 8)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert 0 < (y.float() - plain).norm() / plain.norm() < 0.02
    y.float().square().sum().backward()
    assert layer.gate_proj.grad is not None
    assert layer.gate_proj.grad.dtype == torch.float32


def test_a_bfloat16_layer_trains() -> None:
    layer = moe.MoELayer(8, 16, 4, dtype=torch.bfloat16)
    y = layer(draw(20, 8).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non-reentrant"])
def test_9_loads_of_a_checkpointed_layer(mode: str) -> None:
    layer = moe.MoELayer(6, 8, 4, top_k=2)
    for seed in range(3):
        x = draw(20, 6, seed=seed).requires_grad_()
        y = layer(x) if mode == "plain" else checkpoint(layer, x, use_reentrant=mode == "reentrant")
        y.square().sum().backward()
    assert int(layer.router.load.sum()) == 3 * 20 * 2


def test_no_tokens_and_all_tokens_masked() -> None:
    layer = moe.MoELayer(6, 8, 4)
    assert layer(torch.zeros(0, 6)).shape == (0, 6)
    y = layer(draw(5, 6), torch.zeros(5, dtype=torch.bool))
    assert y.count_nonzero() == 0
    y.sum().backward()
    assert layer.gate_proj.grad is not None
    assert layer.gate_proj.grad.count_nonzero() == 0


def test_parameters_start_as_those_of_a_linear_layer() -> None:
    layer = moe.MoELayer(100, 50, 8, shared_experts=1)
    for weight, fan_in in [(layer.up_proj, 100), (layer.down_proj, 50), (layer.shared_down_proj, 50)]:
        bound = fan_in**-0.5
        assert 0.98 * bound < weight.abs().max() <= bound
    names = {"router.weight", "router.expert_bias", "gate_proj", "up_proj", "down_proj"}
    names |= {"shared_gate_proj", "shared_up_proj", "shared_down_proj"}
    assert set(layer.state_dict()) == names
    assert "num_experts=8" in repr(layer)


BAD_LAYERS: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
    ("dim and hidden must be positive, got 0 and 8", (0, 8, 4), {}),
    ("dim and hidden must be positive, got 6 and 0", (6, 0, 4), {}),
    ("shared_experts must not be negative", (6, 8, 4), {"shared_experts": -1}),
    ("top_k must be in", (6, 8, 4), {"top_k": 5}),
]


@pytest.mark.parametrize(("message", "sizes", "options"), BAD_LAYERS)
def test_rejections(message: str, sizes: tuple[int, int, int], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        moe.MoELayer(*sizes, **options)


def test_rejections_of_grouped_mm() -> None:
    x, weight, offsets = draw(7, 3), draw(3, 2, 3), torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"x must be \[S, D\] and weight \[E, N, D\]"):
        moe.grouped_mm(x, weight[0], offsets)
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most S = 7"):
        moe.grouped_mm(x, weight, torch.tensor([0, 3, 2, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most S = 7"):
        moe.grouped_mm(x, weight, torch.tensor([0, 3, 3, 8], dtype=torch.int32))
    with pytest.raises(TypeError, match="offsets must be int32"):
        moe.grouped_mm(x, weight, offsets.long())
    with pytest.raises(TypeError, match="x has dtype Float, the weight Double"):
        moe.grouped_mm(x, weight.double(), offsets)
    with pytest.raises(ValueError, match=r"MoELayer: x must be \[..., dim = 6\], got \[4, 5\]|MoERouter: x must be"):
        moe.MoELayer(6, 8, 4)(draw(4, 5))
