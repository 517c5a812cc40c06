"""EGGROLL as an optimizer: the numbered tests of its acceptance list that are not about single operators, and errors.

1, 3 to 6 and the streams of 2 are in tests/python/ops/test_eggroll.py, 8 and 9 in tests/python/examples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import _C
from torch_ext.nn import eggroll_convert
from torch_ext.ops.eggroll import eggroll_noise
from torch_ext.optim import Eggroll
from torch_ext.optim.population import Population
from torch_ext.reference.optim.eggroll import EggrollReference, EggrollReferenceOptions, shaped
from torch_ext.testing import LANGUAGES, bits, cpp_optimizer

LAWS = ("gaussian", "binomial16", "binomial64", "rademacher")
SHAPINGS: dict[str, dict[str, Any]] = {
    "zscore": {},
    "grouped": {"group_size": 4},
    "centered_rank": {},
    "sign": {},
    "raw": {},
    "softmax": {"temperature": 0.7},
    "baseline": {"group_size": 8},
}


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def of_population(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- 2: which updates see the same noise


@pytest.mark.parametrize(("reuse", "epochs"), [(3, [0, 0, 0, 1, 1, 1, 2]), (1, [0, 1, 2, 3]), (0, [0, 0, 0, 0])])
def test_2_noise_reuse(reuse: int, epochs: list[int]) -> None:
    (p,) = parameters((3, 4))
    optimizer = Eggroll([p], noise_reuse=reuse, population=4)
    seen = []
    for epoch in epochs:
        pop = optimizer.ask()
        assert pop.noise.epoch == epoch
        with pop.member(0):
            seen.append(bits(p))
        optimizer.tell(torch.zeros(4))  # equal values: the parameter stays
    for i, a in enumerate(epochs):
        for j, b in enumerate(epochs):
            assert (seen[i] == seen[j]) == (a == b)


def test_2_members_of_a_pair_are_opposite() -> None:
    params = parameters((5, 3), (4,))
    start = [p.detach().clone() for p in params]
    pop = Eggroll(params, population=6, sigma=2.0**-6, noise="rademacher").ask()
    for i in range(0, 6, 2):
        moved = []
        for j in (i, i + 1):
            with pop.member(j):
                moved.append([p.detach() - s for p, s in zip(params, start, strict=True)])
        for plus, minus in zip(*moved, strict=True):
            torch.testing.assert_close(plus, -minus, rtol=0, atol=1e-15)
            assert bool(plus.any())


# ---- 7: XOR


@pytest.mark.parametrize("seed", [0, 1])
def test_7_xor_with_adam(seed: int) -> None:
    torch.manual_seed(seed)
    model = eggroll_convert(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = torch.tensor([0.0, 1, 1, 0])
    es = Eggroll(model.parameters(), sigma=0.2, population=64, seed=seed)
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    with torch.no_grad():
        for steps in range(1, 501):  # noqa: B007
            pop = es.ask()
            with pop.applied_to(model):
                out = model(x.expand(64, 4, 2))
            es.tell(((out.squeeze(-1) - y) ** 2).mean(1), update=False)
            adam.step()
            if F.mse_loss(model(x).squeeze(-1), y) < 0.01:
                break
        assert F.mse_loss(model(x).squeeze(-1), y) < 0.01
    assert steps < 500


# ---- 11: a checkpoint goes on bit for bit


@pytest.mark.parametrize("language", LANGUAGES)
def test_11_resume_is_bit_identical(language: str) -> None:
    def values(params: list[Tensor]) -> Callable[[Any], Tensor]:
        def closure(pop: Any) -> Tensor:
            found = []
            for i in range(len(pop)):
                saved = getattr(pop, "_members", pop).perturb(i)
                found.append(sum(((p - 1) ** 2).sum() for p in params).detach())
                getattr(pop, "_members", pop).restore(saved)
            return torch.stack(found)

        return closure

    options = {"lr": 0.3, "momentum": 0.5, "sigma": 0.1, "population": 8, "noise_reuse": 2, "seed": 5}

    def make(params: list[Tensor]) -> Any:
        return Eggroll(params, **options) if language == "python" else cpp_optimizer("Eggroll", params, **options)

    straight = parameters((4, 3), (5,))
    optimizer = make(straight)
    for _ in range(6):
        optimizer.step(values(straight))
    first = parameters((4, 3), (5,))
    half = make(first)
    for _ in range(3):
        half.step(values(first))
    second = [p.detach().clone().requires_grad_() for p in first]
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for _ in range(3):
        resumed.step(values(second))
    assert bits(second) == bits(straight)
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())


# ---- 12: equal values


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("shaping", list(SHAPINGS))
def test_12_equal_values_move_nothing(shaping: str, antithetic: bool) -> None:
    if shaping == "sign" and not antithetic:
        pytest.skip("needs pairs")
    params = parameters((4, 3), (5,))
    before = bits(params)
    optimizer = Eggroll(params, lr=1.0, shaping=shaping, population=16, antithetic=antithetic, **SHAPINGS[shaping])
    for value in (0.1, 1e30, 0.0, -3.7):
        optimizer.ask()
        optimizer.tell(torch.full((16,), value, dtype=torch.float64))
    assert bits(params) == before
    assert optimizer.skipped_steps.item() == 0


# ---- shaping


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("shaping", list(SHAPINGS))
def test_shaping_is_the_reference(shaping: str, antithetic: bool, maximize: bool) -> None:
    if shaping == "sign" and not antithetic:
        pytest.skip("needs pairs")
    extra = SHAPINGS[shaping]
    for n in (8, 40, 4096):
        options = EggrollReferenceOptions(
            shaping=shaping, population=n, antithetic=antithetic, maximize=maximize, **extra
        )
        values = of_population(n)
        values[3] = values[5]  # a tie
        kwargs = {"shaping": shaping, "antithetic": antithetic, "maximize": maximize, **extra}
        coefficients, mean, bad = torch.ops.torch_ext.eggroll_shape(values, **kwargs)
        torch.testing.assert_close(coefficients, shaped(values, options), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(mean, values.mean(), rtol=1e-13, atol=1e-15)
        assert (coefficients.dtype, bad.item()) == (torch.float64, 0.0)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert bits(torch.ops.torch_ext.eggroll_shape(values, **kwargs)) == bits((coefficients, mean, bad))


def test_shaping_of_hand() -> None:
    shape = torch.ops.torch_ext.eggroll_shape
    values = torch.tensor([3.0, 1.0, 2.0, 2.0])
    rank = shape(values, shaping="centered_rank", antithetic=False)[0]
    torch.testing.assert_close(rank, torch.tensor([-0.5, 0.5, 0.0, 0.0], dtype=torch.float64))
    assert shape(values, shaping="sign")[0].tolist() == [-1.0, 0.0]
    assert shape(values, shaping="sign", maximize=True)[0].tolist() == [1.0, 0.0]
    assert shape(values, shaping="raw", maximize=True)[0].tolist() == [2.0, 0.0]
    z = shape(values, shaping="zscore", antithetic=False, maximize=True)[0]
    torch.testing.assert_close(z[0], torch.tensor(1 / math.sqrt(0.5 + 1e-5), dtype=torch.float64))
    soft = shape(values, shaping="softmax", antithetic=False, maximize=True)[0]
    torch.testing.assert_close(soft, values.double().softmax(0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shaping", list(SHAPINGS))
def test_nonfinite_values(shaping: str) -> None:
    """ "min": they count as the worst finite value; "error": nothing happens. All of them: a step that is skipped."""
    extra = SHAPINGS[shaping]
    values = of_population(16)
    worst = values.clone()
    values[2], values[7], values[8] = math.nan, math.inf, -math.inf
    worst[[2, 7, 8]] = values[values.isfinite()].max()
    got = torch.ops.torch_ext.eggroll_shape(values, shaping=shaping, nonfinite="min", **extra)
    want = torch.ops.torch_ext.eggroll_shape(worst, shaping=shaping, **extra)
    assert bits(got[0]) == bits(want[0])
    assert got[2].item() == 0
    assert torch.ops.torch_ext.eggroll_shape(values, shaping=shaping, **extra)[2].item() == 1

    for language in LANGUAGES:
        params = parameters((4, 3))
        make: Any = Eggroll if language == "python" else lambda p, **o: cpp_optimizer("Eggroll", p, **o)
        optimizer = make(params, lr=1.0, shaping=shaping, population=16, **extra)
        before = bits([params, optimizer.state_dict()])
        with pytest.raises(ValueError, match="infinite or NaN"):
            optimizer.step(lambda pop: values)
        assert bits([params, optimizer.state_dict()]) == before
        optimizer = make(params, lr=1.0, shaping=shaping, population=16, nonfinite="min", **extra)
        optimizer.step(lambda pop: values * math.nan)
        assert bits(params) == bits(parameters((4, 3)))
        assert optimizer.skipped_steps.item() == 1
        optimizer.step(lambda pop: values)
        assert bits(params) != bits(parameters((4, 3)))
        assert optimizer.skipped_steps.item() == 1


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.torch_ext.eggroll_shape.default, (of_population(8),), {"shaping": "centered_rank"})
    for momentum in (0.0, 0.5):
        params = [p.detach() for p in parameters((4, 3), (5,))]
        buffers = [torch.ones_like(p) for p in params] if momentum else []
        arguments = (params, [p * 0.5 for p in params], buffers, [torch.zeros(()) for _ in params], torch.zeros(()))
        torch.library.opcheck(
            torch.ops.torch_ext.eggroll_step_.default,
            arguments,
            {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01},
        )


# ---- the update


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_update_is_the_reference(law: str, dtype: torch.dtype) -> None:
    for scale in ("reference", "paper", "unbiased"):
        options = {"lr": 0.7, "sigma": 0.3, "rank": 2, "population": 32, "noise": law, "update_scale": scale}
        params = parameters((7, 13), (5, 2, 3), (6,), (), dtype=dtype)
        twins = [p.detach().double().requires_grad_() for p in params]
        optimizer, reference = Eggroll(params, **options), EggrollReference(twins, **options)
        for t in range(3):
            values = of_population(32, seed=t)
            optimizer.ask()
            mean = optimizer.tell(values)
            assert mean.item() == pytest.approx(reference.step(values).item(), rel=1e-13)
        for p, q in zip(params, twins, strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 3e-6
            torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["matrix", "vector"])
def test_members_are_the_reference(kind: str) -> None:
    params = parameters((4, 6), (2, 3, 2))
    twins = [p.detach().clone().requires_grad_() for p in params]
    options = {"sigma": 0.3, "rank": 2, "population": 8, "kind": kind}
    pop, reference = Eggroll(params, **options).ask(), EggrollReference(twins, **options)
    for i in range(8):
        with pop.member(i):
            for k, (p, q) in enumerate(zip(params, twins, strict=True)):
                e = reference.noise(k, i // 2, i // 2 + 1)[0]
                torch.testing.assert_close(p, q + (1 - 2 * (i % 2)) * 0.3 * e, rtol=1e-13, atol=1e-14)
    assert bits(params) == bits(twins)


def test_pseudo_gradient_is_what_the_step_takes() -> None:
    a, b = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    values = of_population(16)
    stepping, asking = Eggroll(a, lr=0.5, population=16), Eggroll(b, lr=0.5, population=16)
    sgd = torch.optim.SGD(b, lr=0.5)
    stepping.ask()
    stepping.tell(values)
    asking.ask()
    kept = bits(b)
    asking.tell(values, update=False)
    assert bits(b) == kept
    sgd.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)
    assert (stepping.updates, asking.updates) == (1, 1)
    assert asking.state_dict()["state"].keys() == {0}  # counters only


def test_maximize_is_the_opposite() -> None:
    a, b = parameters((4, 3)), parameters((4, 3))
    values = of_population(16)
    for params, sign, maximize in ((a, 1, False), (b, -1, True)):
        optimizer = Eggroll(params, lr=0.5, population=16, maximize=maximize)
        optimizer.ask()
        optimizer.tell(values * sign)
    assert bits(a) == bits(b)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts_equal_contiguous(layout: str) -> None:
    base = parameters((6, 4))[0].detach()
    results = []
    for kind in ("contiguous", layout):
        if kind == "transposed":
            p = base.t().contiguous().t()
        elif kind == "sliced":
            p = torch.zeros(13, 9, dtype=base.dtype)[1::2, 1::2]
            p.copy_(base)
        else:
            p = base.clone()
        p.requires_grad_()
        optimizer = Eggroll([p], lr=0.5, momentum=0.5, population=8)
        members = []
        for t in range(3):
            pop = optimizer.ask()
            with pop.member(3):
                members.append(bits(p))
            optimizer.tell(of_population(8, seed=t))
        results.append([members, bits(p)])
    assert results[0] == results[1]


@pytest.mark.parametrize("law", LAWS)
def test_threads_do_not_change_the_bits(law: str) -> None:
    """Tensors above the chunk of 65536 elements; with gaussian noise as far as ATen's products keep their order."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters((300, 400), (70001,), dtype=torch.float32)
        optimizer = Eggroll(params, lr=0.5, momentum=0.5, population=64, noise=law, shaping="sign")
        for t in range(2):
            optimizer.ask()
            optimizer.tell(of_population(64, seed=t))
        results.append(params)
    for a, b in zip(*results, strict=True):
        if law == "gaussian":
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """State and pseudo-gradient are float32, .grad has the parameter's dtype."""
    params = parameters((4, 6), (5,), dtype=dtype)
    optimizer = Eggroll(params, lr=0.5, momentum=0.5, population=8)
    before = bits(params)
    pop = optimizer.ask()
    with pop.member(1):
        assert bits(params) != before
    assert bits(params) == before
    optimizer.tell(of_population(8))
    assert bits(params) != before
    assert {s["momentum_buffer"].dtype for s in optimizer.state.values()} == {torch.float32}
    optimizer.ask()
    optimizer.tell(of_population(8), update=False)
    assert {p.grad.dtype for p in params} == {dtype}


def test_frozen_parameters_keep_out() -> None:
    a, frozen, b = parameters((4, 3), (5,), (6,))
    frozen.requires_grad_(False)
    optimizer = Eggroll([a, frozen, b], lr=0.5, population=8, weight_decay=0.1)
    before = bits(frozen)
    pop = optimizer.ask()
    assert [pop.ordinal(p) for p in (a, frozen, b)] == [0, -1, 2]
    with pop.member(0):
        assert bits(frozen) == before
    optimizer.tell(of_population(8))
    assert bits(frozen) == before
    assert frozen not in optimizer.state


def test_scheduled_sigma() -> None:
    (p,) = parameters((4, 3))
    optimizer = Eggroll([{"params": [p]}], sigma=0.1, population=8)
    optimizer.set_sigma(0.25)
    assert (optimizer.ask().noise.sigma, optimizer.defaults["sigma"]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="Invalid sigma"):
        optimizer.set_sigma(0.0)
    assert optimizer.param_groups[0]["sigma"] == 0.25


def test_chunks_change_nothing() -> None:
    """The members of a chunk see the noise of their own number; values come back in order."""
    results = []
    for chunk in (None, 2, 6, 16):
        params = parameters((4, 3), (5,))
        seen: list[tuple[int, int]] = []

        def closure(pop: Population, params: list[Tensor] = params, seen: list[tuple[int, int]] = seen) -> Tensor:
            seen.append((pop.begin, len(pop)))
            values = []
            for i in range(len(pop)):
                with pop.member(i):
                    values.append(sum((p**2).sum() for p in params).detach())
            return torch.stack(values)

        optimizer = Eggroll(params, lr=0.5, population=16, chunk_members=chunk)
        optimizer.step(closure)
        assert [begin for begin, _ in seen] == list(range(0, 16, chunk or 16))
        assert sum(size for _, size in seen) == 16
        results.append(bits(params))
    assert all(r == results[0] for r in results)


# ---- guards


def test_member_restores_bits_also_of_odd_values() -> None:
    p = torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-45, 3.0, 1e38, -1e-38], requires_grad=True)
    optimizer = Eggroll([p], population=4, sigma=0.5)
    before, version = bits(p), p._version
    pop = optimizer.ask()
    with pop.member(2):
        assert bits(p) != before
    assert bits(p) == before
    assert p._version > version

    def raising() -> None:
        with pop.member(1):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        raising()
    assert bits(p) == before
    for bad in (-1, 4):
        with pytest.raises(IndexError, match=f"member {bad} of a population of 4"), pop.member(bad):
            pass


def test_applied_to_needs_every_parameter_in_a_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    pop = Eggroll(model.parameters(), population=4).ask()
    message = r"parameter 0 \(shape \[4, 3\]\) is in no Eggroll layer.*eggroll_convert"
    with pytest.raises(ValueError, match=message), pop.applied_to(model):
        pass
    eggroll_convert(model)
    with pytest.raises(ValueError, match=r"parameter 2 \(shape \[4\]\) is in no Eggroll layer"), pop.applied_to(model):
        pass
    pop = Eggroll(model[0].parameters(), population=4).ask()
    with pop.applied_to(model) as same:
        assert same is pop
        assert model[0]._population is pop
        with pytest.raises(ValueError, match=r"EggrollLinear: dimension 0 of the input is the member: expected 4"):
            model[0](torch.zeros(5, 3))
    assert model[0]._population is None


# ---- errors


@pytest.mark.parametrize("language", LANGUAGES)
def test_errors_change_nothing(language: str) -> None:
    params = parameters((4, 3), (5,))
    optimizer: Any
    if language == "python":
        optimizer = Eggroll(params, population=8)
        ask: Callable[..., Any] = optimizer.ask
        tell: Callable[..., Any] = optimizer.tell
    else:
        optimizer = cpp_optimizer("Eggroll", params, population=8)

        def ask(begin: int = 0, end: int | None = None) -> Any:
            return optimizer.call("ask", begin, end)

        def tell(values: Tensor) -> Any:
            return optimizer.call("tell", values)

    before = bits([params, optimizer.state_dict()])
    with pytest.raises(RuntimeError, match=r"tell\(\) without ask\(\)"):
        tell(torch.zeros(8))
    for begin, end in ((-2, 4), (0, 10), (6, 6), (8, 4)):
        with pytest.raises(ValueError, match="of a population of 8"):
            ask(begin, end)
    with pytest.raises(ValueError, match="begin and end must be even"):
        ask(1, 4)
    ask()
    for values in (torch.zeros(7), torch.zeros(9), torch.zeros(8, 1), torch.zeros(())):
        with pytest.raises(ValueError, match="one value for each of 8 members"):
            tell(values)
    with pytest.raises(TypeError, match="real numbers"):
        tell(torch.zeros(8, dtype=torch.complex64))
    assert bits([params, optimizer.state_dict()]) == before
    tell(of_population(8))
    with pytest.raises(RuntimeError, match=r"tell\(\) without ask\(\)"):
        tell(of_population(8))


def test_changes_between_ask_and_tell() -> None:
    params = parameters((4, 3), (5,))
    optimizer = Eggroll(params[:1], population=8)
    before = bits(params)
    for change in (
        lambda: optimizer.set_sigma(0.5),
        lambda: optimizer.add_param_group({"params": params[1:]}),
        lambda: optimizer.param_groups[0].update(kind="vector"),
        lambda: params[0].requires_grad_(False),
    ):
        optimizer.ask()
        change()
        with pytest.raises(ValueError, match=r"changed between ask\(\) and tell\(\)"):
            optimizer.tell(of_population(8))
        assert bits(params) == before
    optimizer.ask()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"without ask\(\)"):
        optimizer.tell(of_population(8))


def test_bad_parameters() -> None:
    (p,) = parameters((2, 5))
    with pytest.raises(
        ValueError, match=r"Invalid rank: 3 is above 2, the smaller side of parameter 0 \(shape \[2, 5\]\)"
    ):
        Eggroll([p], rank=3, population=4).ask()
    Eggroll([p], rank=3, population=4, kind="vector").ask()
    with pytest.raises(ValueError, match="Invalid kind: 'matrix' needs two dimensions"):
        Eggroll(parameters((3,)), kind="matrix", population=4).ask()
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        Eggroll([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], population=4).ask()
    optimizer = Eggroll([p], population=4)
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="not both"):
        optimizer.step(lambda pop: torch.zeros(4), values=torch.zeros(4))
    with pytest.raises(TypeError, match="must return a tensor"):
        optimizer.step(lambda pop: [0.0] * 4)
    with pytest.raises(ValueError, match="one value for each of 4 members"):
        optimizer.step(lambda pop: torch.zeros(2))


# ---- what processes send


def test_trits() -> None:
    signs = torch.tensor([1.0, -1, 0, 0, 1, -1, -1], dtype=torch.float64)
    packed = _C.pack_trits(signs, 7)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [1 + 2 * 3 + 0 + 0 + 81, 2 + 2 * 3]
    assert _C.unpack_trits(packed, 7).tolist() == signs.tolist()
    assert len(_C.pack_trits(signs, 9)) == 2
    two = torch.cat([packed, _C.pack_trits(-signs, 7)])
    assert _C.unpack_trits(two, 7).tolist() == [*signs.tolist(), *(-signs).tolist()]
    assert _C.pack_trits(torch.full((5,), -1.0, dtype=torch.float64), 5).tolist() == [242]


def test_noise_of_a_population_is_that_of_the_operators() -> None:
    params = parameters((4, 3), (5,))
    pop = Eggroll(params, sigma=0.5, population=4, seed=9).ask()
    start = params[1].detach().clone()
    with pop.member(2):
        eps = eggroll_noise(5, 1, seed=9, ordinal=1, tag=2, pair_begin=1, pair_end=2, epoch=0)
        torch.testing.assert_close(params[1], start + 0.5 * eps.view(5).double(), rtol=1e-14, atol=0)
