"""curvature.prune_model and PruneMasks: what is pruned, how many gradients, masks through training, failures."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from torch_ext import optim
from torch_ext.curvature import PruneMasks, PruneModelResult, StaticFisher, obs_prune, prune_model

METHODS = ["joint", "independent", "magnitude"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Convolution, normalisation, dropout, two heads: what a careless pruner breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.conv(x)))
        return self.head(torch.tanh(self.fc(self.drop(y.flatten(1)))))  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


WEIGHTS = ["conv.weight", "fc.weight", "head.weight"]
BATCHES = [(randn(6, 1, 4, 4, seed=i), torch.arange(6) % 3) for i in range(5)]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def prune(model: nn.Module, sparsity: float = 0.5, **options: Any) -> PruneModelResult:
    options = {"num_grads": 8, "damping": 1e-3, "progress": False, **options}
    return prune_model(model, options.pop("loss_fn", loss_fn), options.pop("batches", BATCHES), sparsity, **options)


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((p == 0).sum()) for name, p in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_prunes_weights_over_all_layers(method: str) -> None:
    model = net()
    result = prune(model, 0.5, method=method)
    total = sum(model.get_parameter(name).numel() for name in WEIGHTS)
    assert list(result.masks) == list(result.sparsity) == WEIGHTS
    assert sum(zeros(model)[name] for name in WEIGHTS) == round(0.5 * total)
    assert result.total_sparsity == round(0.5 * total) / total
    assert len(set(result.sparsity.values())) == 3  # layers are not pruned alike
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight == 0, ~mask)
        assert result.sparsity[name] == float((~mask).double().mean())
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad
        if name not in WEIGHTS and name != "norm.weight":
            assert not torch.equal(p, torch.zeros_like(p)) or name == "norm.bias"
    assert (result.predicted_loss_increase is None) == (method == "magnitude")
    assert str(result).splitlines()[-1] == f"total: {result.total_sparsity:.1%} zeros"


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("block", [None, 7])
def test_is_obs_prune_on_the_collected_gradients(update: Any, block: int | None) -> None:
    model, other = net(), net()
    result = prune(model, 0.6, method=update, block=block)
    other.eval()
    rows: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
    for i in range(8):
        grads = torch.autograd.grad(loss_fn(other, BATCHES[i % 5]), [other.get_parameter(n) for n in WEIGHTS])
        for name, grad in zip(WEIGHTS, grads, strict=True):
            rows[name].append(grad.flatten())
    fishers = [StaticFisher(torch.stack(rows[name]), 1e-3, block) for name in WEIGHTS]
    expected = obs_prune([other.get_parameter(n) for n in WEIGHTS], fishers, 0.6, update=update)
    assert result.predicted_loss_increase == float(expected.predicted_loss_increase)
    for name, weight, mask in zip(WEIGHTS, expected.w, expected.mask, strict=True):
        assert torch.equal(result.masks[name], mask)
        assert torch.equal(model.get_parameter(name).detach(), weight)


@pytest.mark.parametrize(("num_grads", "recomputations"), [(1, 1), (4, 1), (13, 2)])
def test_exactly_m_gradients(num_grads: int, recomputations: int) -> None:
    """The authors' program stops one early, so that m = 1 collects nothing."""
    model, calls = net(), 0

    def counted(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_fn(model, batch)

    seen: list[tuple[int, int]] = []
    result = prune(
        model,
        loss_fn=counted,
        num_grads=num_grads,
        recomputations=recomputations,
        progress=lambda done, total: seen.append((done, total)),
    )
    expected = num_grads * recomputations
    assert calls == expected
    assert seen == [(i + 1, expected) for i in range(expected)]
    assert result.predicted_loss_increase is not None
    assert result.predicted_loss_increase > 0


def test_micro_batches_give_one_gradient_each() -> None:
    sizes: list[int] = []

    def sized(model: nn.Module, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        sizes.append(len(x))
        return loss_fn(model, (x, y))

    dicts = [{"x": x, "y": y} for x, y in BATCHES]
    results = []
    for batches in (BATCHES, dicts):
        model = net()
        prune(model, loss_fn=sized, batches=batches, num_grads=7, micro_batch=4)
        results.append(model.fc.weight.detach())
        assert sizes == [4, 2, 4, 2, 4, 2, 4]
        sizes.clear()
    assert torch.equal(results[0], results[1])
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        prune(net(), micro_batch=0)
    with pytest.raises(TypeError, match="micro_batch cuts tensors, tuples, lists and dicts of them, not <class 'int'>"):
        prune(net(), micro_batch=1, batches=[3])


def test_recomputation_uses_fresh_gradients_and_follows_the_schedule() -> None:
    model = net()
    total = sum(model.get_parameter(name).numel() for name in WEIGHTS)
    found: list[int] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        found.append(sum(zeros(model)[name] for name in WEIGHTS))
        return loss_fn(model, batch)

    prune(model, 0.9, loss_fn=watched, num_grads=3, recomputations=4)
    expected = [round((1 - 0.1 ** (j / 4)) * total) for j in range(4)]
    assert found == [count for count in expected for _ in range(3)]


def test_zero_initialised_parameters_are_not_frozen() -> None:
    """The authors' program takes whatever is zero at construction for pruned, such as biases."""
    model = net()
    nn.init.zeros_(model.fc.bias)
    with torch.no_grad():
        model.fc.weight[0, :3] = 0
    result = prune(model, 0.0)
    assert all(bool(mask.all()) for mask in result.masks.values())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert bool((model.fc.bias != 0).all())
    assert bool((model.fc.weight[0, :3] != 0).all())


def test_choice_of_parameters() -> None:
    assert list(prune(net(), exclude=["head.weight"]).masks) == ["conv.weight", "fc.weight"]
    assert list(prune(net(), exclude=["*.weight"], parameters=["*"]).masks) == [
        *("conv.bias", "norm.bias", "fc.bias", "head.bias")
    ]
    assert list(prune(net(), parameters=["fc.*"]).masks) == ["fc.weight", "fc.bias"]
    frozen = net()
    frozen.conv.requires_grad_(False)
    assert list(prune(frozen).masks) == ["fc.weight", "head.weight"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    result = prune_model(tied, lambda m, x: m(x).square().sum(), [randn(3, 4)], 0.5, num_grads=2, progress=False)
    assert list(result.masks) == ["0.weight"]


# --- masks in training -----------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for i in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model, BATCHES[i % 5])
        if isinstance(optimizer, optim.AdaHessian):
            optimizer.step(lambda loss=loss: loss)
        else:
            loss.backward()
            optimizer.step()


def warmed(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[Net, torch.optim.Optimizer]:
    """A model and an optimizer whose momentum knows weights that are about to be pruned."""
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    return model, optimizer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),  # which hides that it writes
    "AdaHessian": lambda p: optim.AdaHessian(p, lr=0.1, linear_averaging="row"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fresh", [True, False])
def test_masks_hold_while_any_optimizer_trains(name: str, fresh: bool) -> None:
    model, optimizer = warmed(OPTIMIZERS[name])
    result = prune(model, 0.7)
    if fresh:
        optimizer = OPTIMIZERS[name](model.parameters())
    before = state(model)
    for _ in range(3):
        train(model, optimizer, 1)
        for parameter, mask in result.masks.items():
            weight = model.get_parameter(parameter)
            assert torch.equal(weight == 0, ~mask)  # right after step(), without another forward pass
            if weight.grad is not None:
                assert bool((weight.grad[~mask] == 0).all())
    assert not torch.equal(model.fc.weight, before["fc.weight"])


def test_gradients_are_masked_even_where_they_are_nan() -> None:
    model = net()
    result = prune(model, 0.5)
    mask = result.masks["fc.weight"]
    factor = torch.where(mask, 1.0, float("nan"))
    (model.fc.weight * factor).sum().backward()
    assert model.fc.weight.grad is not None
    assert torch.equal(model.fc.weight.grad, mask.float())


def test_remove_lets_the_weights_go() -> None:
    model = net()
    result = prune(model, 0.7)
    assert result.guard is not None
    assert PruneMasks.of(model) is result.guard
    result.guard.remove()
    assert PruneMasks.of(model) is None
    hooks = (len(model._forward_pre_hooks), len(model._load_state_dict_post_hooks))
    assert hooks == (0, 0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert zeros(model)["fc.weight"] == 0
    free = net()
    assert prune(free, 0.7, keep_masks=False).guard is None
    train(free, torch.optim.SGD(free.parameters(), lr=0.1))
    assert zeros(free)["fc.weight"] == 0


def copies(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield "torch.save", torch.load(file, weights_only=False)


def test_copies_carry_masks_of_their_own() -> None:
    model = net()
    result = prune(model, 0.7)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))  # hooks are in place when the copies are made
    for how, other in copies(model):
        train(other, torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.1))
        for name, mask in result.masks.items():
            assert torch.equal(other.get_parameter(name) == 0, ~mask), how
        guard = PruneMasks.of(other)
        assert guard is not None
        assert guard is not result.guard
        guard.remove()
        train(other, torch.optim.SGD(other.parameters(), lr=0.1))
        assert zeros(other)["fc.weight"] == 0
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name) == 0, ~mask)
    assert PruneMasks.of(model) is result.guard


def test_state_dict_keeps_its_names_and_a_load_keeps_the_masks() -> None:
    model, dense = net(), net(1)
    names = list(model.state_dict())
    result = prune(model, 0.7)
    assert list(model.state_dict()) == names
    model.load_state_dict(dense.state_dict())
    for name, mask in result.masks.items():
        expected = torch.where(mask, dense.get_parameter(name), 0.0)
        assert torch.equal(model.get_parameter(name), expected)

    file = io.BytesIO()  # another process: masks beside the model
    assert result.guard is not None
    torch.save({"model": model.state_dict(), "masks": result.guard.masks}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net(2)
    other.load_state_dict(saved["model"])
    PruneMasks(other, saved["masks"])
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01))
    for name, mask in result.masks.items():
        assert torch.equal(other.get_parameter(name) == 0, ~mask)


def test_two_forward_passes_before_backward() -> None:
    """The hook must not write to weights that an earlier graph needs."""
    model = net().eval()
    prune(model, 0.7)
    (loss_fn(model, BATCHES[0]) + loss_fn(model, BATCHES[1])).backward()


def test_replaced_parameters_and_dtypes_are_followed() -> None:
    model = net()
    result = prune(model, 0.7)
    model.fc.weight = nn.Parameter(torch.ones_like(model.fc.weight))
    model.double()
    batch = (BATCHES[0][0].double(), BATCHES[0][1])
    loss_fn(model, batch).backward()
    assert torch.equal(model.fc.weight == 0, ~result.masks["fc.weight"])
    assert model.fc.weight.grad is not None
    assert bool((model.fc.weight.grad[~result.masks["fc.weight"]] == 0).all())


def test_without_a_torch_optimizer_the_next_forward_pass_repairs() -> None:
    model = net()
    result = prune(model, 0.7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model(BATCHES[0][0])
    assert torch.equal(model.fc.weight == 0, ~result.masks["fc.weight"])
    with torch.no_grad():
        model.fc.weight.add_(1)
    assert result.guard is not None
    result.guard.apply()
    assert torch.equal(model.fc.weight == 0, ~result.masks["fc.weight"])


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    model = net()
    guard = prune(model, 0.5).guard
    other = net()
    del model
    train(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert guard is not None
    with pytest.raises(RuntimeError, match="the model is gone"):
        guard.apply()
    guard.remove()


def test_pruning_further_starts_from_the_masks_in_place() -> None:
    model = net()
    first = prune(model, 0.5)
    second = prune(model, 0.8)
    for name in WEIGHTS:
        assert not bool((second.masks[name] & ~first.masks[name]).any())
    assert len(model._forward_pre_hooks) == 1
    with pytest.raises(ValueError, match=r"sparsity 0\.3 is below that of the given masks, 0\.79"):
        prune(model, 0.3)
    other = net()
    third = prune(other, 0.6, masks={"fc.weight": first.masks["fc.weight"]})
    assert not bool((third.masks["fc.weight"] & ~first.masks["fc.weight"]).any())


def test_masks_apply_under_compile() -> None:
    model = net()
    result = prune(model, 0.7)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(compiled, BATCHES[0]).backward()
        optimizer.step()
        assert torch.equal(model.fc.weight == 0, ~result.masks["fc.weight"])


# --- failures --------------------------------------------------------------------------------------------------------


def failing(at: int, error: Exception | None) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that raises, or (None) has a NaN gradient in fc.weight alone, at call number ``at``."""
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = loss_fn(model, batch)
        if calls != at:
            return value
        if error is not None:
            raise error
        return value + (model.fc.weight * float("nan")).sum() * 0

    return loss


@pytest.mark.parametrize(
    ("at", "error", "expected", "message"),
    [
        (3, None, ValueError, r"gradient 2 of parameter 'fc\.weight' holds NaN or infinity; the weights are unchanged"),
        (9, None, ValueError, r"gradient 0 of parameter 'fc\.weight' holds NaN"),  # after a round that has pruned
        (3, KeyError("gone"), KeyError, "gone"),
        (10, KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_failure_leaves_everything_as_it_was(
    at: int, error: Any, expected: type[BaseException], message: str
) -> None:
    model = net()
    model.norm.eval()  # a mixture of flags
    train_flags = [m.training for m in model.modules()]
    loss_fn(model, BATCHES[0]).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = state(model)
    with pytest.raises(expected, match=message):
        prune(model, loss_fn=failing(at, error), recomputations=3)
    assert_unchanged(model, before)
    assert [m.training for m in model.modules()] == train_flags
    assert PruneMasks.of(model) is None
    assert len(model._forward_pre_hooks) == 0
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, grads[name])
    prune(model)  # and works afterwards
    assert [m.training for m in model.modules()] == train_flags


def test_masks_in_place_survive_a_failure() -> None:
    model = net()
    first = prune(model, 0.5)
    before = state(model)
    with pytest.raises(ValueError, match="holds NaN"):
        prune(model, 0.8, loss_fn=failing(2, None))
    assert_unchanged(model, before)
    assert PruneMasks.of(model) is first.guard


def test_buffers_and_generators() -> None:
    """Evaluation mode: no running statistics, no dropout."""
    model = net()
    before = state(model)
    random = torch.get_rng_state()
    prune(model)
    assert torch.equal(torch.get_rng_state(), random)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "fc.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def two_headed() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prune(net(), 1.0), ValueError, r"sparsity must be in \[0, 1\)"),
        (lambda: prune(net(), method="best"), ValueError, 'method must be "joint", "independent" or .*got "best"'),
        (lambda: prune(net(), num_grads=0), ValueError, "num_grads must be at least 1, got 0"),
        (lambda: prune(net(), damping=0.0), ValueError, "damping must be positive, got 0"),
        (lambda: prune(net(), block=0), ValueError, "block must be at least 1, got 0"),
        (lambda: prune(net(), recomputations=0), ValueError, "recomputations must be at least 1, got 0"),
        (lambda: prune(net(), batches=[]), ValueError, "batches ended before num_grads gradients"),
        (lambda: prune(net(), batches=iter(BATCHES)), ValueError, "batches ended before.*can be started again"),
        (lambda: prune(net(), batches=None), ValueError, 'method="joint" needs loss_fn and batches'),
        (lambda: prune(net(), parameters=["fc.wieght"]), ValueError, "parameters names 'fc.wieght', which is no par"),
        (lambda: prune(net(), exclude=["nothing*"]), ValueError, r"exclude names 'nothing\*'"),
        (lambda: prune(net(), exclude="fc.weight"), TypeError, "exclude must be a list of names, got the string"),
        (lambda: prune(net(), exclude=["*"]), ValueError, "no trainable parameter of two or more dimensions"),
        (lambda: prune(net(), masks={"fc.bias": torch.ones(8)}), ValueError, "masks names 'fc.bias', which is not"),
        (
            lambda: prune(net(), masks={"fc.weight": torch.ones(8)}),
            TypeError,
            r"the mask of parameter 'fc\.weight' must be bool",
        ),
        (
            lambda: prune(net(), masks={"fc.weight": torch.ones(8).bool()}),
            ValueError,
            r"the mask of parameter 'fc\.weight' has shape \[8\]",
        ),
        (lambda: prune(net().requires_grad_(False), parameters=["fc.weight"]), ValueError, "'fc.weight' is frozen"),
        (lambda: prune(net(), loss_fn=lambda m, b: m(b[0])), RuntimeError, "the loss must be one number"),
        (lambda: prune(net(), loss_fn=lambda m, b: 3.0), RuntimeError, "the loss must be one number, got nothing"),
        (
            lambda: prune(two_headed(), loss_fn=lambda m, b: m["a"](b).sum(), batches=[randn(2, 4)]),
            ValueError,
            r"parameter 'b\.weight' does not enter any of the 8 losses",
        ),
        (
            lambda: prune(sparse(), loss_fn=lambda m, b: m(b).sum(), batches=[torch.tensor([[1, 2]])]),
            RuntimeError,
            r"parameter '0\.weight' has a sparse gradient",
        ),
        (lambda: PruneMasks(net(), {"x": torch.ones(1).bool()}), ValueError, "no parameter 'x'"),
        (lambda: PruneMasks(net(), {"fc.bias": torch.ones(8)}), TypeError, r"parameter 'fc\.bias' must be bool"),
        (lambda: PruneMasks(net(), {"fc.bias": torch.ones(7).bool()}), ValueError, r"'fc\.bias' has shape \[7\]"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"parameter 'fc\.weight' holds NaN or infinity"):
        prune(model)


# --- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("installed", [True, False])
def test_progress_on_a_terminal(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    prune(net(), progress=True)
    assert "gradients" in screen.getvalue()
    assert "8/8" in screen.getvalue()


def test_no_progress_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    prune(net(), progress=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_importing_needs_no_tqdm() -> None:
    import torch_ext.curvature.prune_model as module

    names = [value for value in vars(module).values() if isinstance(value, types.ModuleType)]
    assert "tqdm" not in [value.__name__ for value in names]


# --- models that change, are reparametrised, tied or called with other tensors ----------------------------------------


def chain(tied: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if tied:
        model[2].weight = model[0].weight
    return model


def prune_chain(model: nn.Module, sparsity: float = 0.5, **options: Any) -> PruneModelResult:
    options = {"loss_fn": lambda m, x: m(x).square().sum(), "batches": [randn(3, 4)], "num_grads": 2, **options}
    return prune(model, sparsity, **options)


def stepped(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(randn(3, 4)).square().sum().backward()
    optimizer.step()


def lose(model: nn.Sequential) -> None:
    model[2] = nn.Identity()


def to_plain_tensor(model: nn.Sequential) -> None:
    del model[2].weight
    model[2].weight = torch.ones(4, 4)


def parametrise(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[2])


def widen(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.ones(5, 4))
    model[2].bias = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, "is no longer a parameter"),
        (to_plain_tensor, "is no longer a parameter"),
        (parametrise, "is no longer a parameter"),
        (widen, r"has shape \[5, 4\] now, and its mask \[4, 4\]"),
    ],
)
def test_a_model_that_lost_a_masked_parameter(change: Callable[[nn.Sequential], None], message: str) -> None:
    model = chain()
    guard = prune_chain(model).guard
    assert guard is not None
    change(model)
    stepped(chain())  # another model's optimizer has nothing to do with it
    message = rf"'2\.weight' {message}.*PruneMasks\.of\(model\)\.remove\(\)"
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[Callable[[], Any]] = [
        lambda: model(randn(3, 4)),
        own.step,
        lambda: prune_chain(model, 0.8, method="magnitude"),
        lambda: copy.deepcopy(model)(randn(3, 4)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()
    other = copy.deepcopy(model)
    for changed in (model, other):
        found = PruneMasks.of(changed)
        assert found is not None
        found.remove()
        stepped(changed)
        assert bool((changed[0].weight != 0).all())


def test_masks_of_parameters_a_call_does_not_touch_stay() -> None:
    for options in ({}, {"masks": True}, {"keep_masks": False}):
        model = chain()
        first = prune_chain(model).masks
        if "masks" in options:
            options = {"masks": {"2.weight": first["2.weight"]}}
        result = prune_chain(model, 0.75, parameters=["2.weight"], **options)
        assert list(result.masks) == ["2.weight"]
        assert PruneMasks.of(model) is result.guard is not None
        assert len(model._forward_pre_hooks) == 1
        stepped(model)
        assert torch.equal(model[0].weight == 0, ~first["0.weight"])
        held = "keep_masks" not in options
        assert torch.equal(model[2].weight == 0, ~result.masks["2.weight"]) == held
        assert set(result.guard.masks) == ({"0.weight", "2.weight"} if held else {"0.weight"})


P = nn.utils.parametrizations


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (P.weight_norm, "0.parametrizations.weight.original1"),
        (P.orthogonal, "0.parametrizations.weight.original"),
        (P.spectral_norm, "0.parametrizations.weight.original"),
        (nn.utils.weight_norm, "0.weight_v"),
        (nn.utils.spectral_norm, "0.weight_orig"),
        (lambda layer: torch_prune.random_unstructured(layer, "weight", 0.1), "0.weight_orig"),
    ],
)
def test_reparametrised_weights_are_not_pruned_by_default(wrap: Callable[[nn.Module], nn.Module], name: str) -> None:
    def make() -> nn.Sequential:
        model = chain()
        wrap(model[0])
        return model

    model = make()
    before = state(model)
    for parameters in (None, ["*"], ["*.weight"]):
        with pytest.raises(ValueError, match=r"'0\.weight' is parametrised: remove_parametrizations first.*exclude"):
            prune_chain(model, parameters=parameters)
    assert_unchanged(model, before)
    for exclude in ("0.weight", "0.*"):
        assert list(prune_chain(make(), exclude=[exclude]).masks) == ["2.weight"]
    assert list(prune_chain(model, parameters=[name], method="magnitude").masks) == [name]
    bare = nn.Linear(4, 4)
    wrap(bare)
    with pytest.raises(ValueError, match="'weight' is parametrised"):
        prune_chain(bare)


def test_weights_with_such_names_are_ordinary_otherwise() -> None:
    model = nn.Linear(4, 4)
    model.weight_v = nn.Parameter(randn(2, 2))
    assert list(prune_chain(model, method="magnitude").masks) == ["weight", "weight_v"]


@pytest.mark.parametrize("copied", [False, True])
def test_functional_calls_run_with_the_tensors_they_are_given(copied: bool) -> None:
    model = chain()
    masks = prune_chain(model).masks
    if copied:
        model = copy.deepcopy(model)  # whose first forward pass this is
    x = randn(3, 4)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = state(model)
    assert torch.equal(torch.func.functional_call(model, tensors, (x,)), copy.deepcopy(model)(x))

    def loss(tensors: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, tensors, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tensors, x)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        expected = each[name].sum(0)
        torch.testing.assert_close(p.grad, expected * masks[name] if name in masks else expected)
    ones = {name: torch.ones_like(value) for name, value in tensors.items()}
    torch.func.functional_call(model, ones, (x,))
    assert all(bool((value == 1).all()) for value in ones.values())
    assert_unchanged(model, before)
    stepped(model)
    assert torch.equal(model[2].weight == 0, ~masks["2.weight"])


def test_a_replaced_parameter_with_the_same_version_is_masked() -> None:
    model = chain()
    masks = prune_chain(model).masks
    fresh = nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad():
        while fresh._version < model[0].weight._version:
            fresh.fill_(1)
    old, model[0].weight = model[0].weight, fresh
    model(randn(3, 4))
    assert torch.equal(model[0].weight == 0, ~masks["0.weight"])
    assert not old._backward_hooks


def test_masks_whose_construction_failed_are_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    kept: list[PruneMasks] = []

    def broken(self: PruneMasks) -> None:
        kept.append(self)
        raise RuntimeError("no")

    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(PruneMasks, "apply", broken)
        with pytest.raises(RuntimeError, match="no"):
            PruneMasks(model, {"0.weight": torch.zeros(4, 4).bool()})
    assert_unchanged(model, before)
    assert len(kept) == 1
    assert len(model._forward_pre_hooks) + len(model._load_state_dict_post_hooks) == 0
    stepped(model)
    assert bool((model[0].weight != 0).all())


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("make", [Pair._make, list, tuple])
def test_micro_batches_keep_the_type_of_the_batch(make: Callable[[Any], Any]) -> None:
    seen: list[type] = []

    def typed(model: nn.Module, batch: Any) -> Tensor:
        seen.append(type(batch))
        return loss_fn(model, batch)

    prune(net(), loss_fn=typed, batches=[make(pair) for pair in BATCHES], num_grads=3, micro_batch=4)
    assert seen == [type(make(BATCHES[0]))] * 3


def test_micro_batches_of_a_number() -> None:
    with pytest.raises(ValueError, match="micro_batch cuts dimension 0, and a tensor of the batch has no dimension"):
        prune(net(), batches=[(BATCHES[0][0], torch.tensor(1))], micro_batch=1)


def test_tied_weights_go_by_all_their_names() -> None:
    mask = torch.eye(4).bool()
    assert list(prune_chain(chain(tied=True), parameters=["2.weight"]).masks) == ["0.weight"]
    assert list(prune_chain(chain(tied=True), parameters=["*"], exclude=["2.*"]).masks) == ["0.bias"]
    further = prune_chain(chain(tied=True), 0.9, masks={"2.weight": mask})
    assert not bool((further.masks["0.weight"] & ~mask).any())
    model = chain(tied=True)
    assert list(PruneMasks(model, {"2.weight": mask}).masks) == ["0.weight"]
    stepped(model)
    assert torch.equal(model[2].weight != 0, mask)
    with pytest.raises(ValueError, match=r"names parameter '0\.weight' twice, also as '2\.weight'"):
        PruneMasks(model, {"0.weight": mask, "2.weight": mask})


# --- operators -------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    mask = randn(3, 4) > 0
    torch.library.opcheck(torch.ops.torch_ext.prune_model_apply_masks_.default, ([randn(3, 4, seed=1)], [mask]))
    gradient = randn(3, 4, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.torch_ext.prune_model_mask_gradient.default, (gradient, mask))


def test_applying_masks_is_seen_by_autograd() -> None:
    weight, mask = randn(4), torch.tensor([True, False, True, False])
    version = weight._version
    torch.ops.torch_ext.prune_model_apply_masks_([weight], [mask])
    assert weight._version > version
    assert weight[1] == weight[3] == 0


@pytest.mark.cuda
def test_cuda() -> None:
    model = net().cuda()
    batches = [(x.cuda(), y.cuda()) for x, y in BATCHES]
    result = prune(model, 0.7, batches=batches)
    assert all(mask.is_cuda for mask in result.masks.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(model, (x, y)).backward()
        optimizer.step()
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name) == 0, ~mask)
