"""Layers of a population against what they replace: every member's plain layer, one member at a time."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ext.nn import (
    EggrollConv2d,
    EggrollEmbedding,
    EggrollLayerNorm,
    EggrollLinear,
    eggroll_convert,
    eggroll_revert,
)
from torch_ext.optim import Eggroll
from torch_ext.testing import bits

TWINS = {
    nn.Linear: EggrollLinear,
    nn.Embedding: EggrollEmbedding,
    nn.LayerNorm: EggrollLayerNorm,
    nn.Conv2d: EggrollConv2d,
}
#: Name: layer, input of `members` members.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda: nn.Linear(13, 7), lambda n: torch.randn(n, 13)),
    "linear, rows": (lambda: nn.Linear(13, 7), lambda n: torch.randn(n, 5, 13)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), lambda n: torch.randn(n, 2, 3, 6)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda n: torch.randint(11, (n, 4))),
    "embedding, padding": (lambda: nn.Embedding(11, 6, padding_idx=2), lambda n: torch.randint(11, (n,))),
    "layer norm": (lambda: nn.LayerNorm(9), lambda n: torch.randn(n, 4, 9)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((3, 5)), lambda n: torch.randn(n, 2, 3, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(9, bias=False), lambda n: torch.randn(n, 9)),
    "layer norm without parameters": (lambda: nn.LayerNorm(9, elementwise_affine=False), lambda n: torch.randn(n, 9)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), lambda n: torch.randn(n, 3, 6, 5)),
    "convolution, batch": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
        lambda n: torch.randn(n, 3, 2, 8, 7),
    ),
    "convolution, same": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), lambda n: torch.randn(n, 2, 6, 6)),
    "convolution, valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), lambda n: torch.randn(n, 2, 6, 6)),
}
KINDS = {"layer norm, two dimensions": "vector"}


def made(name: str, members: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, x = LAYERS[name]
    module = layer().to(dtype)
    for p in module.parameters():
        nn.init.normal_(p)
    data = x(members)
    return eggroll_convert(module), data.to(dtype) if data.is_floating_point() else data


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", list(LAYERS))
def test_rows_are_members(name: str, rank: int) -> None:
    module, x = made(name, 6)
    params = list(module.parameters()) or [torch.zeros(2, requires_grad=True)]
    kind = KINDS.get(name)
    optimizer = Eggroll(params, sigma=0.3, rank=rank, population=8, kind=kind)
    pop = optimizer.ask(2, 8)
    with torch.no_grad():
        if not list(module.parameters()):  # a layer without parameters has nothing to perturb
            module._population = pop
            y = module(x)
            module._population = None
        else:
            with pop.applied_to(module):
                y = module(x)
        for i in range(6):
            with pop.member(i):
                torch.testing.assert_close(y[i], module(x[i : i + 1])[0] if x.dim() < 5 else module(x[i]), **close())


def close() -> dict[str, Any]:
    return {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("name", [n for n in LAYERS if "without parameters" not in n])
def test_baseline_members_see_the_plain_layer(name: str) -> None:
    module, x = made(name, 8)
    optimizer = Eggroll(
        module.parameters(), sigma=0.3, population=8, shaping="baseline", group_size=4, kind=KINDS.get(name)
    )
    pop = optimizer.ask()
    assert pop.unperturbed_rows is not None
    assert pop.unperturbed_rows.tolist() == [0, 1, 4, 5]
    with torch.no_grad():
        with pop.applied_to(module):
            y = module(x)
        for i in range(8):
            with pop.member(i):
                torch.testing.assert_close(y[i], module(x[i : i + 1])[0] if x.dim() < 5 else module(x[i]), **close())
            plain = module(x[i : i + 1])[0] if x.dim() < 5 else module(x[i])
            assert torch.allclose(y[i], plain, rtol=1e-11, atol=1e-12) == (i % 4 < 2)


@pytest.mark.parametrize("name", list(LAYERS))
def test_without_a_population_it_is_the_plain_layer(name: str) -> None:
    module, x = made(name, 4, torch.float32)
    x = x.flatten(0, 1) if x.dim() == 5 else x
    y = bits(module(x).detach())
    keys = bits(module.state_dict())
    assert type(module) in TWINS.values()
    eggroll_revert(module)
    assert type(module) in TWINS
    assert bits(module(x).detach()) == y
    assert bits(module.state_dict()) == keys


def test_convert_keeps_everything_else() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), nn.Bilinear(4, 4, 2)
    )
    model.append(model[0])  # shared
    params = list(model.parameters())
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert eggroll_convert(model) is model
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert [type(m) for m in (model[0], model[2][0], model[2][1], model[3])] == [
        EggrollLinear,
        EggrollLayerNorm,
        EggrollLinear,
        nn.Bilinear,
    ]
    assert model[4] is model[0]
    model[0](torch.zeros(1, 3))
    assert calls == [1]
    eggroll_convert(model)
    eggroll_revert(model)
    assert type(model[0]) is nn.Linear
    assert repr(eggroll_convert(nn.Linear(3, 4))) == "EggrollLinear(in_features=3, out_features=4, bias=True)"


def test_copies_leave_the_population_behind() -> None:
    model = eggroll_convert(nn.Sequential(nn.Linear(3, 4)))
    pop = Eggroll(model.parameters(), population=4).ask()
    with pop.applied_to(model):
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert model[0]._population is pop
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert other[0]._population is None
        assert other(torch.zeros(2, 3)).shape == (2, 4)


def test_guards_nest_and_end() -> None:
    model = eggroll_convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = Eggroll(model.parameters(), population=8)
    a, b = optimizer.ask(0, 4), optimizer.ask(4, 8)

    def raising() -> None:
        with b.applied_to(model):
            assert model[0]._population is b
            raise KeyError

    with a.applied_to(model):
        with pytest.raises(KeyError):
            raising()
        assert model[0]._population is a
    assert model[0]._population is None


def test_several_models_share_a_population() -> None:
    actor, critic = eggroll_convert(nn.Linear(3, 2)), eggroll_convert(nn.Linear(3, 1))
    pop = Eggroll([*actor.parameters(), *critic.parameters()], population=4).ask()
    with pytest.raises(ValueError, match="parameter 2"), pop.applied_to(actor):
        pass
    with pop.applied_to(actor, critic):
        assert actor(torch.zeros(4, 3)).shape == (4, 2)
        assert critic(torch.zeros(4, 3)).shape == (4, 1)


def test_what_is_not_passed_is_not_perturbed() -> None:
    model = eggroll_convert(nn.Linear(3, 4).double())
    pop = Eggroll([model.weight], population=4, sigma=0.5).ask()
    x = torch.zeros(4, 3, dtype=torch.float64)
    with pop.applied_to(model):
        torch.testing.assert_close(model(x), model.bias.expand(4, 4))


def test_layers_refuse_what_they_cannot_do() -> None:
    def refused(module: nn.Module, message: str, **options: Any) -> None:
        eggroll_convert(module)
        pop = Eggroll(module.parameters(), population=4, **options).ask()
        with pytest.raises(ValueError, match=message), pop.applied_to(module):
            pass

    refused(nn.Linear(3, 4), 'EggrollLinear perturbs its weight as a "matrix", parameter 0', kind="vector")
    refused(nn.LayerNorm((2, 3)), 'EggrollLayerNorm perturbs its weight as a "vector", parameter 0')
    refused(nn.Embedding(4, 3, max_norm=1.0), "max_norm")
    refused(nn.Conv2d(4, 4, 3, groups=2), "groups=2 is not supported")
    refused(nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), "padding must be zeros")
    refused(nn.Conv2d(4, 4, 2, padding="same"), "as many on both sides")


def test_the_fast_path_of_a_transformer_sees_the_noise() -> None:
    """Its inference path reads weights without calling the layers; converted layers turn it off."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    fast = layer.activation_relu_or_gelu
    eggroll_convert(layer)
    ffn = [*layer.linear1.parameters(), *layer.linear2.parameters()]
    pop = Eggroll(ffn, population=4, sigma=0.5).ask()
    x = torch.randn(1, 3, 8).expand(4, 3, 8)
    with torch.no_grad(), pop.applied_to(layer):
        y = layer(x)
    assert not torch.allclose(y[0], y[1])
    eggroll_revert(layer)
    assert layer.activation_relu_or_gelu == fast
