"""The ops on lists of tensors that the optimizers share: accumulate_, count_nonfinite_, and AdaHessian's update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 64, 127, 128, 129, 100_000)
accumulate = torch.ops.torch_ext.accumulate_.default
count_nonfinite = torch.ops.torch_ext.count_nonfinite_.default
step = torch.ops.torch_ext.adahessian_step_.default
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-4,
    "weight_decay": 0.01,
    "hessian_power": 1.0,
    "max_update": None,
    "linear_averaging": "none",
    "block_size": 0,
    "average_conv": True,
    "averaging": "abs_mean",
    "update_each": 1,
    "refresh": True,
    "maximize": False,
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- accumulate_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_accumulate_equals_torch(size: int, dtype: torch.dtype) -> None:
    total, x = randn(size, dtype=wide(dtype)), randn(size, seed=1, dtype=dtype)
    signs = randn(size, seed=2).sign().to(dtype)
    expected = total + x.to(total.dtype) * signs.to(total.dtype) * 0.25
    accumulate([total], [x], [signs], 0.25)
    assert torch.equal(total, expected)
    accumulate([total], [x], [], 0.25)
    assert torch.equal(total, expected + x.to(total.dtype) * 0.25)


def test_accumulate_in_mixed_layouts_and_dtypes() -> None:
    x = [randn(4, 6), randn(3, 5, dtype=torch.bfloat16), randn(2, 3, 4, 5, dtype=torch.float64), randn()]
    layouts = [
        [t.clone() for t in x],
        [t.mT.contiguous().mT if t.dim() > 1 else t for t in x],
        [torch.stack([t, t], -1)[..., 0] for t in x],
    ]
    for a in layouts:
        for b in layouts:
            sums = [t.to(wide(t.dtype)).mul(2) for t in a]
            expected = [s + t.to(s.dtype) * 0.5 for s, t in zip(sums, x, strict=True)]
            accumulate(sums, b, [], 0.5)
            assert all(torch.equal(s, e) for s, e in zip(sums, expected, strict=True))


def test_accumulate_messages() -> None:
    with pytest.raises(ValueError, match="accumulate_: x has 1 tensors, expected 2"):
        accumulate([torch.zeros(2), torch.zeros(2)], [torch.zeros(2)], [], 1.0)
    with pytest.raises(ValueError, match="signs has 2 tensors, expected 1"):
        accumulate([torch.zeros(2)], [torch.zeros(2)], [torch.zeros(2)] * 2, 1.0)
    with pytest.raises(TypeError, match=r"sum 0 \(shape \[2\]\) has dtype BFloat16"):
        accumulate([torch.zeros(2, dtype=torch.bfloat16)], [torch.zeros(2, dtype=torch.bfloat16)], [], 1.0)
    with pytest.raises(ValueError, match=r"sum 0 \(shape \[2\]\) and x differ in shape"):
        accumulate([torch.zeros(2)], [torch.zeros(3)], [], 1.0)
    with pytest.raises(RuntimeError, match=r"sum 0 \(shape \[3\]\) is expanded"):
        accumulate([torch.zeros(1).expand(3)], [torch.zeros(3)], [], 1.0)


# ---- conversions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    total = torch.zeros(2**16)
    accumulate([total], [x], [], 1.0)
    expected = x.float()
    nan = expected.isnan()
    assert torch.equal(total.isnan(), nan)
    assert torch.equal(total[~nan], expected[~nan] + 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_float_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    """p = 0 - 1 * g with p of half precision and g float32: all halves, all midpoints, neighbours, random bits."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    following = torch.nextafter(halves.to(dtype), torch.full_like(halves, math.inf).to(dtype)).float()
    middle = ((halves.double() + following.double()) / 2).float()
    up, down = torch.full_like(middle, math.inf), torch.full_like(middle, -math.inf)
    bits = torch.randint(-(2**31), 2**31, (500_000,), generator=torch.Generator().manual_seed(0))
    g = torch.cat(
        [halves, middle, middle.nextafter(up), middle.nextafter(down), bits.to(torch.int32).view(torch.float32)]
    )
    p = torch.zeros_like(g, dtype=dtype)
    options = {**OPTIONS, "lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "hessian_power": 0.0, "weight_decay": 0.0}
    new = [torch.zeros_like(g), torch.zeros_like(g), torch.zeros(()), torch.ones(2, dtype=torch.float64)]
    step([p], [g], [torch.zeros_like(g)], *([t] for t in new), torch.zeros(()), None, **options)
    expected = (-g).to(dtype)
    nan = expected.isnan()
    assert torch.equal(p.isnan(), nan)
    assert torch.equal(p[~nan], expected[~nan])


# ---- count_nonfinite_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_every_position_is_looked_at(dtype: torch.dtype, bad: float) -> None:
    skipped = torch.zeros((), dtype=torch.int64)
    clean = [randn(129, dtype=dtype), torch.zeros(0, dtype=dtype), randn(70_000, dtype=dtype)]
    assert count_nonfinite(clean, None, skipped).item() == 0
    hits = 0
    for tensor, positions in ((clean[0], range(129)), (clean[2], (0, 65535, 65536, 69_999))):
        for i in positions:
            keep = tensor[i].item()
            tensor[i] = bad
            flag = count_nonfinite(clean, None, skipped)
            assert (flag.item(), flag.dtype, flag.dim()) == (1.0, torch.float32, 0)
            tensor[i] = keep
            hits += 1
    assert skipped.item() == hits


def test_count_of_mixed_lists_layouts_and_found_inf() -> None:
    skipped = torch.zeros((), dtype=torch.int64)
    tensors = [randn(3, 4), randn(5, 6, dtype=torch.float64).t(), randn(8, 9, dtype=torch.bfloat16)[::2, 1::3]]
    expanded = torch.ones(1).expand(7)
    assert count_nonfinite([*tensors, expanded], None, skipped).item() == 0
    tensors[2][3, 2] = math.nan
    assert count_nonfinite([*tensors, expanded], None, skipped).item() == 1
    assert count_nonfinite([torch.full((1,), math.inf).expand(7)], None, skipped).item() == 1
    assert count_nonfinite([expanded], torch.tensor([1.0]), skipped).item() == 1
    assert count_nonfinite([expanded], torch.tensor(0.0), skipped).item() == 0
    assert count_nonfinite(tensors, torch.tensor([1.0]), skipped).item() == 1
    assert skipped.item() == 4
    with pytest.raises(ValueError, match="no tensors"):
        count_nonfinite([], None, skipped)
    with pytest.raises(TypeError, match="has dtype Long"):
        count_nonfinite([torch.zeros(2, dtype=torch.int64)], None, skipped)


# ---- adahessian_step_


def arguments(*params: Tensor, blocks: int = 1) -> tuple[Any, ...]:
    params_list = [p.detach() for p in params]
    grads = [randn(*p.shape, seed=i, dtype=p.dtype) for i, p in enumerate(params)]
    curvature = [randn(*p.shape, seed=i + 9, dtype=p.dtype) for i, p in enumerate(params)]
    first = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in params_list]
    second = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in params_list]
    if blocks > 1:
        second = [torch.zeros(p.size(0), p.size(1) // blocks, dtype=wide(p.dtype)) for p in params_list]
    steps = [torch.zeros(()) for _ in params]
    products = [torch.ones(2, dtype=torch.float64) for _ in params]
    return params_list, grads, curvature, first, second, steps, products, torch.zeros(()), None


def test_step_messages() -> None:
    def edited(index: int, value: Any, *params: Tensor) -> tuple[Any, ...]:
        found = list(arguments(*(params or (torch.zeros(2, 3), torch.zeros(4)))))
        if isinstance(value, dict):
            found[index] = list(found[index])
            for i, entry in value.items():
                found[index][i] = entry
        else:
            found[index] = value
        return tuple(found)

    integer = torch.zeros(3, dtype=torch.int64)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (edited(1, []), ValueError, "adahessian_step_: grads has 0 tensors, expected 2"),
        (edited(2, []), ValueError, "curvature has 0 tensors, expected 2"),
        (edited(5, []), ValueError, "steps has 0 tensors, expected 2"),
        (edited(1, {1: torch.zeros(5)}), ValueError, r"gradient of parameter 1 \(shape \[4\]\) has shape \[5\]"),
        (edited(1, {1: torch.zeros(4).double()}), TypeError, "gradient of parameter 1 .* has dtype Double"),
        (edited(3, {1: torch.zeros(5)}), ValueError, "exp_avg of parameter 1 .* must be Float"),
        (edited(4, {1: torch.zeros(5)}), ValueError, r"exp_hessian_diag_sq of parameter 1 .* has shape \[5\]"),
        (edited(5, {0: torch.zeros(2)}), ValueError, "step must be one float32 and bias_products two float64"),
        (edited(6, {0: torch.ones(2)}), ValueError, "bias_products two float64 on the device of parameter 0"),
        (
            edited(0, {0: integer}, integer.float()),
            TypeError,
            r"parameters: parameter 0 \(shape \[3\]\) has dtype Long",
        ),
        (edited(0, {0: torch.zeros(3, dtype=torch.complex64)}, torch.zeros(3)), RuntimeError, "complex parameters"),
        (edited(0, {0: torch.zeros(1).expand(3)}, torch.zeros(3)), RuntimeError, "parameter 0 .* is expanded"),
    ]
    for values, error, message in bad:
        before = [t.clone() for t in values[3]]
        with pytest.raises(error, match=message):
            step(*values, **OPTIONS)
        assert all(torch.equal(a, b) for a, b in zip(values[3], before, strict=True))


def test_step_reads_the_flag_and_the_scale() -> None:
    plain, flagged, scaled = (list(arguments(randn(3, 5), randn(4))) for _ in range(3))
    flagged[7] = torch.ones(())
    before = [[t.clone() for t in flagged[i]] for i in (0, 3, 4, 5, 6)]
    step(*flagged, **OPTIONS)
    after = [flagged[i] for i in (0, 3, 4, 5, 6)]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    step(*plain, **OPTIONS)
    scaled[1] = [g * 8 for g in scaled[1]]
    scaled[2] = [c * 8 for c in scaled[2]]
    scaled[8] = torch.tensor(8.0)
    step(*scaled, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], scaled[0], strict=True))


# ---- what the dispatcher asks of every op


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    check = torch.library.opcheck
    x, total = randn(3, 5, dtype=dtype), randn(3, 5, dtype=wide(dtype))
    check(accumulate, ([total, total[0].clone()], [x, x[1]], [], 0.5))
    check(accumulate, ([total], [x], [x.sign()], 0.5))
    check(count_nonfinite, ([x, x[0]], None, torch.zeros((), dtype=torch.int64)))
    check(count_nonfinite, ([x], torch.ones(1), torch.zeros((), dtype=torch.int64)))
    check(step, arguments(x, x[0].clone()), OPTIONS)
    row = {**OPTIONS, "linear_averaging": "row", "averaging": "signed_mean", "hessian_power": 0.5}
    check(step, arguments(x, blocks=5), row)
    lazy = list(arguments(x))
    lazy[2] = []
    check(step, tuple(lazy), {**OPTIONS, "refresh": False})


def test_not_differentiable() -> None:
    """No gradcheck: updates in place of tensors that are read under no_grad; nothing returned requires a gradient."""
    x = randn(3).requires_grad_()
    flag = count_nonfinite([x], None, torch.zeros((), dtype=torch.int64))
    assert not flag.requires_grad
    total = torch.zeros(3)
    version = total._version
    accumulate([total], [x], [], 1.0)
    with pytest.raises(RuntimeError, match="accumulate_ writes to a tensor that requires a gradient"):
        accumulate([x], [total], [], 1.0)
    assert not total.requires_grad
    assert total._version == version + 1


def test_compile_fullgraph_and_meta() -> None:
    torch._dynamo.reset()

    def work(params: list[Tensor], state: tuple[Any, ...], weight: float) -> Tensor:
        grads, rest = state[1], state[2:]
        accumulate(grads, [p * 2 for p in params], [], weight)
        flag = count_nonfinite(grads, None, rest[-1])
        step(params, grads, rest[0], *rest[1:5], flag, None, **OPTIONS)
        return flag

    outcomes = []
    for function in (work, torch.compile(work, fullgraph=True, backend="aot_eager")):
        values = list(arguments(randn(3, 5), randn(7)))
        skipped = torch.zeros((), dtype=torch.int64)
        state = (*values[:7], skipped)
        for _ in range(3):
            assert function(values[0], state, 0.5).item() == 0
        outcomes.append([t for part in values[:7] for t in part])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))

    values = [[t.to("meta") for t in part] for part in arguments(randn(3, 5))[:7]]
    flag = count_nonfinite(values[1], None, torch.zeros((), dtype=torch.int64, device="meta"))
    assert (flag.device.type, flag.dtype) == ("meta", torch.float32)
    accumulate(values[3], values[1], [], 1.0)
    step(*values, flag, None, **OPTIONS)
    with pytest.raises(ValueError, match="grads has 0 tensors"):
        step(values[0], [], *values[2:], flag, None, **OPTIONS)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    """A hundred updates, refreshed every third time, give the CPU's bits."""
    for extra, blocks in (({}, 1), ({"linear_averaging": "row", "hessian_power": 0.5, "max_update": 0.3}, 70)):
        cpu = list(arguments(randn(33, 70, dtype=dtype), randn(5, 70, dtype=dtype), blocks=blocks))
        gpu = [[t.cuda() for t in part] if isinstance(part, list) else part for part in cpu]
        gpu[7] = torch.zeros((), device="cuda")
        for t in range(100):
            options = {**OPTIONS, **extra, "refresh": t % 3 == 0, "update_each": 3}
            for values in (cpu, gpu):
                step(*values[:2], values[2] if t % 3 == 0 else [], *values[3:], **options)
        for part in (0, 3, 4, 5, 6):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu[part], gpu[part], strict=True))
