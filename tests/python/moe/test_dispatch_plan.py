"""moe.dispatch_plan, permute, combine and to_dense. Test 10 of the acceptance list (arXiv:2512.03915): the plan is a
stable argsort, permute and combine are each other's inverse, gradients, and the same bits on any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torch_ext import moe
from torch_ext.reference.moe import combine as reference_combine
from torch_ext.reference.moe import dispatch_plan as reference_plan
from torch_ext.reference.moe import permute as reference_permute

ops = torch.ops.torch_ext


def draw_ids(tokens: int, top_k: int, experts: int, seed: int = 0, dropped: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(experts, (tokens, top_k), generator=generator)
    return torch.where(torch.rand(tokens, top_k, generator=generator) < dropped, -1, ids).int()


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- 10: the plan ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1000, 4, 16), (7, 1, 3), (0, 2, 4), (50, 8, 37), (5, 2, 1)])
def test_10_the_plan_is_a_stable_argsort(tokens: int, top_k: int, experts: int) -> None:
    ids = draw_ids(tokens, top_k, experts)
    plan = moe.dispatch_plan(ids, experts)
    flat = ids.flatten()
    assert torch.equal(plan.src_of.long(), flat.argsort(stable=True))
    counts = torch.bincount(flat, minlength=experts)
    assert torch.equal(plan.offsets.long(), torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))
    inverse = torch.empty(tokens * top_k, dtype=torch.int64)
    inverse[plan.src_of.long()] = torch.arange(tokens * top_k)
    assert torch.equal(plan.slot_of.long().flatten(), inverse)
    assert {t.dtype for t in plan} == {torch.int32}
    assert torch.equal(moe.dispatch_plan(ids.long(), experts).src_of, plan.src_of)


@pytest.mark.parametrize("seed", range(40))
def test_10_capacity_padding_and_missing_entries_are_those_of_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k, experts = (int(torch.randint(1, n, (), generator=generator)) for n in (40, 5, 12))
    ids = draw_ids(tokens, top_k, experts, seed, dropped=0.2)
    gates = torch.rand(tokens, top_k, generator=generator).mul(4).round() / 4  # many ties
    gates[0] = torch.nan  # ranks last
    for capacity in (None, 1, 3, 1000):
        for weights in (None, gates, gates.double(), gates.bfloat16()):
            for align in (1, 8):
                got = moe.dispatch_plan(ids, experts, capacity=capacity, gates=weights, align=align)
                ranked = None if weights is None else weights.double().nan_to_num(nan=-1e9)
                want = reference_plan(ids, experts, capacity=capacity, gates=ranked, align=align)
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a, b)
                assert (got.offsets % align == 0).all()
                rows = tokens * top_k if capacity is None else min(tokens * top_k, experts * capacity)
                assert len(got.src_of) == rows + experts * (align - 1)


def test_10_threads_and_runs_give_the_same_bits() -> None:
    ids, x = draw_ids(40_000, 4, 32), draw(40_000, 12)
    gates = draw(40_000, 4, seed=1)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        leaf, weight = x.clone().requires_grad_(), gates.clone().requires_grad_()
        plan = moe.dispatch_plan(ids, 32)
        y = moe.combine(moe.permute(leaf, plan).sin(), weight, plan)
        y.square().sum().backward()
        limited = moe.dispatch_plan(ids, 32, capacity=4000, gates=gates)
        results.append([*plan, *limited, y.detach(), leaf.grad, weight.grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- 10: rows --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 600, 1100])
def test_10_permute_and_combine_are_those_of_the_reference(dtype: torch.dtype, dim: int) -> None:
    ids = draw_ids(30, 3, 6, dropped=0.1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, gates = draw(30, dim).to(dtype), draw(30, 3, seed=1, dtype=wide)
    for options in ({}, {"capacity": 10}, {"align": 4}):
        plan = moe.dispatch_plan(ids, 6, **options)
        rows = moe.permute(x, plan)
        assert torch.equal(rows, reference_permute(x, plan.slot_of, plan.src_of))
        assert rows[plan.offsets[-1] :].count_nonzero() == 0
        for weight in (gates, None):
            assert torch.equal(moe.combine(rows, weight, plan), reference_combine(rows, weight, plan.slot_of))


def test_10_permute_then_combine_gives_x_back() -> None:
    x, plan = draw(50, 9), moe.dispatch_plan(draw_ids(50, 4, 8), 8)
    back = moe.combine(moe.permute(x, plan), torch.full((50, 4), 0.25), plan)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=0)
    torch.testing.assert_close(moe.combine(moe.permute(x, plan), None, plan), 4 * x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"capacity": 2}, {"align": 3}], ids=str)
def test_10_gradcheck_and_gradgradcheck(options: dict[str, Any]) -> None:
    plan = moe.dispatch_plan(draw_ids(6, 2, 3, dropped=0.2), 3, **options)
    x = draw(6, 4, dtype=torch.float64).requires_grad_()
    z = draw(len(plan.src_of), 4, seed=1, dtype=torch.float64).requires_grad_()
    gates = draw(6, 2, seed=2, dtype=torch.float64).requires_grad_()
    functions: list[tuple[Any, tuple[Tensor, ...]]] = [
        (lambda x: moe.permute(x, plan), (x,)),
        (lambda z, g: moe.combine(z, g, plan), (z, gates)),
        (lambda z: moe.combine(z, None, plan), (z,)),
        (lambda x, z: ops.moe_match(x, z, plan.slot_of, plan.src_of), (x, z)),
        (lambda x, g: ops.moe_permute(x, g, plan.slot_of, plan.src_of), (x, gates)),
    ]
    for function, inputs in functions:
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_narrow_rows_get_gradients_of_their_own_dtype() -> None:
    plan = moe.dispatch_plan(draw_ids(6, 2, 3), 3)
    z, gates = draw(12, 40).bfloat16().requires_grad_(), draw(6, 2, seed=1).requires_grad_()
    moe.combine(z, gates, plan).float().square().sum().backward()
    assert z.grad is not None
    assert gates.grad is not None
    assert z.grad.dtype == torch.bfloat16
    assert gates.grad.dtype == torch.float32


def test_layouts() -> None:
    plan = moe.dispatch_plan(draw_ids(6, 2, 3).T.contiguous().T, 3)
    x = draw(8, 6).T
    assert torch.equal(moe.permute(x, plan), moe.permute(x.contiguous(), plan))
    gates = draw(2, 6, seed=1).T
    rows = moe.permute(x, plan)
    assert torch.equal(moe.combine(rows, gates, plan), moe.combine(rows, gates.contiguous(), plan))


def test_to_dense() -> None:
    logits = draw(20, 6).requires_grad_()
    valid = torch.arange(20) != 3
    got = moe.route(logits, None, top_k=2, valid=valid)
    gates, chosen = moe.to_dense(got.gates, got.ids, 6)
    for t in range(20):
        expected = torch.zeros(6)
        for gate, e in zip(got.gates[t], got.ids[t].tolist(), strict=True):
            expected[e] = gate.detach() if e >= 0 else expected[e]
        assert torch.equal(gates[t].detach(), expected)
        assert sorted(chosen[t].nonzero().flatten().tolist()) == sorted(e for e in got.ids[t].tolist() if e >= 0)
    (a,) = torch.autograd.grad(gates.square().sum(), logits, retain_graph=True)
    (b,) = torch.autograd.grad(got.gates.square().sum(), logits)
    torch.testing.assert_close(a, b)


# --- the operators ---------------------------------------------------------------------------------------------------
def test_opcheck() -> None:
    ids = draw_ids(9, 2, 4)
    for options in ({}, {"capacity": 3, "gates": draw(9, 2)}, {"align": 4}):
        torch.library.opcheck(ops.moe_dispatch_plan.default, (ids, 4), options)
    plan = moe.dispatch_plan(ids, 4)
    x, z = draw(9, 5).requires_grad_(), draw(18, 5, seed=1).requires_grad_()
    gates = draw(9, 2, seed=2).requires_grad_()
    for g in (gates, None):
        torch.library.opcheck(ops.moe_permute.default, (x, g, plan.slot_of, plan.src_of))
        torch.library.opcheck(ops.moe_combine.default, (z, g, plan.slot_of, plan.src_of))
    torch.library.opcheck(ops.moe_match.default, (x, z, plan.slot_of, plan.src_of))
    torch.library.opcheck(ops.moe_to_dense.default, (gates, ids, 4))


def test_compile() -> None:
    def move(x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        plan = moe.dispatch_plan(ids, 4)
        return moe.combine(moe.permute(x, plan).sin(), gates, plan)

    x, gates, ids = draw(9, 5).requires_grad_(), draw(9, 2, seed=2).requires_grad_(), draw_ids(9, 2, 4)
    compiled = torch.compile(move, fullgraph=True, backend="aot_eager")
    for function in (move, compiled):
        y = function(x, gates, ids)
        grads = torch.autograd.grad(y.square().sum(), (x, gates))
        if function is move:
            expected = (y, *grads)
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), expected, strict=True))


# --- what is refused -------------------------------------------------------------------------------------------------
IDS = torch.zeros(3, 2, dtype=torch.int32)
PLAN_ERRORS: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
    (TypeError, "ids must be int32 or int64, got Float", IDS.float(), 4, {}),
    (ValueError, r"ids must be \[T, K\] with K >= 1", IDS[0], 4, {}),
    (ValueError, r"ids must be \[T, K\] with K >= 1", IDS[:, :0], 4, {}),
    (ValueError, "num_experts must be positive", IDS, 0, {}),
    (ValueError, r"ids\[0, 0\] is 7; an id must be in \[0, num_experts = 4\), or -1", IDS + 7, 4, {}),
    (ValueError, r"ids\[0, 0\] is -2; an id must be in", IDS - 2, 4, {}),
    (ValueError, r"an id must be in \[0, num_experts = 4\)", IDS.long() + 2**32, 4, {}),
    (ValueError, "capacity must be at least 1, got 0", IDS, 4, {"capacity": 0}),
    (ValueError, "align must be at least 1, got 0", IDS, 4, {"align": 0}),
    (ValueError, "more rows than 32-bit indices reach", IDS, 4, {"align": 2**30}),
    (ValueError, "gates must have ids' shape and device", IDS, 4, {"capacity": 1, "gates": torch.zeros(3)}),
    (TypeError, "gates has dtype Int", IDS, 4, {"capacity": 1, "gates": IDS}),
]


@pytest.mark.parametrize(("error", "message", "ids", "experts", "options"), PLAN_ERRORS)
def test_plan_rejections(error: Any, message: str, ids: Tensor, experts: int, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        moe.dispatch_plan(ids, experts, **options)


def test_row_rejections() -> None:
    plan = moe.dispatch_plan(IDS, 4)
    with pytest.raises(ValueError, match=r"moe\.permute: x must be \[T = 3, D\] for this plan, got \[4, 5\]"):
        moe.permute(torch.zeros(4, 5), plan)
    with pytest.raises(ValueError, match=r"moe\.combine: z must be \[S = 6, D\] for this plan"):
        moe.combine(torch.zeros(3, 5), None, plan)
    with pytest.raises(TypeError, match=r"moe\.combine: gates must be Float beside rows of BFloat16, got Double"):
        moe.combine(torch.zeros(6, 5).bfloat16(), torch.zeros(3, 2).double(), plan)
    with pytest.raises(ValueError, match=r"moe\.combine: gates must be \[T, K\] = \[3, 2\]"):
        moe.combine(torch.zeros(6, 5), torch.zeros(3, 3), plan)
    with pytest.raises(TypeError, match=r"moe\.permute: x has dtype Long"):
        moe.permute(torch.zeros(3, 5).long(), plan)
    with pytest.raises(TypeError, match="slot_of must be int32"):
        moe.permute(torch.zeros(3, 5), plan._replace(slot_of=plan.slot_of.long()))
    with pytest.raises(ValueError, match="the plan is on cpu, the rows are on meta"):
        moe.permute(torch.zeros(3, 5, device="meta"), plan)
    with pytest.raises(ValueError, match=r"moe\.to_dense: gates and ids must be \[T, K\]"):
        moe.to_dense(torch.zeros(3, 3), IDS, 4)


@pytest.mark.cuda
def test_cuda_gives_the_bits_of_the_cpu() -> None:
    for seed in range(20):
        ids, gates = draw_ids(3000, 4, 37, seed, dropped=0.1), draw(3000, 4, seed=seed)
        for options in ({}, {"capacity": 200}, {"capacity": 200, "gates": gates}, {"align": 16}):
            on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
            a = moe.dispatch_plan(ids, 37, **options)
            b = moe.dispatch_plan(ids.cuda(), 37, **on_gpu)
            assert all(torch.equal(x, y.cpu()) for x, y in zip(a, b, strict=True))
            for dim in (5, 64, 1030):
                x, z = draw(3000, dim, seed=1), draw(len(a.src_of), dim, seed=2)
                assert torch.equal(moe.permute(x, a), moe.permute(x.cuda(), b).cpu())
                assert torch.equal(moe.combine(z, gates, a), moe.combine(z.cuda(), gates.cuda(), b).cpu())
                here = ops.moe_match(x, z, a.slot_of, a.src_of)
                assert torch.equal(here, ops.moe_match(x.cuda(), z.cuda(), b.slot_of, b.src_of).cpu())
