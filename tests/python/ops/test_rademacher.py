"""torch_ext::rademacher_ and rademacher_probe against the reference: every sign, in every dtype and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_ext import ops
from torch_ext.reference.ops import rademacher as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 64, 127, 128, 129, 100_000)
fill = torch.ops.torch_ext.rademacher_.default
probe = torch.ops.torch_ext.rademacher_probe.default
refill = torch.ops.torch_ext.rademacher_refill_.default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    keys: dict[str, Any] = {"stream": 5, "ordinal": 77, "epoch": 2**31 + 3}
    tensor = torch.full((size,), 9.0, dtype=dtype)
    assert ops.rademacher_(tensor, -(2**62) + 1, **keys) is tensor
    expected = reference((size,), seed=-(2**62) + 1, dtype=dtype, **keys)
    assert torch.equal(tensor, expected)
    (other,) = probe([torch.empty(size, dtype=dtype)], [77], -(2**62) + 1, 5, 2**31 + 3)
    assert torch.equal(other, expected)
    again = torch.full((size,), 9.0, dtype=dtype)
    refill([again], [77], -(2**62) + 1, 5, 2**31 + 3)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 50), (2, 3, 4, 11), (0, 3)])
def test_layouts_follow_the_logical_index(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    expected = reference(shape, seed=1, stream=2, dtype=dtype)
    layouts = [torch.empty(shape, dtype=dtype)]
    layouts.append(torch.empty(shape[::-1], dtype=dtype).permute(tuple(range(len(shape) - 1, -1, -1))))
    layouts.append(torch.empty([2 * s + 1 for s in shape], dtype=dtype)[tuple(slice(1, None, 2) for _ in shape)])
    if len(shape) == 4:
        layouts.append(torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last))
    for tensor in layouts:
        strides = tensor.stride()
        ops.rademacher_(tensor, 1, 2)
        assert torch.equal(tensor, expected)
        assert tensor.stride() == strides
        assert torch.equal(probe([tensor], [0], 1, 2, 0)[0], expected)


def test_a_slice_leaves_its_surroundings_alone() -> None:
    base = torch.full((6, 9), 5.0)
    ops.rademacher_(base[1:5, 2:7], 0, 0)
    assert int((base == 5).sum()) == 6 * 9 - 20
    assert torch.equal(base[1:5, 2:7], reference((4, 5), seed=0))


def test_probe_of_a_mixed_list() -> None:
    like = [torch.empty(3, 5), torch.empty(0), torch.empty(200, dtype=torch.bfloat16), torch.empty(2, 2).double()]
    probes = probe(like, [4, 5, 9, 2**24 - 1], 8, 1, 6)
    for tensor, ordinal, z in zip(like, [4, 5, 9, 2**24 - 1], probes, strict=True):
        assert torch.equal(z, reference(tensor.shape, seed=8, stream=1, ordinal=ordinal, epoch=6, dtype=tensor.dtype))


def test_fields_do_not_run_into_each_other() -> None:
    """Each of seed, stream, ordinal and epoch alone gives another tensor, also in its highest bit."""
    base: dict[str, int] = {"seed": 0, "stream": 0, "ordinal": 0, "epoch": 0}
    seen = set()
    changes = {"seed": (1, 2**32, -(2**63)), "stream": (1, 2**31), "ordinal": (1, 2**23), "epoch": (1, 2**31)}
    for change in [{}, *({key: value} for key, values in changes.items() for value in values)]:
        keys = {**base, **change}
        tensor = ops.rademacher_(
            torch.empty(256), keys["seed"], keys["stream"], ordinal=keys["ordinal"], epoch=keys["epoch"]
        )
        seen.add(tuple(tensor.tolist()))
    assert len(seen) == 10


def test_balanced_and_independent() -> None:
    n = 1_000_000
    z = ops.rademacher_(torch.empty(n), 3, 0)
    w = ops.rademacher_(torch.empty(n), 3, 1)
    for product in (z, w, z * w, z[1:] * z[:-1], z[32:] * z[:-32], z[128:] * z[:-128]):
        assert abs(product.mean().item()) < 5 / n**0.5


def test_threads_do_not_matter() -> None:
    one = ops.rademacher_(torch.empty(500_001), 3, 0)
    torch.set_num_threads(2)
    assert torch.equal(ops.rademacher_(torch.empty(500_001), 3, 0), one)


@pytest.mark.parametrize(
    ("tensor", "arguments", "error", "message"),
    [
        (torch.empty(3, dtype=torch.int64), {}, TypeError, "rademacher_: the tensor has dtype Long; supported are"),
        (torch.empty(3, dtype=torch.complex64), {}, TypeError, "supported are float32, float64, bfloat16 and float16"),
        (torch.empty(1).expand(3), {}, RuntimeError, "is expanded"),
        (torch.empty(3), {"stream": -1}, ValueError, r"stream must be in \[0, 2\^32\), got -1"),
        (torch.empty(3), {"stream": 2**32}, ValueError, "stream must be"),
        (torch.empty(3), {"ordinal": 2**24}, ValueError, r"ordinal must be in \[0, 2\^24\)"),
        (torch.empty(3), {"epoch": -1}, ValueError, "epoch must be"),
    ],
)
def test_bad_input(tensor: Tensor, arguments: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.rademacher_(tensor, 0, arguments.get("stream", 0), **{k: v for k, v in arguments.items() if k != "stream"})


def test_bad_input_of_probe() -> None:
    with pytest.raises(ValueError, match="ordinals has 1 tensors, expected 2"):
        refill([torch.empty(2), torch.empty(3)], [0], 0, 0, 0)
    with pytest.raises(ValueError, match=r"rademacher_refill_: tensor 1 \(shape \[2, 3\]\) is not contiguous"):
        refill([torch.empty(2), torch.empty(3, 2).t()], [0, 1], 0, 0, 0)
    with pytest.raises(ValueError, match="ordinals has 1 tensors, expected 2"):
        probe([torch.empty(2), torch.empty(3)], [0], 0, 0, 0)
    with pytest.raises(TypeError, match=r"rademacher.*: tensor 1 \(shape \[3\]\) has dtype Int"):
        probe([torch.empty(2), torch.empty(3, dtype=torch.int32)], [0, 1], 0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(fill, (torch.empty(7, dtype=dtype), 3, 1), {"ordinal": 2, "epoch": 1})
    torch.library.opcheck(fill, (torch.empty(5, 4, dtype=dtype).t(), 3, 1))
    torch.library.opcheck(refill, ([torch.empty(3, 5, dtype=dtype), torch.empty(4, dtype=dtype)], [0, 3], 3, 1, 0))
    torch.library.opcheck(probe, ([torch.empty(3, 5, dtype=dtype), torch.empty(4, dtype=dtype)], [0, 3], 3, 1, 0))


def test_not_differentiable() -> None:
    """No gradcheck: the signs depend on no input value, so nothing that comes out requires a gradient."""
    p = torch.ones(3, requires_grad=True)
    (z,) = probe([p], [0], 0, 0, 0)
    assert not z.requires_grad
    with pytest.raises(RuntimeError, match=r"rademacher_ writes to a tensor that requires a gradient.*no_grad"):
        ops.rademacher_(p, 0, 0)
    with torch.no_grad():
        version = p._version
        ops.rademacher_(p, 0, 0)
    assert p._version == version + 1
    saved = torch.ones(3)
    loss = (saved * p * p).sum()
    ops.rademacher_(saved, 0, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compile_fullgraph_and_meta() -> None:
    torch._dynamo.reset()

    def noisy(x: Tensor, seed: int) -> Tensor:
        y = x * 2
        ops.rademacher_(y, seed, 1)
        return y + x

    compiled = torch.compile(noisy, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 130):
        x = torch.randn(size)
        assert torch.equal(compiled(x, 5), reference((size,), seed=5, stream=1) + x)
    probes = torch.compile(lambda x: probe([x, x[0]], [0, 1], 5, 1, 0), fullgraph=True, backend="aot_eager")
    for z, ordinal, shape in zip(probes(torch.randn(4, 3)), (0, 1), ((4, 3), (3,)), strict=True):
        assert torch.equal(z, reference(shape, seed=5, stream=1, ordinal=ordinal))
    meta = torch.empty(3, device="meta")
    assert ops.rademacher_(meta, 0, 0) is meta
    assert probe([meta], [0], 0, 0, 0)[0].device.type == "meta"
    with pytest.raises(ValueError, match="stream must be"):
        ops.rademacher_(meta, 0, -1)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_cuda_equals_cpu(size: int, dtype: torch.dtype) -> None:
    gpu = ops.rademacher_(torch.empty(size, dtype=dtype, device="cuda"), 3, 1, ordinal=2, epoch=5)
    assert torch.equal(gpu.cpu(), ops.rademacher_(torch.empty(size, dtype=dtype), 3, 1, ordinal=2, epoch=5))
