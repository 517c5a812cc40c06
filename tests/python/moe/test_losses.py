"""Auxiliary losses against loops over sequences, and their closed forms at perfect balance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torch_ext import moe
from torch_ext.reference.moe import balance_loss, sequence_loss, z_loss


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES = ("sigmoid", "softmax", "sqrtsoftplus")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_they_are_those_of_the_reference(score: Any, masked: bool) -> None:
    logits, counts = draw(3, 7, 5), torch.tensor([4, 0, 9, 2, 6], dtype=torch.int32)
    valid = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    if valid is not None:
        valid[2] = False  # a sequence of padding alone
        logits[~valid] = torch.nan  # which may hold anything
    logits.requires_grad_()
    flat, flags = logits.view(21, 5), None if valid is None else valid.view(21)
    pairs = [
        (moe.balance_loss(flat, counts, 0.3, score=score, valid=flags), balance_loss(flat, counts, 0.3, score, flags)),
        (
            moe.sequence_loss(logits, 2, 0.7, score=score, valid=valid),
            sequence_loss(logits, 2, 0.7, score, valid),
        ),
        (moe.z_loss(logits, 0.2, valid=valid), z_loss(logits, 0.2, valid)),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        (a,) = torch.autograd.grad(got, logits, retain_graph=True)
        (b,) = torch.autograd.grad(want, logits, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_perfect_balance_costs_the_coefficient() -> None:
    even = torch.zeros(8, 4)
    assert moe.balance_loss(even, torch.full((4,), 5), 0.01).item() == pytest.approx(0.01)
    sequence = 9 * torch.eye(4).repeat(2, 1).unsqueeze(0)  # each expert is the first of two tokens
    assert moe.sequence_loss(sequence, 1, 0.5).item() == pytest.approx(0.5)
    assert moe.z_loss(torch.zeros(3, 4), 2.0).item() == pytest.approx(2 * torch.tensor(4.0).log().item() ** 2)


def test_counts_of_all_processes_give_the_global_batch_loss() -> None:
    """f may come from anywhere; it is a constant, and its scale does not matter."""
    logits, counts = draw(8, 4).requires_grad_(), torch.tensor([3.0, 1, 2, 2], requires_grad=True)
    loss = moe.balance_loss(logits, counts)
    assert torch.equal(loss, moe.balance_loss(logits, 16 * counts))
    loss.backward()
    assert counts.grad is None


def test_derivatives() -> None:
    logits, counts = draw(2, 4, 3).requires_grad_(), torch.tensor([3, 1, 4])
    for loss in (
        lambda x: moe.balance_loss(x.view(8, 3), counts),
        lambda x: moe.sequence_loss(x, 2),
        moe.z_loss,
    ):
        assert gradcheck(loss, (logits,))
        assert gradgradcheck(loss, (logits,))


def test_narrow_logits_are_computed_in_float32() -> None:
    logits = draw(2, 4, 3).bfloat16()
    assert moe.z_loss(logits).dtype == torch.float32
    assert torch.equal(moe.sequence_loss(logits, 1), moe.sequence_loss(logits.float(), 1))


def test_opcheck() -> None:
    ops = torch.ops.torch_ext
    logits = draw(2, 4, 3).requires_grad_()
    torch.library.opcheck(ops.moe_balance_loss.default, (logits.detach().view(8, 3), torch.tensor([3, 1, 4])))
    torch.library.opcheck(ops.moe_sequence_loss.default, (logits, 2))
    torch.library.opcheck(ops.moe_z_loss.default, (logits,))


def test_rejections() -> None:
    x = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"moe\.balance_loss: logits have the wrong number of dimensions"):
        moe.balance_loss(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"counts must be \[E = 3\]"):
        moe.balance_loss(x[0], torch.zeros(4))
    with pytest.raises(ValueError, match=r"moe\.sequence_loss: top_k must be in \[1, E = 3\], got 4"):
        moe.sequence_loss(x, 4)
    with pytest.raises(ValueError, match="score must be 'sigmoid', 'softmax' or 'sqrtsoftplus', got 'none'"):
        moe.sequence_loss(x, 1, score="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the coefficient must be finite"):
        moe.z_loss(x, float("inf"))
    with pytest.raises(TypeError, match="valid must be bool"):
        moe.z_loss(x, valid=torch.ones(2, 4))
    with pytest.raises(ValueError, match="valid must have the shape of the logits without the last dimension"):
        moe.z_loss(x, valid=torch.ones(2, 3).bool())
    with pytest.raises(TypeError, match=r"moe\.z_loss: logits has dtype Long"):
        moe.z_loss(x.long())
