"""Bounds of Jacobians: closed forms, exact constants of one-dimensional networks, and what the bounds promise.

Numbers in the names are those of the method's acceptance list; 5 and 9 are in tests/python/solvers, 8 in
tests/python/nn/test_lipschitz_penalty.py.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ext import ops
from torch_ext.nn import Residual
from torch_ext.ops._lipschitz_layers import encode
from torch_ext.reference.ops import exact_1d
from torch_ext.reference.ops import local_lipschitz as reference

METHODS = ("tight", "recurjac", "ibp")
F64 = torch.float64


def network(weights: list[Tensor], biases: list[Tensor], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        linear = nn.Linear(weight.size(1), weight.size(0), dtype=weight.dtype)
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(bias)
        layers += [linear] if k == len(weights) - 1 else [linear, activation()]
    return nn.Sequential(*layers)


def draw(generator: torch.Generator, *sizes: int) -> tuple[list[Tensor], list[Tensor]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    pairs = list(pairwise(sizes))
    return [normal(b, a) * (2 / a) ** 0.5 for a, b in pairs], [0.3 * normal(b) for _, b in pairs]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def norms(model: nn.Module, x: Tensor) -> Tensor:
    """l1 norms of the rows of the Jacobian at points [points, ...] by autograd; [points, outputs]."""
    x = x.detach().clone().requires_grad_()
    rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in model(x).unbind(1)]
    return torch.stack([row.flatten(1).abs().sum(1) for row in rows], 1)


HAND = (
    [tensor([[1, 1], [1, -1]]), tensor([[1, -1], [1, 1]]), tensor([[1, -1]])],
    [tensor([0, 0]), tensor([0.1, -0.3]), tensor([0])],
)


# --- the numbered list ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("backward", "value"), [("tight", 32 / 7), ("recurjac", 5.0), ("ibp", 6.0)])
def test_1_hand_net(backward: Any, value: float) -> None:
    model = network(*HAND)
    bounds = ops.local_lipschitz(model, torch.zeros(1, 2, dtype=F64), 1.0, backward=backward)
    assert float(bounds.L.detach()) == pytest.approx(value, abs=1e-12)
    if backward == "tight":
        torch.testing.assert_close(bounds.J_lo[0, 0], tensor([-2.5, -1]), atol=1e-12, rtol=0)
        torch.testing.assert_close(bounds.J_hi[0, 0], tensor([1, 2.5]), atol=1e-12, rtol=0)
    # The gradient behind the first ReLUs is the Jacobian of the rest, from a box on which all of it is open.
    rest = ops.local_lipschitz(model[2:], torch.zeros(1, 2, dtype=F64), 2.0, backward=backward)
    torch.testing.assert_close(rest.J_lo[0, 0], tensor([-1, -2]), atol=1e-12, rtol=0)
    torch.testing.assert_close(rest.J_hi[0, 0], tensor([1, 0]), atol=1e-12, rtol=0)
    line = torch.linspace(-1, 1, 201, dtype=F64) + 1e-4
    grid = torch.cartesian_prod(line, line)
    assert float(norms(model, grid).max()) == pytest.approx(4, abs=1e-12)


@pytest.mark.parametrize("backward", METHODS)
@pytest.mark.parametrize(("radius", "value"), [(0.25, (3, 3)), (1.0, (4, 3))])
def test_2_one_hidden_layer_is_exact(backward: Any, radius: float, value: tuple[int, int]) -> None:
    model = network([tensor([[1, 0], [1, -1]]), tensor([[1, -2], [1, 1]])], [tensor([0, 0.5]), tensor([0, 0])])
    bounds = ops.local_lipschitz(model, tensor([[0.5, 0.5]]), radius, backward=backward)
    if backward == "ibp":  # adds the extremes of the entries: 4 needs J_00 in [-2, 1] and J_01 in [0, 2] at once
        assert (tensor([value]) <= bounds.L).all()
    else:
        torch.testing.assert_close(bounds.L, tensor([value]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backward", METHODS)
@pytest.mark.parametrize("forward", ["crown", "ibp"])
def test_3_linear_stable_and_positive_networks_are_exact(forward: Any, backward: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    weights, biases = draw(generator, 4, 6, 5, 3)
    x = torch.randn(3, 4, generator=generator, dtype=F64)

    linear = network(weights[:1], biases[:1])
    expected = weights[0].abs().sum(1).expand(3, -1)
    torch.testing.assert_close(ops.local_lipschitz(linear, x, 0.5, forward=forward, backward=backward).L, expected)

    model = network(weights, biases)
    at_point = ops.local_lipschitz(model, x, 0.0, forward=forward, backward=backward).L
    torch.testing.assert_close(at_point, norms(model, x), atol=1e-13, rtol=1e-13)

    positive = network([w.abs() for w in weights], [torch.zeros_like(b) for b in biases])
    product = weights[2].abs() @ weights[1].abs() @ weights[0].abs()
    wide = ops.local_lipschitz(positive, torch.zeros_like(x), 1.0, forward=forward, backward=backward).L
    torch.testing.assert_close(wide, product.sum(1).expand(3, -1))


@pytest.mark.parametrize(
    ("sizes", "radius", "count"),
    [((1, 16, 16, 3), 0.5, 400), ((1, 32, 32, 32, 3), 0.1, 300), ((1, 32, 32, 32, 3), 0.5, 300)],
)
def test_4_above_the_exact_constant_and_in_their_order(sizes: tuple[int, ...], radius: float, count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    ratios = []
    for _ in range(count):
        weights, biases = draw(generator, *sizes)
        x = torch.randn(1, 1, generator=generator, dtype=F64)
        model = network(weights, biases)
        bounds = [float(ops.local_lipschitz(model, x, radius, backward=b).L.max()) for b in METHODS]
        exact = exact_1d(weights, biases, float(x) - radius, float(x) + radius)
        bounds.append(math.prod(float(w.abs().sum(1).max()) for w in weights))
        chain = [exact, *bounds]
        assert all(a <= b * (1 + 1e-12) for a, b in pairwise(chain)), chain
        if exact > 0:
            ratios.append(bounds[0] / exact)
    assert (
        sorted(ratios)[len(ratios) // 2] < 20
    )  # the bounds say something: the median is 1 to 5, the mean heavy-tailed


@pytest.mark.parametrize("backward", METHODS)
def test_6_above_the_sampled_constant(backward: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    model = network(*draw(generator, 16, 64, 64, 10))
    x = torch.randn(20, 16, generator=generator, dtype=F64)
    bounds = ops.local_lipschitz(model, x, 0.05, backward=backward).L
    moves = 0.05 * (2 * torch.rand(50, 20, 16, generator=generator, dtype=F64) - 1)
    sampled = norms(model, (x + moves).flatten(0, 1)).unflatten(0, (50, 20)).amax(0)
    assert (sampled <= bounds * (1 + 1e-12)).all()
    assert float((bounds / sampled).mean()) < {"tight": 3, "recurjac": 4, "ibp": 10}[backward]


def test_6_nested_boxes_give_nested_bounds_with_intervals() -> None:
    generator = torch.Generator().manual_seed(66)
    model = network(*draw(generator, 5, 16, 16, 3))
    x = torch.randn(8, 5, generator=generator, dtype=F64)
    before = None
    for radius in (0.0, 0.01, 0.1, 0.5, 2.0):
        bounds = ops.local_lipschitz(model, x, radius, forward="ibp", backward="ibp")
        if before is not None:
            assert (before.L <= bounds.L + 1e-12).all()
            assert (before.J_lo >= bounds.J_lo - 1e-12).all()
            assert (before.J_hi <= bounds.J_hi + 1e-12).all()
        before = bounds


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backward": "recurjac"},
        {"backward": "ibp"},
        {"forward": "ibp"},
        {"safe": True},
        {"alpha_iters": 3, "outputs": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_7_gradcheck(options: dict[str, Any], activation: type[nn.Module]) -> None:
    generator = torch.Generator().manual_seed(7)
    model = network(*draw(generator, 3, 4, 4, 2), activation)
    tensors, layers, numbers, names = encode(model)
    x = torch.randn(2, 3, generator=generator, dtype=F64)
    # With optimised slopes the gradient takes the optimum for constant, which it is not away from the optimum's own
    # clamps; so only the ends of the box and one weight are checked there, at slopes that are clamped.
    outputs = options.pop("outputs", None)

    def bound(lo: Tensor, hi: Tensor, *parameters: Tensor) -> Tensor:
        result = torch.ops.torch_ext.local_lipschitz(
            list(parameters), layers, numbers, names, lo, hi, outputs, **options
        )
        return torch.cat([part.flatten() for part in result])

    inputs = [(x - 0.2).requires_grad_(), (x + 0.2).requires_grad_(), *(t.detach().requires_grad_() for t in tensors)]
    if "alpha_iters" in options:
        bound(*inputs).sum().backward()
        assert all(t.grad is None or t.grad.isfinite().all() for t in inputs)
        options["outputs"] = outputs
        return
    assert torch.autograd.gradcheck(bound, inputs)


def test_7_a_batch_is_its_boxes_one_by_one() -> None:
    generator = torch.Generator().manual_seed(77)
    model = network(*draw(generator, 6, 12, 12, 5))
    x = torch.randn(32, 6, generator=generator, dtype=F64)
    eps = torch.rand(32, 6, generator=generator, dtype=F64)
    together = ops.local_lipschitz(model, x, eps)
    for i in range(32):
        alone = ops.local_lipschitz(model, x[i : i + 1], eps[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b[0], atol=1e-13, rtol=1e-13)
    some = ops.local_lipschitz(model, x, eps, outputs=[4, 1])
    for a, b in zip(together, some, strict=True):
        torch.testing.assert_close(a[:, [4, 1]], b, atol=1e-13, rtol=1e-13)


def images(seed: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)]
    model = nn.Sequential(*layers).double().eval()
    if norm:
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        nn.init.normal_(model[1].weight)
    return model


def unrolled(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """Every linear part between activations as one dense matrix."""
    layers: list[nn.Module] = []
    part: list[nn.Module] = []
    for layer in [*model, None]:
        if layer is not None and not isinstance(layer, nn.ReLU):
            part.append(layer)
            continue
        shape = x.shape[1:]
        run = nn.Sequential(*part)
        zero = torch.zeros(1, *shape, dtype=F64)
        bias = run(zero).flatten().detach()
        weight = run(torch.eye(zero.numel(), dtype=F64).view(-1, *shape)).flatten(1).detach() - bias
        linear = nn.Linear(*weight.shape, dtype=F64)
        linear.weight.data, linear.bias.data = weight.t().contiguous(), bias
        layers += [linear] if layer is None else [linear, nn.ReLU()]
        x, part = run(x), []
    return nn.Sequential(*layers)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backward", METHODS)
def test_7_a_convolutional_net_is_its_dense_matrices(backward: Any, norm: bool) -> None:
    with torch.random.fork_rng():
        model = images(7, norm)
        x = torch.randn(3, 2, 7, 7, dtype=F64)
    bounds = ops.local_lipschitz(model, x, 0.05, backward=backward)
    dense = ops.local_lipschitz(unrolled(model, x), x.flatten(1), 0.05, backward=backward)
    for a, b in zip(bounds, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


# --- against the reference --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backward", METHODS)
@pytest.mark.parametrize("forward", ["crown", "ibp"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 40, 2), (5, 33, 7, 6, 3), (4, 3, 70, 65, 1)])
def test_equals_the_reference(sizes: tuple[int, ...], forward: Any, backward: Any) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    for radius in (0.01, 0.3, 2.0):
        weights, biases = draw(generator, *sizes)
        x = torch.randn(2, sizes[0], generator=generator, dtype=F64)
        bounds = ops.local_lipschitz(network(weights, biases), x, radius, forward=forward, backward=backward)
        single = network(weights, biases).float()
        narrow = ops.local_lipschitz(single, x.float(), radius, forward=forward, backward=backward)
        for i in range(2):
            expected = reference(weights, biases, x[i] - radius, x[i] + radius, forward=forward, backward=backward)
            scale = float(expected[0].max()) + 1e-300
            for got, want, low in zip(bounds, expected, narrow, strict=True):
                torch.testing.assert_close(got[i] / scale, want / scale, atol=1e-12, rtol=0)
                if backward != "recurjac":  # jumps where rounding decides a sign
                    torch.testing.assert_close(low[i].double() / scale, want / scale, atol=1e-3, rtol=0)


# --- sound ------------------------------------------------------------------------------------------------------------
SMOOTH = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, lambda: nn.LeakyReLU(0.1), lambda: nn.Softplus(3.0, 2.0)]


def test_sound_on_ten_thousand_random_checks() -> None:
    """50 networks of all kinds x 20 boxes x 10 points: J at the point lies between its bounds, its norm below L."""
    generator = torch.Generator().manual_seed(1)
    checks = 0
    for trial in range(50):
        kind = ([nn.ReLU] * 7 + SMOOTH)[trial % 14]
        model = network(*draw(generator, 4, 10, 9, 3), kind)
        if trial % 3 == 0:
            model = nn.Sequential(model[:2], Residual(nn.Sequential(nn.Linear(10, 10), kind()).double()), model[2:])
        x = 2 * torch.randn(20, 4, generator=generator, dtype=F64)
        radius = float(10 ** (-2 + 2.5 * torch.rand(1, generator=generator)))
        options: dict[str, Any] = {"forward": ("crown", "ibp")[trial % 2], "backward": METHODS[trial // 2 % 3]}
        bounds = ops.local_lipschitz(model, x, radius, safe=trial % 4 == 0, **options)
        signs = (2 * torch.rand(10, 20, 4, generator=generator, dtype=F64) - 1) * radius
        points = (x + signs).flatten(0, 1)
        jacobian = torch.stack(
            [
                torch.autograd.grad(column.sum(), at, retain_graph=True)[0]
                for at in [points.clone().requires_grad_()]
                for column in model(at).unbind(1)
            ],
            1,
        ).unflatten(0, (10, 20))
        slack = 1e-12 * bounds.L[..., None]
        assert (jacobian >= bounds.J_lo - slack).all(), (trial, kind)
        assert (jacobian <= bounds.J_hi + slack).all(), (trial, kind)
        assert (jacobian.abs().sum(-1) <= bounds.L + slack[..., 0]).all(), (trial, kind)
        checks += points.size(0)
    assert checks == 10_000


@pytest.mark.parametrize("kind", SMOOTH)
def test_smooth_slopes_and_values_hold_on_a_fine_grid(kind: Any) -> None:
    """One neuron between two identities: the Jacobian's bounds are the range of the activation's slope."""
    model = nn.Sequential(nn.Linear(1, 1, dtype=F64), kind(), nn.Linear(1, 1, dtype=F64))
    for layer in (model[0], model[2]):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    for centre, radius in ((0.0, 3.0), (-2.4, 0.05), (1.4, 0.3), (-0.75, 0.2), (6.0, 1.0), (-6.0, 5.0), (0.7, 0.1)):
        grid = torch.linspace(centre - radius, centre + radius, 4001, dtype=F64)[:, None].requires_grad_()
        slopes = torch.autograd.grad(model(grid).sum(), grid)[0]
        bounds = ops.local_lipschitz(model, tensor([[centre]]), radius)
        low, high = float(bounds.J_lo), float(bounds.J_hi)
        assert low <= float(slopes.min()) + 1e-13
        assert high >= float(slopes.max()) - 1e-13
        assert low >= float(slopes.min()) - 1e-5
        assert high <= float(slopes.max()) + 1e-5


def test_a_kink_inside_counts_also_at_the_border_of_the_box() -> None:
    """x = 0 is a kink: the box [0, 1] has it at its end, and Clarke's Jacobian there is [0, 1], not 1."""
    model = network([tensor([[1]]), tensor([[1]])], [tensor([0]), tensor([0])])
    bounds = ops.local_lipschitz(model, tensor([[0.5]]), 0.5)
    assert (float(bounds.J_lo), float(bounds.J_hi)) == (0, 1)
    bounds = ops.local_lipschitz(model, tensor([[-0.5]]), 0.5)
    assert (float(bounds.J_lo), float(bounds.J_hi)) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("backward", METHODS)
def test_safe_rounds_outward(dtype: torch.dtype, backward: Any) -> None:
    """In float32, safe bounds contain what float64 finds; without, rounding may fall below."""
    generator = torch.Generator().manual_seed(11)
    for radius in (0.0, 0.1):
        model = network(*draw(generator, 6, 24, 24, 4)).to(dtype)
        x = torch.randn(6, 6, generator=generator, dtype=F64).to(dtype)
        safe = ops.local_lipschitz(model, x, radius, safe=True, backward=backward)
        plain = ops.local_lipschitz(model, x, radius, backward=backward)
        wide = ops.local_lipschitz(model.double(), x.double(), radius, backward=backward)
        assert (safe.L >= plain.L).all()
        assert (safe.J_lo <= plain.J_lo).all()
        assert (safe.J_hi >= plain.J_hi).all()
        if dtype == torch.float32:
            exact = norms(model, x.double())
            assert (safe.L.double() >= exact).all()
            if backward != "recurjac":
                assert (safe.L.double() >= wide.L * (1 - 1e-12)).all()
        elif backward != "recurjac":
            torch.testing.assert_close(safe.L, plain.L, rtol=1e-9, atol=0)


def test_overflow_is_infinite_never_nan() -> None:
    weights, biases = draw(torch.Generator().manual_seed(0), 3, 8, 8, 8, 2)
    for scale in (1e80, 1e150, 1e307):
        model = network([w * scale for w in weights], biases)
        for backward in METHODS:
            for forward in ("crown", "ibp"):
                bounds = ops.local_lipschitz(
                    model, torch.zeros(2, 3, dtype=F64), 1.0, forward=forward, backward=backward
                )
                assert not any(part.isnan().any() for part in bounds)
    assert (math.inf == bounds.L).all()


def test_alpha_never_loosens_what_enters_and_helps() -> None:
    generator = torch.Generator().manual_seed(12)
    gains = []
    for _ in range(10):
        model = network(*draw(generator, 4, 16, 16, 16, 2))
        x = torch.randn(4, 4, generator=generator, dtype=F64)
        plain, tuned = (ops.local_lipschitz(model, x, 0.4, alpha_iters=n).L for n in (0, 20))
        gains.append(float((plain / tuned).mean()))
        points = (x + 0.4 * (2 * torch.rand(40, 4, 4, generator=generator, dtype=F64) - 1)).flatten(0, 1)
        assert (norms(model, points).unflatten(0, (40, 4)).amax(0) <= tuned * (1 + 1e-12)).all()
    assert min(gains) > 1 - 1e-9
    assert max(gains) > 1.05


# --- derivatives and layers -------------------------------------------------------------------------------------------
def test_detached_bounds_have_the_same_value_and_another_gradient() -> None:
    model = network(*draw(torch.Generator().manual_seed(5), 4, 12, 12, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
    results = []
    for detach in (False, True):
        bounds = ops.local_lipschitz(model, x, 0.3, detach_intermediate=detach)
        results.append((bounds.L, torch.autograd.grad(bounds.L.sum(), list(model.parameters()), allow_unused=True)))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1][0], results[1][1][0])


def test_a_second_derivative_is_refused() -> None:
    model = network(*draw(torch.Generator().manual_seed(5), 4, 12, 12, 2))
    bound = ops.local_lipschitz(model, torch.zeros(1, 4, dtype=F64), 1.0).L.sum()
    (grad,) = torch.autograd.grad(bound, model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="local_lipschitz has no second derivative"):
        torch.autograd.grad(grad.sum(), model[0].weight)


class Block(nn.Module):
    """A forward of its own, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) + x
        return torch.flatten(nn.functional.gelu(y) + self.second(y).tanh(), 1)


def test_a_module_with_a_forward_of_its_own_equals_its_sequential_form() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block().double()
        x = torch.randn(3, 6, dtype=F64)
    inner = Residual(nn.Sequential(block.first, nn.ReLU()))
    same = nn.Sequential(inner, Residual(nn.GELU(), nn.Sequential(block.second, nn.Tanh())), nn.Flatten())
    torch.testing.assert_close(block(x), same(x))
    for backward in METHODS:
        for a, b in zip(
            ops.local_lipschitz(block, x, 0.1, backward=backward),
            ops.local_lipschitz(same, x, 0.1, backward=backward),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        at_point = ops.local_lipschitz(block, x, 0.0, backward=backward).L
        torch.testing.assert_close(at_point, norms(block, x))


def test_a_residual_around_a_linear_map_is_one_linear_map() -> None:
    weights, biases = draw(torch.Generator().manual_seed(9), 4, 4, 3)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(9), dtype=F64)
    first, last = network(weights[:1], biases[:1]), network(weights[1:], biases[1:])
    split = nn.Sequential(Residual(first), nn.ReLU(), last)
    whole = network([weights[0] + torch.eye(4, dtype=F64), weights[1]], biases)
    for a, b in zip(ops.local_lipschitz(split, x, 0.4), ops.local_lipschitz(whole, x, 0.4), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smooth", [False, True])
def test_which_parameters_get_gradients(smooth: bool) -> None:
    """With ReLUs alone the slopes are piecewise constant, and with them all that biases, x and eps could change."""
    with torch.random.fork_rng():
        model = images(3, norm=True)
        x = torch.randn(2, 2, 7, 7, dtype=F64)
    if smooth:
        model[2] = model[4] = nn.SiLU()
    eps = torch.full((), 0.05, dtype=F64, requires_grad=True)
    ops.local_lipschitz(model, x, eps).L.sum().backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    assert missing == ({"6.bias"} if smooth else {"0.bias", "1.bias", "3.bias", "6.bias"})
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (eps.grad is not None and float(eps.grad) > 0) is smooth


# --- bad input --------------------------------------------------------------------------------------------------------
GOOD = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": "lp"}, 'forward must be "crown" or "ibp", got "lp"'),
        ({"backward": "loose"}, 'backward must be "tight", "recurjac" or "ibp", got "loose"'),
        ({"alpha_iters": -1}, "alpha_iters must be at least 0, got -1"),
        ({"alpha_iters": 2, "forward": "ibp"}, "alpha_iters optimises the slopes of forward"),
        ({"outputs": [2]}, r"outputs must be in \[0, 2\), got 2"),
        ({"outputs": []}, "outputs must name at least one output"),
        ({"eps": -0.1}, "the box is empty or holds NaN"),
        ({"eps": float("nan")}, "the box is empty or holds NaN"),
        ({"x": torch.full((2, 3), float("nan"))}, "the box is empty or holds NaN"),
        ({"x": torch.zeros(3)}, r"boxes must be \[boxes, features\]"),
        ({"x": torch.zeros(0, 3)}, "not empty"),
        ({"x": torch.zeros(2, 5)}, r"layer '0' \(Linear\) takes 3 features, got a value of shape \[5\]"),
        ({"x": torch.zeros(2, 1, 3)}, "flatten it first"),
        ({"x": X.double()}, "layer '0' is .*Float.*, the input .*Double.*bring both together"),
        ({"eps": torch.zeros(5, 2, 3)}, "eps must broadcast over x"),
    ],
)
def test_values_that_are_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "eps": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        ops.local_lipschitz(GOOD, **arguments)


def test_narrow_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x must be float64 \(recommended\) or float32, got BFloat16"):
        ops.local_lipschitz(GOOD.bfloat16(), X.bfloat16(), 0.1)
    GOOD.float()


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Sequential(nn.LayerNorm(3))), r"layer '1.0' \(LayerNorm\) has no bound"),
        (nn.Sequential(nn.MaxPool2d(2)), r"layer '0' \(MaxPool2d\) has no bound. Supported are Linear"),
        (nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(3, 1)), r"layer '1' \(MultiheadAttention\)"),
        (Residual(nn.Sequential(nn.Softmax(1))), r"layer 'body.0' \(Softmax\)"),
        (nn.Sequential(Product()), r"layer '0.mul' \(mul\)"),
        (nn.Sequential(Branching()), r"the forward of '0' \(Branching\) cannot be traced"),
    ],
)
def test_layers_without_a_bound_are_named_by_their_path(model: nn.Module, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ops.local_lipschitz(model, X, 0.1)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(2), r"layer '0' \(BatchNorm\) normalises by the batch.*call model.eval\(\)"),
        (nn.BatchNorm2d(2, track_running_stats=False).eval(), "track_running_stats"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "layer '0' has padding_mode 'reflect'"),
        (nn.Conv2d(2, 2, 2, padding="same"), "pads one side more than the other"),
        (nn.Conv2d(2, 2, 9), "has a kernel larger than its input"),
        (nn.Conv2d(3, 2, 3), "takes 3 channels of an image"),
        (nn.GELU(approximate="tanh"), "is an approximate GELU"),
        (nn.LeakyReLU(-0.5), r"has a negative_slope outside \[0, 1\]"),
        (nn.Softplus(beta=-1), "has a beta that is not positive"),
        (nn.Flatten(2), "must flatten from dimension 1 to -1"),
        (Residual(nn.Sequential(nn.Conv2d(2, 2, 3))), "adds values of shape"),
        (nn.Identity(), "the model has no layer"),
    ],
)
def test_settings_that_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.local_lipschitz(nn.Sequential(layer), torch.zeros(1, 2, 5, 5), 0.1)


def test_products_that_round_more_are_refused() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with pytest.raises(ValueError, match="TF32 or bfloat16 products are on"):
                ops.local_lipschitz(GOOD, X, 0.1)
            ops.local_lipschitz(GOOD.double(), X.double(), 0.1)
            GOOD.float()
    finally:
        torch.set_float32_matmul_precision(before)
    ops.local_lipschitz(GOOD, X, 0.1)


def test_autocast_is_ignored() -> None:
    expected = ops.local_lipschitz(GOOD, X, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bounds = ops.local_lipschitz(GOOD, X, 0.1)
    assert torch.equal(bounds.L, expected.L)


# --- the operators underneath -----------------------------------------------------------------------------------------
lines_op, relax_op = torch.ops.torch_ext.lipschitz_lines, torch.ops.torch_ext.lipschitz_relax


def ends(seed: int, *shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(2, *shape, generator=generator, dtype=dtype).sort(0).values
    s = torch.randn(2, *shape, generator=generator, dtype=dtype).sort(0).values
    return g[0], g[1], s[0], s[1]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_lines_enclose_the_product_and_touch_it(dtype: torch.dtype, constant: bool) -> None:
    """Also for negative slopes, as GELU and SiLU have; chords touch all corners of their side."""
    gl, gu, sl, su = ends(0, 2000, dtype=dtype)
    au, iu, al, il = lines_op(gl, gu, sl, su, constant)
    highest = torch.full_like(gl, -math.inf)
    for g in (gl, gu):
        for s in (sl, su):
            assert (au * g + iu >= g * s - 1e-5).all()
            assert (al * g + il <= g * s + 1e-5).all()
            highest = torch.maximum(highest, g * s - au * g - iu)
    assert (highest.abs() < 1e-5).all()  # some corner lies on the line above


def test_lines_at_ties_and_extremes() -> None:
    inf = math.inf
    table = [  # gl, gu, sl, su -> au, iu, al, il
        ((0, 0, 0, 1), (1, 0, 0, 0)),
        ((2, 3, 0, 1), (1, 0, 0, 0)),
        ((-3, -2, 0, 1), (0, 0, 1, 0)),
        ((-1, 1, 0, 0), (0, 0, 0, 0)),
        ((-1, 1, 1, 1), (1, 0, 1, 0)),
        ((-1, 3, 0, 1), (0.75, 0.75, 0.25, -0.75)),
        ((-inf, inf, 0, 0), (0, 0, 0, 0)),
        ((-inf, 1, 0, 1), (0, 1, 0, -inf)),
        ((-1e-320, 1e-320, 0, 1), (0, 1e-320, 0, -1e-320)),
    ]
    columns = tensor([row for row, _ in table]).unbind(1)
    assert torch.equal(lines_op(*columns, False).t(), tensor([row for _, row in table]))
    assert torch.equal(lines_op(*columns, True)[:, 5], tensor([0, 3, 0, -1]))


@pytest.mark.parametrize("constant", [False, True])
def test_gradcheck_of_the_lines(constant: bool) -> None:
    inputs = [e.requires_grad_() for e in ends(3, 40)]
    assert torch.autograd.gradcheck(lambda *e: lines_op(*e, constant), inputs)


def relaxed(a: Tensor, lines: Tensor, mirror: bool) -> tuple[Tensor, Tensor]:
    a = a.expand(lines.size(1), -1, -1)
    a = torch.cat([a, -a], 1) if mirror else a
    up, down = a.clamp(min=0), a.clamp(max=0)
    half = lines.size(0) // 2
    iu, il = lines[half - 1][:, None], lines[2 * half - 1][:, None]
    c = (up * iu + down * il).sum(2)
    return (up * lines[0][:, None] + down * lines[2][:, None] if half == 2 else torch.empty(0, dtype=a.dtype)), c


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("arrays", [4, 2])
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 31), (2, 32), (7, 67), (0, 4), (4, 0)])
def test_relax_equals_its_formula(groups: int, rows: int, width: int, arrays: int, mirror: bool) -> None:
    generator = torch.Generator().manual_seed(rows + width)
    lines = torch.randn(arrays, groups, width, generator=generator, dtype=F64)
    for shared in (False, True):
        a = torch.randn(1 if shared else groups, rows, width, generator=generator, dtype=F64)
        for got, want in zip(relax_op(a, lines, mirror), relaxed(a, lines, mirror), strict=True):
            torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-13)
        strided = a.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(relax_op(strided, lines, mirror)[1], relax_op(a, lines, mirror)[1])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("arrays", [4, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck_of_relax(arrays: int, mirror: bool, shared: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    lines = torch.randn(arrays, 3, 5, generator=generator, dtype=F64, requires_grad=True)
    a = torch.randn(1 if shared else 3, 2, 5, generator=generator, dtype=F64, requires_grad=True)

    def result(a: Tensor, lines: Tensor) -> tuple[Tensor, ...]:
        out, c = relax_op(a, lines, mirror)
        return (out, c) if arrays == 4 else (c,)

    assert torch.autograd.gradcheck(result, (a, lines))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_bits_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    lines = torch.randn(4, 300, 70, generator=generator, dtype=dtype)
    a = torch.randn(1, 50, 70, generator=generator, dtype=dtype)
    gradients = torch.randn(300, 100, 70, generator=generator, dtype=dtype), torch.randn(300, 100, dtype=dtype)
    backward = torch.ops.torch_ext.lipschitz_relax_backward
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append((*relax_op(a, lines, True), *backward(*gradients, a, lines, True)[1:]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lines_op(*[torch.zeros(2)] * 3, torch.zeros(3)), "must have one shape"),
        (lambda: lines_op(*[torch.zeros(2)] * 3, torch.zeros(2, dtype=F64)), "one dtype and device"),
        (lambda: relax_op(torch.zeros(2, 3, 4), torch.zeros(4, 5, 4)), r"A must be \[groups or 1, rows, width\]"),
        (lambda: relax_op(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4)), r"lines \[4 or 2, groups, width\]"),
    ],
)
def test_shapes_that_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="must be float32 or float64"):
        lines_op(*[torch.zeros(2, dtype=torch.half)] * 4)


def test_opcheck() -> None:
    check = torch.library.opcheck
    e = [t.requires_grad_() for t in ends(5, 3, 6)]
    a = torch.randn(1, 2, 6, dtype=F64, requires_grad=True)
    check(lines_op, (*e, False))
    check(relax_op, (a, lines_op(*e).detach().requires_grad_(), True))
    check(relax_op, (a, lines_op(*e)[:2].detach().requires_grad_(), False))
    plain = [t.detach() for t in e]
    check(torch.ops.torch_ext.lipschitz_lines_backward, (lines_op(*plain), *plain, False))
    out, c = relax_op(a.detach(), lines_op(*plain), True)
    check(torch.ops.torch_ext.lipschitz_relax_backward, (out, c, a.detach(), lines_op(*plain), True))
    model = network(*draw(torch.Generator().manual_seed(0), 3, 5, 5, 2))
    x = torch.randn(2, 3, dtype=F64)
    check(torch.ops.torch_ext.local_lipschitz, (*encode(model), x - 0.1, x + 0.1))
    check(torch.ops.torch_ext.lipschitz_check_values, (x, x))


def test_compile_fullgraph_and_meta() -> None:
    tensors, layers, numbers, names = encode(network(*draw(torch.Generator().manual_seed(0), 3, 5, 5, 2)))

    def bound(x: Tensor, *parameters: Tensor) -> Tensor:
        op = torch.ops.torch_ext.local_lipschitz
        return op(list(parameters), layers, numbers, names, x - 0.1, x + 0.1)[0]

    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, dtype=F64)
    torch.testing.assert_close(compiled(x, *tensors), bound(x, *tensors))
    wanted = torch.autograd.grad(bound(x, *tensors).sum(), tensors[0])[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x, *tensors).sum(), tensors[0])[0], wanted)
    meta = bound(x.to("meta"), *(t.to("meta") for t in tensors))
    assert meta.shape == (4, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cuda_kernels_give_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    e = ends(6, 40, 70, dtype=dtype)
    lines = lines_op(*e)
    assert torch.equal(lines_op(*(t.cuda() for t in e)).cpu(), lines)
    for mirror in (False, True):
        for shared in (False, True):
            a = torch.randn(1 if shared else 40, 9, 70, dtype=dtype)
            for some in (lines, lines[1::2].contiguous()):
                out, c = relax_op(a, some, mirror)
                for got, want in zip(relax_op(a.cuda(), some.cuda(), mirror), (out, c), strict=True):
                    assert torch.equal(got.cpu(), want)
                backward = torch.ops.torch_ext.lipschitz_relax_backward
                want = backward(out, c, a, some, mirror)[1]
                assert torch.equal(backward(out.cuda(), c.cuda(), a.cuda(), some.cuda(), mirror)[1].cpu(), want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_bounds_equal_those_of_the_cpu() -> None:
    with torch.random.fork_rng():
        model = images(1, norm=True)
        x = torch.randn(4, 2, 7, 7, dtype=F64)
    expected = ops.local_lipschitz(model, x, 0.1)
    for got, want in zip(ops.local_lipschitz(model.cuda(), x.cuda(), 0.1), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="layer '0' convolves in TF32"):
        ops.local_lipschitz(model.float(), x.cuda().float(), 0.1)
