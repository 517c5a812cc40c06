"""torch_ext::philox4x32 against the published known answers and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_ext import ops
from torch_ext.reference.ops import philox4x32 as reference

op = torch.ops.torch_ext.philox4x32.default

KNOWN = [  # Random123's kat_vectors: counter, key, result
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert ops.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == expected


@pytest.mark.parametrize("rows", [0, 1, 7, 64, 127, 128, 129, 100_000])
def test_equals_the_reference(rows: int) -> None:
    counter, key = integers(rows, 4), integers(rows, 2, seed=1)
    result = ops.philox4x32(counter, key)
    assert result.shape == (rows, 4)
    assert torch.equal(result, reference(counter, key))
    if rows:
        assert int(result.min()) >= 0
        assert int(result.max()) < 2**32


def test_layouts_and_broadcasting() -> None:
    counter, key = integers(5, 1, 3, 4), integers(2, 1, 2, seed=1)
    expected = reference(counter, key)
    assert expected.shape == (5, 2, 3, 4)
    assert torch.equal(ops.philox4x32(counter, key), expected)
    transposed = integers(4, 9).t()
    spaced = torch.stack([integers(9, 2), integers(9, 2, seed=2)], -1)[..., 1]
    assert torch.equal(ops.philox4x32(transposed, spaced), reference(transposed, spaced))
    one = integers(4).expand(6, 4)
    assert torch.equal(ops.philox4x32(one, integers(2)), reference(one, integers(2)))


def test_words_are_taken_modulo_2_to_the_32() -> None:
    counter, key = integers(50, 4), integers(50, 2, seed=1)
    assert torch.equal(ops.philox4x32(counter, key), ops.philox4x32(counter & 0xFFFFFFFF, key & 0xFFFFFFFF))


def test_threads_do_not_matter() -> None:
    counter, key = integers(200_000, 4), integers(2)
    one = ops.philox4x32(counter, key)
    torch.set_num_threads(2)
    assert torch.equal(ops.philox4x32(counter, key), one)


@pytest.mark.parametrize(
    ("counter", "key", "error", "message"),
    [
        (torch.zeros(4), torch.zeros(2, dtype=torch.int64), TypeError, "must be int64, got Float and Long"),
        (torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), TypeError, "must be int64"),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            ValueError,
            r"counter must be \[..., 4\]",
        ),
        (torch.tensor(0), torch.zeros(2, dtype=torch.int64), ValueError, r"counter must be \[..., 4\]"),
        (torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), ValueError, r"key must be \[..., 2\]"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), RuntimeError, "must match"),
        (
            torch.zeros(4, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "counter is on cpu, key on meta",
        ),
    ],
)
def test_bad_input(counter: Tensor, key: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.philox4x32(counter, key)


def test_opcheck() -> None:
    """No gradcheck: integers in, integers out."""
    torch.library.opcheck(op, (integers(5, 4), integers(2)))
    torch.library.opcheck(op, (integers(0, 4), integers(0, 2)))
    assert not op(integers(5, 4), integers(2)).requires_grad


def test_compile_fullgraph_and_meta() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda c, k: ops.philox4x32(c + 1, k), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 130):
        counter, key = integers(rows, 4), integers(2)
        assert torch.equal(compiled(counter, key), reference(counter + 1, key))
    shape = ops.philox4x32(integers(5, 1, 4).to("meta"), integers(3, 2).to("meta"))
    assert (shape.shape, shape.dtype, shape.device.type) == ((5, 3, 4), torch.int64, "meta")


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    counter, key = integers(100_000, 4), integers(2)
    assert torch.equal(ops.philox4x32(counter.cuda(), key.cuda()).cpu(), ops.philox4x32(counter, key))
