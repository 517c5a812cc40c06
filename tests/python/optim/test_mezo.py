"""MeZO: bits that come back, the slope, what a step costs, and that it learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import _C
from torch_ext.ops.eggroll import eggroll_noise
from torch_ext.optim import MeZO
from torch_ext.testing import LANGUAGES, bits, cpp_optimizer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def adversarial(dtype: torch.dtype, n: int = 70001) -> Tensor:
    """Every exponent of the type, both signs, zeros, subnormals, powers of two with neighbours, infinities, NaN."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    low, high = math.log2(info.smallest_normal) + math.log2(info.eps), math.log2(info.max)
    exponents = torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    values = (torch.exp2(exponents) * signs).to(dtype)
    powers = torch.exp2(torch.arange(-20, 5, dtype=torch.float64)).to(dtype)
    edges = [powers, torch.nextafter(powers.float(), torch.zeros(())).to(dtype), -powers]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny], dtype=dtype)
    small = torch.randn(n, generator=generator, dtype=torch.float64).mul_(1e-3).to(dtype)
    return torch.cat([values, *edges, special, small, torch.zeros(100, dtype=dtype)])


@pytest.mark.parametrize("scale", [1e-3, -1e-3, 1.0, 1e-8, 1e4, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbation_is_taken_back_to_the_bit(dtype: torch.dtype, scale: float) -> None:
    values = adversarial(dtype)
    p = values.clone()
    perturbation = _C.MezoPerturbation([p], scale, 3, 7)
    z = eggroll_noise(p.numel(), 1, seed=3, ordinal=0, tag=2, pair_begin=0, pair_end=1, epoch=7).view(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (values.to(wide) + torch.tensor(scale, dtype=wide) * z.to(wide)).to(dtype)
    assert torch.equal(p.nan_to_num(7.0), expected.nan_to_num(7.0))
    back = (p.to(wide) - torch.tensor(scale, dtype=wide) * z.to(wide)).to(dtype)
    drifted = int((back.nan_to_num(7.0) != values.nan_to_num(7.0)).sum())
    assert drifted <= perturbation.kept() <= drifted + 300  # and zeros whose sign would be lost
    if scale == 1e-3:
        assert drifted > 1000  # what adding and subtracting would have changed
    perturbation.restore()
    assert bits(p) == bits(values)


def test_a_perturbation_that_goes_away_restores() -> None:
    p = adversarial(torch.float32)
    before = bits(p)
    perturbation = _C.MezoPerturbation([p], 1e-3, 0, 0)
    assert bits(p) != before
    del perturbation
    assert bits(p) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_perturbation(dtype: torch.dtype) -> None:
    """Weights of size 0.02: a bit each and the few whose exponent grew; never more than a copy and a bit each."""
    n = 1 << 20
    p = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    perturbation = _C.MezoPerturbation([p], 1e-3, 0, 0)
    share = (perturbation.bytes() - n / 8) / p.nbytes
    assert 0.005 < share < 0.11
    assert perturbation.kept() < 0.11 * n
    perturbation.restore()
    del perturbation
    tiny = torch.full((n,), 1e-12).to(dtype)
    perturbation = _C.MezoPerturbation([tiny], 1e-3, 0, 0)
    assert perturbation.bytes() <= n / 8 + tiny.nbytes + 16 * (n // 65536 + 1)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_restored_before_the_update(language: str, dtype: torch.dtype) -> None:
    """With lr 0 a step leaves every bit; the losses are those of p + eps z and p - eps z."""
    p = adversarial(dtype)
    p = p[p.isfinite() & (p != 0)].clone().requires_grad_()  # the update itself makes +0 of -0
    before = bits(p)
    make: Any = MeZO if language == "python" else lambda q, **o: cpp_optimizer("MeZO", q, **o)
    optimizer = make([p], lr=0.0, eps=1e-2)
    seen: list[Any] = []
    for _ in range(3):
        optimizer.step(lambda: (seen.append(bits(p)), torch.tensor(1.0))[1])
        assert bits(p) == before
    assert len(set(map(str, seen))) == 6
    assert before not in seen


def test_layouts_and_groups_are_restored() -> None:
    base = torch.randn(12, 10, generator=torch.Generator().manual_seed(0)) * 1e-3
    sliced = torch.zeros(25, 21)[1::2, 1::2]
    sliced.copy_(base)
    params = [base.clone(), base.t().contiguous().t(), sliced, torch.zeros(0, 3), torch.tensor(1e-5)]
    for p in params:
        p.requires_grad_()
    before = bits(params)
    optimizer = MeZO([{"params": [p]} for p in params], lr=0.0)
    seen = []
    optimizer.step(lambda: (seen.append([p.detach().clone() for p in params]), torch.zeros(()))[1])
    assert bits(params) == before
    assert not torch.equal(seen[0][0], base)
    assert optimizer.state[params[0]]["step"].item() == 1


def test_slope_of_a_linear_loss_is_exact() -> None:
    """L = <a, p>: the slope is <a, z>, so a step moves p by -lr <a, z> z."""
    a = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = torch.randn(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    start = p.detach().clone()
    for maximize in (False, True):
        with torch.no_grad():
            p.copy_(start)
        optimizer = MeZO([p], lr=0.1, eps=0.5, weight_decay=0.2, seed=5, maximize=maximize)
        loss = optimizer.step(lambda: (a * p).sum())
        z = eggroll_noise(50, 1, seed=5, ordinal=0, tag=2, pair_begin=0, pair_end=1).view(-1).double()
        slope = (a * z).sum() * (-1 if maximize else 1)
        torch.testing.assert_close(p.detach(), start - 0.1 * (slope * z + 0.2 * start), rtol=1e-11, atol=1e-12)
        assert loss.item() == pytest.approx((a * start).sum().item(), rel=1e-12)


def test_it_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    y = x @ torch.randn(5, 1)
    model = nn.Linear(5, 1)
    optimizer = MeZO(model.parameters(), lr=0.02, eps=1e-3)
    first = F.mse_loss(model(x), y).item()
    for _ in range(400):
        loss = optimizer.step(lambda: F.mse_loss(model(x), y))
    assert loss.dtype == torch.float64
    assert F.mse_loss(model(x), y).item() < 0.01 * first


@pytest.mark.parametrize("language", LANGUAGES)
def test_errors_change_nothing(language: str) -> None:
    p = torch.full((5,), 1e-4, requires_grad=True)
    make: Any = MeZO if language == "python" else lambda q, **o: cpp_optimizer("MeZO", q, **o)
    optimizer = make([p])
    before = bits([p, optimizer.state_dict()])
    calls = []

    def fails() -> Tensor:
        calls.append(1)
        if len(calls) % 2 == 0:  # between the two perturbations
            raise KeyError("no data")
        return torch.zeros(())

    with pytest.raises(KeyError, match="no data"):
        optimizer.step(fails)
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="there is no loss"):
        optimizer.step(lambda: None)
    with pytest.raises(RuntimeError, match="one number"):
        optimizer.step(lambda: torch.zeros(2))
    assert bits([p, optimizer.state_dict()]) == before
    optimizer.step(lambda: torch.tensor(math.nan))
    assert bits(p) == before[0]
    assert optimizer.skipped_steps.item() == 1


def test_frozen_parameters_are_left_alone() -> None:
    p, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    optimizer = MeZO([frozen, p], lr=0.1, weight_decay=0.1)
    optimizer.step(lambda: (p**2).sum() + (frozen**2).sum())
    assert frozen.tolist() == [1.0] * 3
    assert "step" not in optimizer.state.get(frozen, {})
