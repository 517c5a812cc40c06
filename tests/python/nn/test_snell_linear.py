"""nn.SnellLinear, nn.apply_snell and nn.SnellBudget. N4 and N6: numbers of the method's acceptance list."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import ops
from torch_ext.nn import SnellBudget, SnellLinear, apply_snell, snell_state_dict
from torch_ext.reference.nn import budget_sparsity, budget_split, snell_init

DIGITS = Path(__file__).resolve().parents[3] / "examples" / "data" / "digits.csv"


def layer(**options: Any) -> SnellLinear:
    torch.manual_seed(0)
    return SnellLinear(nn.Linear(12, 10), **{"rank": 4, "sparsity": 0.5, "seed": 3, **options})


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def test_is_the_frozen_layer_and_the_branch() -> None:
    linear = nn.Linear(12, 10)
    adapted = SnellLinear(linear, 4, 0.5)
    x = torch.randn(2, 3, 12)
    y, _ = ops.snell_linear(x, adapted.lora_in, adapted.lora_out, 0.1, 0.5)
    assert torch.equal(adapted(x), linear(x) + y)
    assert adapted.weight is linear.weight
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == ["lora_in", "lora_out"]
    assert list(adapted.state_dict()) == ["weight", "bias", "lora_in", "lora_out", "sparsity"]
    assert adapted.state_dict()["sparsity"] == 0.5
    assert "rank=4, sparsity=0.5" in repr(adapted)
    assert SnellLinear(nn.Linear(12, 10, bias=False), 4).bias is None


def test_initial_factors_are_those_of_the_reference() -> None:
    adapted = layer(seed=-5)
    assert torch.equal(adapted.lora_in, snell_init(12, 4, 0, -5).float())
    assert torch.equal(adapted.lora_out, snell_init(10, 4, 1, -5).float())
    torch.manual_seed(1)
    one, two = SnellLinear(nn.Linear(3, 3)), SnellLinear(nn.Linear(3, 3))
    assert one.seed != two.seed  # drawn from torch's generator
    torch.manual_seed(1)
    assert SnellLinear(nn.Linear(3, 3)).seed == one.seed


@pytest.mark.parametrize("from_zero", [False, True])
def test_4_merged_equals_unmerged(from_zero: bool) -> None:
    adapted = layer(start_from_zero=from_zero)
    x, weight = torch.randn(5, 12), adapted.weight.clone()
    with torch.no_grad():
        adapted.lora_in.mul_(3)
    y, plain = adapted(x), adapted.to_linear()
    adapted.merge()
    adapted.merge()
    assert adapted.merged
    assert relative(adapted(x), y) < 1e-6
    assert relative(plain(x), y) < 1e-6
    assert type(plain) is nn.Linear
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"):
        adapted.state_dict()
    with torch.no_grad():
        adapted.lora_in.mul_(2)  # what was merged is subtracted, not this
    adapted.unmerge()
    assert relative(adapted.weight, weight) < 1e-6


def test_starts_from_zero_with_a_gradient() -> None:
    adapted = layer(start_from_zero=True)
    x = torch.randn(5, 12)
    torch.testing.assert_close(adapted(x), F.linear(x, adapted.weight, adapted.bias), rtol=0, atol=1e-7)
    adapted(x).square().sum().backward()
    assert adapted.lora_in.grad is not None
    assert adapted.lora_in.grad.any()
    with torch.no_grad():
        adapted.lora_in.mul_(2)
    expected = F.linear(x, adapted.weight, adapted.bias)
    expected = expected + ops.snell_linear(x, adapted.lora_in, adapted.lora_out, 0.1, 0.5)[0]
    first = layer()
    expected = expected - ops.snell_linear(x, first.lora_in, first.lora_out, 0.1, 0.5)[0]
    torch.testing.assert_close(adapted(x), expected)


def test_state_travels() -> None:
    source = layer(start_from_zero=True)
    with torch.no_grad():
        source.lora_in.mul_(2)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = layer(sparsity=0.1, seed=9)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 12)
    assert target.sparsity == 0.5
    assert torch.equal(target(x), source(x))
    assert torch.equal(copy.deepcopy(source)(x), source(x))
    missing = target.load_state_dict(nn.Linear(12, 10).state_dict(), strict=False).missing_keys
    assert sorted(missing) == ["lora_in", "lora_out", "sparsity"]
    with pytest.raises(RuntimeError, match="sparsity"):
        target.load_state_dict(nn.Linear(12, 10).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    adapted = SnellLinear(nn.Linear(12, 10, dtype=dtype), 4)
    assert adapted.lora_in.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y = adapted(torch.randn(5, 12, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer()(torch.randn(5, 12))
    assert y.dtype == torch.bfloat16


def test_dropout_is_off_in_evaluation() -> None:
    adapted = layer(dropout=0.5)
    x = torch.randn(5, 12)
    assert not torch.equal(adapted(x), adapted(x))
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    for options in ({}, {"start_from_zero": True}):
        adapted = layer(**options)
        compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 12)
        torch.testing.assert_close(compiled(x), adapted(x))
        compiled(x).square().sum().backward()
        assert adapted.lora_in.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, "SnellLinear: rank must be a positive multiple of 2, got 7"),
        ({"rank": 0}, "rank must be"),
        ({"sparsity": 1.0}, r"SnellLinear: sparsity must be in \[0, 1\), got 1"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"sparsifier": "top"}, "sparsifier must be 'code'"),
        ({"grad": "no"}, "grad must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**options)
    good = layer()
    if "sparsity" in options:
        with pytest.raises(ValueError, match=message):
            good.sparsity = options["sparsity"]
        assert good.sparsity == 0.5


# --- apply_snell -----------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.fc1 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.norm(self.q_proj(x) + self.k_proj(x)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(OrderedDict(layers=nn.ModuleList([Block(), Block()]), head=nn.Linear(16, 4)))


def adapted_names(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, SnellLinear)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "k_proj"], ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj"]),
        (["layers.1.fc1", "head"], ["layers.1.fc1", "head"]),
        (r"layers\.0\..*proj", ["layers.0.q_proj", "layers.0.k_proj"]),
    ],
)
def test_apply_chooses_by_name(targets: Any, expected: list[str]) -> None:
    changed = apply_snell(model(), 4, 0.5, targets, sparsifier="paper")
    assert adapted_names(changed) == expected
    trainable = [name for name, p in changed.named_parameters() if p.requires_grad]
    assert trainable == [f"{name}.{factor}" for name in expected for factor in ("lora_in", "lora_out")]
    assert list(snell_state_dict(changed)) == [
        f"{name}.{entry}" for name in expected for entry in ("lora_in", "lora_out", "sparsity")
    ]
    assert all(changed.get_submodule(name).sparsifier == "paper" for name in expected)


def test_apply_to_all_linear_layers_and_reload() -> None:
    changed = apply_snell(model(), 4, 0.5)
    assert len(adapted_names(changed)) == 7
    with torch.no_grad():
        for p in changed.parameters():
            if p.requires_grad:
                p.mul_(2)
    again = model()
    fresh = apply_snell(copy.deepcopy(again), 4, 0.1)
    result = fresh.load_state_dict(snell_state_dict(changed), strict=False)
    assert result.unexpected_keys == []
    x = torch.randn(3, 8)
    assert torch.equal(fresh["layers"][0](x), changed["layers"][0](x))
    assert fresh.load_state_dict(again.state_dict(), strict=False).unexpected_keys == []  # the frozen model's own file


def test_apply_keeps_shared_layers_shared() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.append(net[0])
    changed = apply_snell(net, 2)
    assert changed[0] is changed[2]


def test_apply_errors() -> None:
    with pytest.raises(ValueError, match=r"target_modules \['nope'\] match no module"):
        apply_snell(model(), target_modules=["nope"])
    with pytest.raises(TypeError, match=r"target module 'layers.0.norm' is a LayerNorm; only torch.nn.Linear"):
        apply_snell(model(), target_modules=["norm"])
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match=r"'attn.out_proj' is a NonDynamicallyQuantizableLinear"):
        apply_snell(attention, target_modules=["out_proj"])  # its owner reads the weight and would skip the branch


def test_torch_transformer_keeps_the_branch_in_evaluation() -> None:
    """TransformerEncoderLayer's inference path reads linear1.weight itself."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    apply_snell(encoder, 4, 0.5, ["linear1", "linear2"], scale=50.0)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = encoder(x)
    torch.testing.assert_close(fast, encoder(x).detach())


# --- SnellBudget -----------------------------------------------------------------------------------------------------
def test_budget_follows_the_reference() -> None:
    torch.manual_seed(0)
    net = apply_snell(nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 4)), 4, scale=1.0)
    layers = [net[0], net[2]]
    schedule = (0.01, 0.8, 2, 2)
    budget = SnellBudget(net, 10, init_warmup=2, final_warmup=2)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    averages = {p: (torch.zeros_like(p), torch.zeros_like(p)) for m in layers for p in (m.lora_in, m.lora_out)}
    for step in range(1, 11):
        optimizer.zero_grad()
        net(torch.randn(6, 8)).square().sum().backward()
        scores = []
        for m in layers:
            score = 0.0
            for p in (m.lora_in, m.lora_out):
                importance, uncertainty = averages[p]
                now = (p * p.grad).abs().detach()
                importance.mul_(0.85).add_(0.15 * now)
                uncertainty.mul_(0.85).add_(0.15 * (now - importance).abs())
                score += float((importance * uncertainty).mean())
            scores.append(score)
        budget.step()
        kept = budget_split(scores, [160, 80], budget_sparsity(step, 10, *schedule))
        for m, share, entries in zip(layers, kept, (160, 80), strict=True):
            assert m.sparsity == pytest.approx(min(1 - share / entries, 1 - 1 / entries), abs=1e-5)
        optimizer.step()
    copied = SnellBudget(layers, 10, init_warmup=2, final_warmup=2)
    copied.load_state_dict(budget.state_dict())
    assert copied.steps == 10
    assert torch.equal(copied._averages[1][0][1], budget._averages[1][0][1])


def test_budget_errors() -> None:
    net = apply_snell(nn.Sequential(nn.Linear(8, 20)), 4)
    with pytest.raises(ValueError, match="there is no SnellLinear layer"):
        SnellBudget(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match=r"initial must be in \[0, 1\), got 1"):
        SnellBudget(net, 4, initial=1.0)
    with pytest.raises(ValueError, match="target must be"):
        SnellBudget(net, 4, target=-1.0)
    with pytest.raises(ValueError, match="betas must be"):
        SnellBudget(net, 4, betas=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"total_steps \(4\) must exceed init_warmup \+ final_warmup \(2 \+ 2\)"):
        SnellBudget(net, 4, init_warmup=2, final_warmup=2)


# --- 6: learning -----------------------------------------------------------------------------------------------------
class Lora(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.a.t() @ self.b.t()


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float = 1e-3) -> float:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return F.cross_entropy(net(x), y).item()


def test_6_learns_new_digits_better_than_lora_at_small_steps() -> None:
    """A 64-128-10 network that knows 0 to 4 learns 5 to 9: rank 8, scale 1, 300 full-batch Adam steps at lr 1e-3."""
    table = torch.tensor(
        [[float(v) for v in line.split(",")] for line in DIGITS.read_text().splitlines()[1:] if line.strip()]
    )
    x, y = table[:, :-1] / 16, table[:, -1].long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    known = y < 5
    train(net, x[known], y[known], 200, 1e-2)
    new_x, new_y = x[~known], y[~known]
    losses = {}
    for sparsity in (0.0, 0.5, 0.9):
        adapted = apply_snell(copy.deepcopy(net), 8, sparsity, scale=1.0, seed=1)
        losses[sparsity] = train(adapted, new_x, new_y, 300)
    lora = copy.deepcopy(net)
    torch.manual_seed(0)
    lora[0], lora[2] = Lora(lora[0], 8), Lora(lora[2], 8)
    assert min(losses.values()) < train(lora, new_x, new_y, 300)


def test_6_fits_a_sparse_matrix_better_than_a_product() -> None:
    """Paper, Fig. 4a: a random sparse 32 x 32 target, rank 8, 2000 Adam steps at lr 1e-2."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(32, 32, generator=generator) * (torch.rand(32, 32, generator=generator) < 0.1)
    torch.manual_seed(0)

    def fit(parameters: list[Tensor], matrix: Any) -> float:
        optimizer = torch.optim.Adam(parameters, 1e-2)
        for _ in range(2000):
            optimizer.zero_grad()
            loss = (matrix() - target).square().mean()
            loss.backward()
            optimizer.step()
        return (matrix() - target).square().mean().item()

    a, b = (torch.rand(2, 32, 4).requires_grad_() for _ in range(2))
    eye = torch.eye(32)
    kernel = fit([a, b], lambda: ops.snell_linear(eye, a, b, 1.0, 0.0, sparsifier="none")[0])
    left, right = torch.randn(32, 8).requires_grad_(), torch.randn(8, 32).requires_grad_()
    assert kernel < fit([left, right], lambda: left @ right)
