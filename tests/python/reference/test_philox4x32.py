"""Philox4x32-10 and the Rademacher signs of the reference, pinned by numbers that are not ours."""

import pytest
import torch

from torch_ext.reference.ops import philox4x32, rademacher, rademacher_
from torch_ext.reference.ops.philox4x32 import philox_counter, philox_key

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, expected
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(w, 16) for w in text.split()], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert torch.equal(philox4x32(words(counter), words(key)), words(expected))


def test_batches_and_broadcasting() -> None:
    counter = torch.stack([words(c) for c, _, _ in KNOWN_ANSWERS])
    key = torch.stack([words(k) for _, k, _ in KNOWN_ANSWERS])
    expected = torch.stack([words(e) for _, _, e in KNOWN_ANSWERS])
    assert torch.equal(philox4x32(counter, key), expected)
    assert torch.equal(
        philox4x32(counter.view(3, 1, 4), key[:1]), philox4x32(counter, key[:1].expand(3, 2)).view(3, 1, 4)
    )
    assert philox4x32(torch.empty(0, 4, dtype=torch.int64), key[0]).shape == (0, 4)


def test_only_32_bits_of_a_word_count() -> None:
    counter, key = words(KNOWN_ANSWERS[2][0]), words(KNOWN_ANSWERS[2][1])
    assert torch.equal(philox4x32(counter + (5 << 32), key - (1 << 32)), philox4x32(counter, key))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="int64"):
        philox4x32(torch.zeros(4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"counter must be \[..., 4\]"):
        philox4x32(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


def test_layout_of_key_and_counter() -> None:
    assert philox_key(0x0123456789ABCDEF).tolist() == [0x89ABCDEF, 0x01234567]
    assert philox_key(-1).tolist() == [0xFFFFFFFF, 0xFFFFFFFF]
    counter = philox_counter(torch.tensor([6]), stream=7, ordinal=0x2000005, tag=3, epoch=9)
    assert counter.tolist() == [[6, 7, 0x503, 9]]  # 24 bits of the ordinal


def test_rademacher_bit_order() -> None:
    """Element e is bit e % 32 (least significant first) of word (e % 128) // 32 of block e // 128."""
    z = rademacher((300,), seed=0x243F6A88_85A308D3, stream=2, ordinal=5, epoch=11)
    for e in (0, 1, 31, 32, 63, 64, 127, 128, 200, 256, 299):
        counter = torch.tensor([e // 128, 2, (5 << 8) | 3, 11])
        word = int(philox4x32(counter, torch.tensor([0x85A308D3, 0x243F6A88]))[e % 128 // 32])
        assert z[e] == (1 if word >> (e % 32) & 1 else -1)


def test_rademacher_known_signs() -> None:
    """Seed 0, ordinal 0, sample 0, refresh 0: what any other implementation must start with."""
    signs = "".join("+" if s > 0 else "-" for s in rademacher((64,), seed=0).tolist())
    word0, word1, _, _ = philox4x32(torch.tensor([0, 0, 3, 0]), torch.tensor([0, 0])).tolist()
    bits = f"{word0:032b}"[::-1] + f"{word1:032b}"[::-1]
    assert signs == bits.replace("1", "+").replace("0", "-")
    assert signs == SIGNS


SIGNS = "--++++-+-+-+----+--+-+-+----++++---+++-+-++-+--+---++-+-+---+---"


def test_rademacher_is_balanced_and_uncorrelated() -> None:
    n = 1 << 20
    z = rademacher((n,), seed=1, dtype=torch.float64)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    others = [
        rademacher((n,), seed=2, dtype=torch.float64),
        rademacher((n,), seed=1, stream=1, dtype=torch.float64),
        rademacher((n,), seed=1, ordinal=1, dtype=torch.float64),
        rademacher((n,), seed=1, epoch=1, dtype=torch.float64),
        z.roll(1),
        z.roll(32),
        z.roll(128),
    ]
    bound = 5 / n**0.5  # five standard errors
    assert abs(float(z.mean())) < bound
    for other in others:
        assert abs(float((z * other).mean())) < bound
    by_bit = z.view(-1, 128).mean(0)
    assert float(by_bit.abs().max()) < 5 / (n / 128) ** 0.5


def test_rademacher_in_place_any_layout() -> None:
    expected = rademacher((6, 10), seed=4, stream=1, ordinal=2, epoch=3)
    transposed = torch.zeros(10, 6).t()
    assert rademacher_(transposed, 4, 1, ordinal=2, epoch=3) is transposed
    assert torch.equal(transposed, expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(rademacher_(torch.zeros(6, 10, dtype=dtype), 4, 1, ordinal=2, epoch=3), expected.to(dtype))
    assert rademacher((), seed=0).shape == ()
    assert rademacher((0, 3), seed=0).shape == (0, 3)
    assert torch.equal(rademacher((60,), seed=4, stream=1, ordinal=2, epoch=3), expected.view(-1))
