"""What every optimizer is held to: each test runs over all rows and variants of tests/optim_db.json.

A test that cannot apply to a row stands in NOT_APPLICABLE with its reason. "python" and "cpp" are the two faces of the
same optimizer; where both run, they must agree to the bit.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_ext import _C, optim
from torch_ext.testing import LANGUAGES, Case, bits, cases, cpp_optimizer

HALF = "finite differences need float32 or float64: half precision loses the difference (its own test: refused)"
NOT_APPLICABLE: dict[tuple[str, str, str], str] = {
    ("test_half_precision_follows_float64", "AdaHessian", "finite_difference"): HALF,
    ("test_half_precision_state_is_float32_through_load", "AdaHessian", "finite_difference"): HALF,
    ("test_mixed_dtypes_equal_separate_optimizers", "AdaHessian", "finite_difference"): HALF,
    ("test_grad_scaler", "AdaHessian", "finite_difference"): "needs a closure, GradScaler works on .grad",
    ("test_grad_scaler_unscaled", "AdaHessian", "finite_difference"): "needs a closure, GradScaler works on .grad",
    ("test_grad_path_equals_closure", "AdaHessian", "finite_difference"): "needs a closure",
    ("test_expanded_gradient", "AdaHessian", "finite_difference"): "rounds differently with the order of summation",
    ("test_mixed_dtypes_equal_separate_optimizers", "MFAC", "*"): "one Fisher matrix couples all parameters",
    ("test_groups_share_one_step", "MFAC", "together"): 'blocks="per_group": its Fisher matrix follows the groups',
}
#: ALFLB moves float32 biases [E] by counts: what concerns gradients, other dtypes, shapes and layouts does not apply.
#: tests/python/optim/test_alflb.py has its own versions of what does.
for _test in (
    "test_complex_parameters_are_refused",
    "test_default_dtype_does_not_matter",
    "test_duplicate_parameters",
    "test_expanded_gradient",
    "test_expanded_parameter_is_refused",
    "test_grad_path_equals_closure",
    "test_grad_scaler",
    "test_grad_scaler_unscaled",
    "test_half_precision_follows_float64",
    "test_half_precision_state_is_float32_through_load",
    "test_integer_parameters_are_never_touched",
    "test_layouts_equal_contiguous",
    "test_mixed_dtypes_equal_separate_optimizers",
    "test_no_gradients_is_no_step",
    "test_non_finite_gradient_only_counts",
    "test_one_and_two_threads_are_equal",
    "test_options_per_group",
    "test_parameter_without_gradient_is_left_alone",
    "test_parameters_keep_their_identity",
    "test_sparse_gradients_are_refused",
    "test_version_counters",
    "test_zero_dim_and_zero_size_parameters",
    "test_zero_gradients_move_nothing",
):
    NOT_APPLICABLE[_test, "ALFLB", "*"] = "it reads counts, no gradients"
for _test, _reason in (
    ("test_global_options_of_a_loaded_dict_reach_new_groups", "it has no option that all groups share"),
    ("test_state_bytes_are_as_documented", "float32 biases only: test_state_memory of its own"),
    ("test_copies_continue_alike", "its copies keep their routers: test_copies_stay_connected of its own"),
):
    NOT_APPLICABLE[_test, "ALFLB", "*"] = _reason
for _variant in ("proportional", "proportional_decreasing"):
    NOT_APPLICABLE["test_hooks_run_in_order", "ALFLB", _variant] = "its closure is no loss that could tell K"
for _name in ("Eggroll", "MeZO"):
    for _test, _reason in {
        "test_no_gradients_is_no_step": "reads no gradients",
        "test_expanded_gradient": "reads no gradients",
        "test_sparse_gradients_are_refused": "reads no gradients",
        "test_grad_path_equals_closure": "reads no gradients",
        "test_grad_scaler": "reads no gradients",
        "test_grad_scaler_unscaled": "reads no gradients",
        "test_parameter_without_gradient_is_left_alone": "moves all that it is given (its own test: what is frozen)",
        "test_layouts_equal_contiguous": "every bit of a loss counts, and its sum follows the layout (its own test)",
        "test_mixed_dtypes_equal_separate_optimizers": "losses couple all parameters",
        "test_one_and_two_threads_are_equal": "the loss's own sum may depend on the threads (its own test)",
        "test_half_precision_follows_float64": "perturbed parameters are rounded, so their losses differ",
    }.items():
        NOT_APPLICABLE[_test, _name, "*"] = _reason
NOT_APPLICABLE["test_non_finite_gradient_only_counts", "Eggroll", "*"] = "an error, or the worst value (its own test)"
NOT_APPLICABLE["test_one_cycle_lr", "MeZO", "*"] = "torch's OneCycleLR wants a momentum"
NOT_APPLICABLE["test_one_cycle_lr", "Eggroll", "*"] = "its momentum of 0.95 does not descend in twelve noisy steps"
NAMES = list(dict.fromkeys(c.optimizer for c in cases()))
COUNTERS = ("global_calls", "global_skipped")

#: Bytes of state of a parameter beside those of the optimizer and of a window, from its docstring.
STATE_BYTES: dict[str, Callable[[Tensor, dict[str, Any]], int]] = {
    "AdaHessian": lambda p, o: (p.numel() + p.numel() // adahessian_block(p, o)) * max(4, p.element_size()) + 4 + 16,
    "MFAC": lambda p, o: 4 + (p.numel() * max(4, p.element_size()) if o["momentum"] else 0),
    "Eggroll": lambda p, o: 4 + (p.numel() * max(4, p.element_size()) if o["momentum"] else 0),
    "MeZO": lambda p, o: 4,
}
#: A state tensor that has the parameter's shape, if the optimizer keeps it.
#: Of parameters that are made without a problem.
DTYPE = {"ALFLB": torch.float32}
OWN_STATE = {
    "AdaHessian": "exp_avg",
    "MFAC": "momentum_buffer",
    "ALFLB": "last_load",
    "Eggroll": "momentum_buffer",
    "MeZO": "step",
}
#: Options that keep large tensors affordable.
LARGE: dict[str, dict[str, Any]] = {"AdaHessian": {}, "MFAC": {"num_grads": 4}, "Eggroll": {}, "MeZO": {}}
#: Options with which a few steps make a loss without noise smaller, whatever the variant.
STEADY: dict[str, dict[str, Any]] = {"AdaHessian": {}, "MFAC": {"damping": 1.0}, "Eggroll": {}, "MeZO": {}}


def adahessian_block(p: Tensor, options: dict[str, Any]) -> int:
    if p.dim() == 2:
        return {"none": 1, "row": p.size(1), "block": options["block_size"]}[options["linear_averaging"]]
    return math.prod(p.shape[2:]) if p.dim() > 2 and options["average_conv"] else 1


# ---- helpers


def started(case: Case, language: str = "python", **overrides: Any) -> tuple[dict[str, Tensor], Any, Any]:
    params, loss = case.start()
    return params, loss, case.make(language, list(params.values()), **overrides)


def quartic(params: list[Tensor]) -> Callable[[], Tensor]:
    """A separable smooth loss of tensors of any dtype and layout: its Hessian is diagonal."""
    wide = [torch.linspace(0.5, 2.0, p.numel(), dtype=torch.float64).reshape(p.shape) for p in params]

    def loss() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for p, a in zip(params, wide, strict=True):
            x = p.double()
            total = total + (a * (x - 0.25) ** 2 + 0.1 * x**4).sum()
        return total

    return loss


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def of_layout(values: Tensor, layout: str) -> Tensor:
    """A leaf with these values in other strides."""
    values = values.detach()
    if layout == "transposed" and values.dim() == 2:
        result = values.t().contiguous().t()
    elif layout == "channels_last" and values.dim() == 4:
        result = values.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced" and values.dim() > 0:
        base = torch.zeros([2 * s + 1 for s in values.shape], dtype=values.dtype)
        result = base[tuple(slice(1, None, 2) for _ in values.shape)]
        result.copy_(values)
    else:
        result = values.clone()
    return result.requires_grad_()


def everything(params: dict[str, Tensor] | list[Tensor], optimizer: Any) -> Any:
    """Bits of parameters and state."""
    return bits([params, optimizer.state_dict()["state"]])


def is_shared(name: str) -> bool:
    """State that is not the parameter's own."""
    return name.startswith(("global_", "window_"))


def without_counters(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What a skipped step may not change: of a window neither the slot that it scratched in nor the counts of rows."""
    state = {i: {k: v for k, v in s.items() if k not in COUNTERS} for i, s in state_dict["state"].items()}
    for own in state.values():
        if "window_ring" not in own:
            continue
        ring = own["window_ring"] = own["window_ring"].clone()
        ring[4:6] = 0  # the last row's fate, rejected rows in total
        for name in ("window_rows", "window_scales", "window_indices"):
            if own[name].dim() > 1:
                own[name] = own[name].clone()
                own[name][:, ring[1]] = 0
        if own["window_error"].dim() > 1:  # the half that the next accepted row takes
            own["window_error"] = own["window_error"].clone()
            own["window_error"][1 - ring[8] % 2] = 0
    return {**state_dict, "state": state}


# ---- options and construction


def bad_options() -> list[tuple[str, dict[str, Any], str, type[Exception]]]:
    """The table's own rows, and for every number of every optimizer NaN, infinities and wrong types."""
    from torch_ext.testing.make_optim_db import PATH

    found: list[tuple[str, dict[str, Any], str, type[Exception]]] = []
    table = json.loads(PATH.read_text())
    for name, row in table.items():
        found += [(name, options, word, ValueError) for options, word in row["options_bad"]]
        for field in _C.schema(name)["fields"]:
            key, kind = field["name"], field["type"]
            if "float" in kind:
                for bad in (math.nan, -math.inf):
                    found.append((name, {key: (bad, 0.5) if "tuple" in kind else bad}, key, ValueError))
            if kind == "float":
                found.append((name, {key: math.inf}, key, ValueError))
                found.append((name, {key: None}, key, TypeError))
            if kind == "tuple[float, float]":
                found += [(name, {key: (0.9, math.nan)}, key, ValueError), (name, {key: (0.9,)}, key, ValueError)]
            wrong: Any = 1 if kind in ("str", "str | None", "bool") else "1"
            found.append((name, {key: wrong}, key, TypeError))
            if kind == "int":
                found += [(name, {key: 1.5}, key, TypeError), (name, {key: True}, key, TypeError)]
    return found


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("name", "options", "word", "error"), bad_options(), ids=str)
def test_bad_options(language: str, name: str, options: dict[str, Any], word: str, error: type[Exception]) -> None:
    params = inputs((4, 6), (2, 3, 2, 2), (4,))
    case = next(c for c in cases() if c.optimizer == name)

    def construct_and_step() -> None:  # a block size that does not divide is known with the parameter
        case.step(case.make(language, params, **options), quartic(params))

    with pytest.raises(error, match=word):
        construct_and_step()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NAMES)
def test_zero_learning_rate_is_allowed(language: str, name: str) -> None:
    case = next(c for c in cases() if c.optimizer == name)
    params, loss, optimizer = started(case, language, lr=0.0)
    before = bits(params)
    case.run(optimizer, loss, 2)
    assert bits(params) == before


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_refused(name: str) -> None:
    for language in LANGUAGES:
        with pytest.raises(TypeError, match="learning_rate"):
            next(c for c in cases() if c.optimizer == name).make(language, inputs((2,)), learning_rate=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_params_that_are_no_parameters(name: str) -> None:
    make = getattr(optim, name)
    (p,) = inputs((2,), dtype=DTYPE.get(name, torch.float64))
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        make(p)
    with pytest.raises(TypeError, match="not iterable"):
        make(3)
    with pytest.raises(TypeError, match="can only optimize Tensors, but one of the params is str"):
        make(["weight"])
    with pytest.raises(TypeError, match="ordered collections"):
        make([{"params": {p}}])
    with pytest.raises(TypeError, match="must be a dict"):
        make([p]).add_param_group([p])
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(ValueError, match="non-leaf"):
        make([p * 2])
    with pytest.raises(ValueError, match="non-leaf"):
        cpp_optimizer(name, [p * 2])
    with pytest.raises(ValueError, match="no parameters"):
        cpp_optimizer(name, [{"params": []}]).step(lambda: p.sum())


@pytest.mark.parametrize("name", NAMES)
def test_duplicate_parameters(name: str) -> None:
    a, b = inputs((2,), (3,))
    case = next(c for c in cases() if c.optimizer == name)
    for language in LANGUAGES:
        with pytest.raises(ValueError, match="more than once"):
            case.make(language, [a, b, a])
        with pytest.raises(ValueError, match=r"more than (one|once)"):
            case.make(language, [{"params": [a]}, {"params": [b, a]}])
        optimizer = case.make(language, [a])
        with pytest.raises(ValueError, match=r"more than (one|once)"):
            optimizer.add_param_group({"params": [a]})
        optimizer.add_param_group({"params": [b]})
        case.run(optimizer, quartic([a, b]), 1)


@pytest.mark.parametrize("name", NAMES)
def test_global_options_cannot_differ(name: str) -> None:
    other = {"seed": 1, "n_samples": 2, "update_each": 2, "hvp": "finite_difference"}
    other |= {"num_grads": 2, "damping": 0.5, "window_format": "topk", "topk": 0.5, "error_feedback": True}
    other |= {
        "warmup_scaling": True,
        "warmup_steps": 2,
        "blocks": "per_group",
        "window_device": "cpu",
        "maximize": True,
        "sigma": 0.5,
        "rank": 2,
        "population": 12,
        "antithetic": False,
        "group_size": 4,
        "noise_reuse": 2,
        "shaping": "raw",
        "temperature": 2.0,
        "noise": "rademacher",
        "update_scale": "paper",
        "nonfinite": "min",
        "chunk_members": 2,
        "eps": 0.5,
    }
    lossy = {"error_feedback": {"window_format": "int8"}}
    case = next(c for c in cases() if c.optimizer == name)
    for field in _C.schema(name)["fields"]:
        if not field["global"]:
            continue
        for language in LANGUAGES:
            a, b = inputs((2,), (3,))
            groups = [{"params": [a]}, {"params": [b], field["name"]: other[field["name"]]}]
            with pytest.raises(ValueError, match=f"option {field['name']} is the same for all parameters"):
                case.make(language, groups, **lossy.get(field["name"], {}))


@pytest.mark.parametrize("name", NAMES)
def test_global_options_of_a_loaded_dict_reach_new_groups(name: str) -> None:
    case = next(c for c in cases() if c.optimizer == name)
    option = {"AdaHessian": "seed", "MFAC": "num_grads", "Eggroll": "seed", "MeZO": "seed"}[name]
    (a,) = inputs((2,))
    saved = case.make("python", [a], **{option: 5}).state_dict()
    for language in LANGUAGES:
        a, b = inputs((2,), (3,))
        optimizer = case.make(language, [a])
        optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": [b]})
        assert [group[option] for group in optimizer.state_dict()["param_groups"]] == [5, 5]


def test_named_parameters(case: Case) -> None:
    params, loss, plain = started(case)
    named_params, named_loss = case.start()
    named = case.make("python", named_params.items())
    case.run(plain, loss, 4)
    case.run(named, named_loss, 4)
    assert bits(params) == bits(named_params)
    saved = named.state_dict()
    assert saved["param_groups"][0]["param_names"] == list(params)
    with pytest.raises(ValueError, match="names"):
        case.make("python", [("a", torch.ones(2, requires_grad=True)), torch.ones(2, requires_grad=True)])
    _, _, cpp = started(case, "cpp")
    cpp.load_state_dict(saved)  # keys that C++ does not know are carried along
    assert cpp.state_dict()["param_groups"][0]["param_names"] == list(params)


def test_tensor_lr(case: Case) -> None:
    lr = float(case.options.get("lr", 0.125))
    params, loss, optimizer = started(case, lr=lr)
    tensor_params, tensor_loss, tensor = started(case, lr=torch.tensor(lr, dtype=torch.float64))
    case.run(optimizer, loss, 3)
    case.run(tensor, tensor_loss, 3)
    assert isinstance(tensor.param_groups[0]["lr"], Tensor)
    optimizer.param_groups[0]["lr"] = lr / 2
    tensor.param_groups[0]["lr"].fill_(lr / 2)
    case.run(optimizer, loss, 3)
    case.run(tensor, tensor_loss, 3)
    assert bits(params) == bits(tensor_params)
    with pytest.raises(ValueError, match="one element"):
        started(case, lr=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="lr"):
        started(case, lr=torch.tensor(math.nan))
    assert started(case, lr=torch.tensor([lr]))[2].param_groups[0]["lr"].shape == (1,)


def test_repr(case: Case) -> None:
    text = repr(started(case)[2])
    assert case.optimizer in text
    for field in _C.schema(case.optimizer)["fields"]:
        assert f"{field['name']}: " in text


# ---- trajectories


def test_trajectory_in_both_languages(case: Case) -> None:
    """1001 float64 steps: the reference's values, and the same bits from both languages, state included."""
    params, loss, python = started(case)
    cpp_params, cpp_loss, cpp = started(case, "cpp")
    expected = case.trajectory
    sample = 0
    for i in range(expected["iterations"][-1] + 1):
        value, cpp_value = case.step(python, loss), case.step(cpp, cpp_loss)
        assert value.item() == cpp_value.item()
        if i != expected["iterations"][sample]:
            continue
        assert everything(params, python) == everything(cpp_params, cpp), f"languages differ at step {i}"
        scale = max(abs(v) for v in expected["loss"])
        assert value.item() * case.loss_sign == pytest.approx(expected["loss"][sample], rel=case.rtol * scale)
        for name, p in params.items():
            want = torch.tensor(expected["parameters"][name][sample], dtype=torch.float64)
            error = float((p.detach().reshape(-1) - want).abs().max() / want.abs().max())
            assert error <= case.rtol, f"{name} at step {i}"
        sample += 1
    assert sample == len(expected["iterations"])
    assert bits(python.state_dict()) == bits(cpp.state_dict())


def test_resume_across_languages(case: Case, tmp_path: Path) -> None:
    """C++ -> file -> Python -> file -> C++ is the straight run, to the bit; 7 steps end between two refreshes."""
    straight_params, straight_loss, straight = started(case)
    case.run(straight, straight_loss, 21)

    params, loss, cpp = started(case, "cpp")
    case.run(cpp, loss, 7)
    cpp.save_state_dict(str(tmp_path / "cpp.pt"))
    python = case.make("python", list(params.values()))
    python.load_state_dict(torch.load(tmp_path / "cpp.pt", weights_only=True))
    case.run(python, loss, 7)
    torch.save(python.state_dict(), tmp_path / "python.pt")
    again = case.make("cpp", list(params.values()))
    again.load_state_dict_file(str(tmp_path / "python.pt"))
    case.run(again, loss, 7)

    assert bits(params) == bits(straight_params)
    assert bits(again.state_dict()) == bits(straight.state_dict())


def test_equal_runs_are_equal(case: Case) -> None:
    outcomes = []
    for _ in range(2):
        params, loss, optimizer = started(case)
        case.run(optimizer, loss, 20)
        outcomes.append(everything(params, optimizer))
    assert outcomes[0] == outcomes[1]


def test_one_and_two_threads_are_equal(case: Case) -> None:
    """Tensors above the chunk of 65536 elements; a loss that only has elementwise gradients."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = inputs((3, 66000), (30, 20, 9, 27), (70001,), dtype=torch.float32)
        optimizer = case.make("python", params, **LARGE[case.optimizer])
        loss = quartic(params)
        case.run(optimizer, loss, 3)
        results.append(everything(params, optimizer))
    assert results[0] == results[1]


# ---- layouts


@pytest.mark.parametrize("layout", ["transposed", "sliced", "channels_last"])
def test_layouts_equal_contiguous(case: Case, layout: str) -> None:
    """Gradients arrive contiguous, then in the parameter's own layout."""
    for own in (False, True):
        outcomes = []
        for kind in ("contiguous", layout):
            start = case.start()[0].values()
            params = [of_layout(p, kind) for p in start]
            strides = [p.stride() for p in params]
            optimizer = case.make("python", params, **STEADY[case.optimizer])
            loss = quartic(params) if own else quartic_of_contiguous(params)
            case.run(optimizer, loss, 8)
            assert [p.stride() for p in params] == strides
            outcomes.append((params, optimizer, loss().item()))
        (a, opt_a, loss_a), (b, opt_b, _) = outcomes
        assert loss_a < quartic([leaf(p) for p in case.start()[0].values()])().item()
        assert everything(a, opt_a) == everything(b, opt_b)


def quartic_of_contiguous(params: list[Tensor]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        return quartic([p.contiguous() for p in params])()

    return loss


def test_expanded_gradient(case: Case) -> None:
    """The gradient of sum(p)^2 is one number in all places, stride 0."""
    outcomes = []
    for expanded in (True, False):
        params = [leaf(p) for p in case.start()[0].values()]
        optimizer = case.make("python", params)
        ones = [torch.ones_like(p) for p in params]

        def loss(params: list[Tensor] = params, ones: list[Tensor] = ones, expanded: bool = expanded) -> Tensor:
            sums = [(p if expanded else p * one).sum() for p, one in zip(params, ones, strict=True)]
            return torch.stack([s * s for s in sums]).sum() * 0.5

        case.run(optimizer, loss, 5)
        outcomes.append(everything(params, optimizer))
    assert outcomes[0] == outcomes[1]


def test_expanded_parameter_is_refused(case: Case) -> None:
    p = torch.zeros(1, 1).expand(4, 6).requires_grad_()
    optimizer = case.make("python", [p])
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \[4, 6\]\) is expanded"):
        case.step(optimizer, quartic([p]))


def test_zero_dim_and_zero_size_parameters(case: Case) -> None:
    for language in LANGUAGES:
        params = inputs((4, 6), (0,), (3, 0), (2, 3, 0, 2), ())
        optimizer = case.make(language, params, **STEADY[case.optimizer])
        before = quartic(params)().item()
        case.run(optimizer, quartic(params), 4)
        assert quartic(params)().item() < before


# ---- schedulers and groups


def test_step_lr(case: Case) -> None:
    lr = float(case.options.get("lr", 0.1))
    params, loss, optimizer = started(case, lr=lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    cpp_params, cpp_loss, cpp = started(case, "cpp", lr=lr)
    used = []
    for t in range(9):
        used.append(optimizer.param_groups[0]["lr"])
        cpp.set_option(0, "lr", used[-1])
        case.step(optimizer, loss)
        case.step(cpp, cpp_loss)
        scheduler.step()
        assert used[-1] == lr * 0.5 ** (t // 3)
    assert bits(params) == bits(cpp_params)


def test_reduce_lr_on_plateau(case: Case) -> None:
    _, loss, optimizer = started(case, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for _ in range(10):
        case.step(optimizer, loss)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-9, abs=1e-8)


def test_one_cycle_lr(case: Case) -> None:
    _, loss, optimizer = started(case)
    max_lr = 0.2 if case.optimizer == "AdaHessian" else 2 * optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=12)
    before, rates, momenta = loss().item(), [], []
    for _ in range(12):
        case.step(optimizer, loss)
        rates.append(optimizer.param_groups[0]["lr"])
        group = optimizer.param_groups[0]
        momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        if len(rates) < 12:
            scheduler.step()
    assert 0.95 * max_lr < max(rates) <= max_lr
    assert rates[-1] < rates[0]
    assert min(momenta) == pytest.approx(0.85, abs=0.02)
    assert loss().item() < before


def test_options_per_group(case: Case) -> None:
    """lr 0 and 1e-28 leave their parameters to the bit; weight decay reaches its own group only."""
    for language in LANGUAGES:
        params = inputs((4, 6), (2, 3, 2, 2), (4,))
        groups = [{"params": [params[0]], "lr": 1e-28}, {"params": [params[1]]}, {"params": [params[2]], "lr": 0.0}]
        optimizer = case.make(language, groups)
        before = bits(params)
        case.run(optimizer, quartic(params), 3)
        after = bits(params)
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]

        params = inputs((4, 6), (4, 6))
        start = [p.detach().clone() for p in params]
        groups = [{"params": [params[0]], "weight_decay": 0.5}, {"params": [params[1]], "weight_decay": 0.0}]
        decoupled = {"decoupled_weight_decay": True} if case.optimizer == "MFAC" else {}
        optimizer = case.make(language, groups, lr=0.1, **decoupled)
        case.step(optimizer, lambda params=params: sum((p * 0).sum() for p in params))
        torch.testing.assert_close(params[0].detach(), start[0] * 0.95)
        assert torch.equal(params[1], start[1])


def test_groups_share_one_step(case: Case) -> None:
    """Splitting the parameters over groups changes nothing."""
    params, loss, optimizer = started(case)
    split, split_loss = case.start()
    groups = case.make("python", [{"params": [p]} for p in split.values()])
    cpp_split, cpp_loss = case.start()
    cpp = case.make("cpp", [{"params": [p]} for p in cpp_split.values()])
    for run in ((optimizer, loss), (groups, split_loss), (cpp, cpp_loss)):
        case.run(*run, 6)
    assert bits(params) == bits(split) == bits(cpp_split)
    assert bits(optimizer.state_dict()["state"]) == bits(groups.state_dict()["state"])


# ---- gradients that are missing or not accepted


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_gradients_is_no_step(case: Case, language: str) -> None:
    params, loss, optimizer = started(case, language)
    before = everything(params, optimizer)
    if case.options.get("hvp") != "finite_difference":
        assert optimizer.step() is None  # .grad is None everywhere
    other = torch.ones(2, dtype=torch.float64, requires_grad=True)
    case.step(optimizer, lambda: (other * other).sum())
    assert everything(params, optimizer) == before
    case.run(optimizer, loss, 2)


@pytest.mark.parametrize("language", LANGUAGES)
def test_zero_gradients_move_nothing(case: Case, language: str) -> None:
    params, _, optimizer = started(case, language, weight_decay=0.0)
    before = bits(params)
    for _ in range(3):
        case.step(optimizer, lambda: sum((p * 0).sum() for p in params.values()))
    assert bits(params) == before


@pytest.mark.parametrize("language", LANGUAGES)
def test_parameter_without_gradient_is_left_alone(case: Case, language: str) -> None:
    params, loss = case.start()
    frozen = torch.ones(3, dtype=torch.float64)
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = case.make(language, [frozen, unused, *params.values()], weight_decay=0.1)
    case.run(optimizer, loss, 3)
    assert frozen.tolist() == unused.tolist() == [1.0] * 3
    state = optimizer.state_dict()["state"]
    assert 1 not in state
    assert all(is_shared(key) for key in state.get(0, {}))


@pytest.mark.parametrize("language", LANGUAGES)
def test_complex_parameters_are_refused(case: Case, language: str) -> None:
    (real,) = inputs((3,))
    p = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    optimizer = case.make(language, [real, p])
    with pytest.raises(RuntimeError, match=rf"{case.optimizer} does not support complex parameters: parameter 1"):
        case.step(optimizer, lambda: (real**2).sum() + (p * p.conj()).real.sum())
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_sparse_gradients_are_refused(case: Case, language: str) -> None:
    (real,) = inputs((3,))
    embedding = torch.nn.Embedding(5, 6, sparse=True, dtype=torch.float64)
    optimizer = case.make(language, [real, embedding.weight])
    before = bits([real, embedding.weight])
    with pytest.raises(RuntimeError, match=rf"{case.optimizer} does not support sparse gradients: parameter 1"):
        case.step(optimizer, lambda: (real**2).sum() + embedding(torch.tensor([1, 2])).sum())
    assert bits([real, embedding.weight]) == before
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_integer_parameters_are_never_touched(case: Case, language: str) -> None:
    """They cannot require a gradient. (That the op refuses them is in the op's own test.)"""
    params, loss = case.start()
    integers = torch.arange(3)
    optimizer = case.make(language, [integers, *params.values()])
    case.run(optimizer, loss, 2)
    assert integers.tolist() == [0, 1, 2]


# ---- dtypes


def test_mixed_dtypes_equal_separate_optimizers(case: Case) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32)
    together = [inputs((4, 6), dtype=d)[0] for d in dtypes]
    optimizer = case.make("python", together)
    case.run(optimizer, quartic(together), 5)
    for p, dtype in zip(together, dtypes, strict=True):
        alone = inputs((4, 6), dtype=dtype)
        other = case.make("python", alone)
        case.run(other, quartic(alone), 5)  # the Hessian is diagonal: the probe's signs do not matter
        assert bits(p) == bits(alone[0])


def test_default_dtype_does_not_matter(case: Case) -> None:
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            params = inputs((4, 6), (2, 3, 2, 2), (4,), dtype=torch.float32)
            optimizer = case.make("python", params)
            case.run(optimizer, quartic(params), 5)
            results.append(bits([params, optimizer.state_dict()]))
        finally:
            torch.set_default_dtype(torch.float32)
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float64(case: Case, dtype: torch.dtype) -> None:
    """Within 2 ulp of the float64 optimizer whose parameters are rounded after each step.

    M-FAC takes the very gradients of the narrow one: nearly equal rows are nearly singular, so that the rounding of a
    gradient, which is no error of the optimizer, is far larger in a step.
    """
    narrow = inputs((4, 6), (2, 3, 2, 2), (4,), dtype=dtype)
    wide = [p.detach().double().requires_grad_() for p in narrow]
    a, b = case.make("python", narrow, lr=0.05), case.make("python", wide, lr=0.05)
    largest = [p.detach().abs() for p in wide]  # the rounding errors of a path have this scale
    for _ in range(10):
        case.step(a, quartic(narrow))
        if case.optimizer == "MFAC":
            for p, q in zip(wide, narrow, strict=True):
                p.grad = q.grad.double()
            b.step()
        else:
            case.step(b, quartic(wide))
        with torch.no_grad():
            for i, p in enumerate(wide):
                p.copy_(p.to(dtype))
                largest[i] = torch.maximum(largest[i], p.abs()).clamp_min(2.0**-3)
    for p, q, size in zip(narrow, wide, largest, strict=True):
        ulp = torch.finfo(dtype).eps * 2.0 ** size.log2().floor()
        assert bool(((p.double() - q).abs() <= 2 * ulp).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_state_is_float32_through_load(case: Case, dtype: torch.dtype) -> None:
    params = inputs((4, 6), (2, 3, 2, 2), (4,), dtype=dtype)
    straight = [leaf(p) for p in params]
    case.run(case.make("python", straight), quartic(straight), 8)
    for language in LANGUAGES:
        copies = [leaf(p) for p in params]
        optimizer = case.make("python", copies)
        case.run(optimizer, quartic(copies), 4)
        again = case.make(language, copies)
        again.load_state_dict(optimizer.state_dict())
        for state in again.state_dict()["state"].values():
            own = {v.dtype for k, v in state.items() if not k.startswith("window_")}
            assert own <= {torch.float32, torch.float64, torch.int64}
        assert bits(again.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
        case.run(again, quartic(copies), 4)
        assert bits(copies) == bits(straight)


# ---- state


def test_state_bytes_are_as_documented(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        params = inputs((12, 24), (4, 3, 3, 3), (12,), dtype=dtype)
        optimizer = case.make("python", params)
        case.run(optimizer, quartic(params), 2)
        options = optimizer.param_groups[0]
        for p in params:
            state = {k: v for k, v in optimizer.state[p].items() if not is_shared(k)}
            size = sum(v.untyped_storage().nbytes() for v in state.values())
            assert size == STATE_BYTES[case.optimizer](p, options)


def test_state_has_the_fields_of_the_table(case: Case) -> None:
    params, loss, optimizer = started(case)
    case.run(optimizer, loss, 2)
    fields = {f["name"]: f for f in _C.schema(case.optimizer)["state"]}
    dtypes = {"arithmetic": torch.float64, "float32": torch.float32, "float64": torch.float64, "int64": torch.int64}
    first = optimizer.state[next(iter(params.values()))]
    group = optimizer.param_groups[0]
    unused = {"momentum_buffer"} if group.get("momentum") == 0 or group.get("rule", "momentum") != "momentum" else set()
    assert set(first) == set(fields) - unused
    for name, value in first.items():
        assert fields[name]["dtype"] == "stored" or value.dtype == dtypes[fields[name]["dtype"]]
        assert not value.requires_grad
    assert (first["step"].dim(), first["step"].item()) == (0, 2.0)


def test_load_does_not_change_its_argument(case: Case) -> None:
    _, loss, optimizer = started(case)
    case.run(optimizer, loss, 3)
    for language in LANGUAGES:
        saved = copy.deepcopy(optimizer.state_dict())
        before = bits(saved)
        _, other_loss, other = started(case, language)
        other.load_state_dict(saved)
        assert bits(saved) == before
        case.run(other, other_loss, 3)
        assert bits(saved) == before


def test_clone_by_state_dict(case: Case) -> None:
    params, loss, optimizer = started(case)
    case.run(optimizer, loss, 7)
    clones, clone_loss = case.start()
    with torch.no_grad():
        for name, p in clones.items():
            p.copy_(params[name])
    clone = case.make("python", list(clones.values()))
    clone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(8):
        case.step(optimizer, loss)
        case.step(clone, clone_loss)
    assert bits(params) == bits(clones)
    assert bits(optimizer.state_dict()) == bits(clone.state_dict())


@pytest.mark.parametrize("language", LANGUAGES)
def test_older_state_dict(case: Case, language: str) -> None:
    """Without the options, the state and the header that later versions added; `step` as a number."""
    params, loss, optimizer = started(case)
    case.run(optimizer, loss, 6)
    old = copy.deepcopy(optimizer.state_dict())
    del old["torch_ext"]
    old["param_groups"] = [{"params": g["params"], "lr": g["lr"]} for g in old["param_groups"]]
    for state in old["state"].values():
        state.pop("bias_products", None)
        state["step"] = float(state["step"])
    other = case.make(language, list(params.values()))
    other.load_state_dict(old)
    copies, _ = case.start()
    with torch.no_grad():
        for name, p in copies.items():
            p.copy_(params[name])
    case.step(other, loss)
    after = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(copies[name])
    case.step(optimizer, loss)
    for name, p in params.items():  # beta^t by pow instead of by products
        torch.testing.assert_close(after[name], p.detach(), rtol=1e-12, atol=1e-14)
    assert isinstance(other.state_dict()["state"][0]["step"], Tensor)


@pytest.mark.parametrize("step", [5, 5.0, torch.tensor(5.0, dtype=torch.float64), torch.tensor(5)])
def test_numeric_step(case: Case, step: Any) -> None:
    params, loss, optimizer = started(case)
    case.run(optimizer, loss, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = step
    for language in LANGUAGES:
        other = case.make(language, list(params.values()))
        other.load_state_dict(saved)
        assert bits(other.state_dict()["state"]) == bits(optimizer.state_dict()["state"])


def test_weights_only_file(case: Case, tmp_path: Path) -> None:
    _, loss, optimizer = started(case)
    case.run(optimizer, loss, 3)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    assert bits(torch.load(tmp_path / "a.pt", weights_only=True)) == bits(optimizer.state_dict())
    started(case, "cpp")[2].load_state_dict_file(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(case: Case, how: str) -> None:
    params, loss, optimizer = started(case)
    case.run(optimizer, loss, 4)
    pair = (list(params.values()), optimizer)
    copies, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert type(twin) is type(optimizer)
    assert twin.defaults == optimizer.defaults
    assert bits(twin.state_dict()) == bits(optimizer.state_dict())
    assert twin.process_group is None
    assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(twin) if k[0] != "_"}
    case.run(optimizer, quartic(pair[0]), 4)
    case.run(twin, quartic(copies), 4)
    assert everything(copies, twin) == everything(pair[0], optimizer)


@pytest.mark.parametrize("language", LANGUAGES)
def test_unfit_state_dicts_change_nothing(case: Case, language: str) -> None:
    params, loss, optimizer = started(case, language)
    case.run(optimizer, loss, 3)
    good = optimizer.state_dict()
    before = bits([params, good])

    def edited(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        bad = copy.deepcopy(good)
        change(bad)
        return bad

    bad = {
        "is of Other, not of": edited(lambda d: d["torch_ext"].update(optimizer="Other")),
        "format version 99": edited(lambda d: d["torch_ext"].update(format_version=99)),
        "2 parameter groups": edited(lambda d: d["param_groups"].append(d["param_groups"][0])),
        "2 parameters in group 0": edited(lambda d: d["param_groups"][0].update(params=[0, 1])),
        "lr": edited(lambda d: d["param_groups"][0].update(lr=-1.0)),
        "has no 'param_groups'": edited(lambda d: d.pop("param_groups")),
    }
    own = OWN_STATE[case.optimizer]
    bad[own] = edited(lambda d: d["state"][2].update({own: torch.zeros(3)}))
    for message, value in bad.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(value)
        assert bits([params, optimizer.state_dict()]) == before
    case.run(optimizer, loss, 1)


# ---- hooks


def test_hooks_run_in_order(case: Case) -> None:
    _, loss, optimizer = started(case)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [
        optimizer.register_step_pre_hook(note("step pre 1")),
        optimizer.register_step_pre_hook(note("step pre 2")),
        optimizer.register_step_post_hook(note("step post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_state_dict_pre_hook(note("state pre")),
        optimizer.register_state_dict_post_hook(note("state post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]

    def closure() -> Tensor:
        calls.append("closure")
        return loss()

    case.step(optimizer, closure)
    assert calls.count("closure") >= 1
    calls = [c for c in calls if c != "closure"]
    assert calls == ["global pre", "step pre 1", "step pre 2", "step post", "global post"]
    calls = []
    for handle in handles:
        handle.remove()
    case.step(optimizer, loss)
    assert calls == []


def test_state_dict_hooks(case: Case) -> None:
    params, loss, optimizer = started(case)
    case.run(optimizer, loss, 2)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, d: calls.append("post") or {**d, "mine": 1})
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    assert calls == ["pre", "post"]

    calls.clear()
    other = case.make("python", list(params.values()))

    def wrapped(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("load pre")
        return state_dict["inside"]

    other.register_load_state_dict_pre_hook(wrapped)
    other.register_load_state_dict_post_hook(
        lambda o: calls.append(f"load post {o.state_dict()['state'][0]['step'].item():.0f}")
    )
    other.load_state_dict({"inside": saved})
    assert calls == ["load pre", "load post 2"]
    assert bits(other.state_dict()["state"]) == bits(saved["state"])


# ---- bad steps change nothing


@pytest.mark.parametrize("language", LANGUAGES)
def test_throwing_closure_changes_nothing(case: Case, language: str) -> None:
    params, loss, optimizer = started(case, language)
    case.run(optimizer, loss, 3)
    before = bits([params, optimizer.state_dict(), [p.grad is None for p in params.values()]])

    def fails() -> Tensor:
        loss()
        raise KeyError("my own error")

    with pytest.raises(KeyError, match="my own error"):
        case.step(optimizer, fails)
    assert bits([params, optimizer.state_dict(), [p.grad is None for p in params.values()]]) == before
    straight_params, straight_loss, straight = started(case, language)
    case.run(straight, straight_loss, 5)
    case.run(optimizer, loss, 2)
    assert everything(params, optimizer) == everything(straight_params, straight)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_only_counts(case: Case, language: str, bad: float) -> None:
    """At the first step, at a refresh and between refreshes."""
    params, loss, optimizer = started(case, language)
    skipped = 0
    for t in range(8):
        if t in (0, 2, 5, 6):
            before = bits([params, without_counters(optimizer.state_dict())["state"]])
            case.step(optimizer, lambda: loss() * bad)
            skipped += 1
            after = without_counters(optimizer.state_dict())["state"]
            if t > 0:
                assert bits([params, after]) == before
            else:
                own = OWN_STATE[case.optimizer]
                assert all(s["step"].item() == 0 and not s.get(own, s["step"]).any() for s in after.values())
                assert bits(params) == bits(case.start()[0])
        else:
            case.step(optimizer, loss)
        assert optimizer.skipped_steps.dtype == torch.int64
        assert optimizer.skipped_steps.item() == skipped
    assert all(bool(p.isfinite().all()) for p in params.values())


def test_version_counters(case: Case) -> None:
    """Autograd notices that a saved tensor was changed by the step."""
    params, loss, optimizer = started(case)
    case.step(optimizer, loss)
    state = optimizer.state[params["weight"]]
    own = state.get(OWN_STATE[case.optimizer], state["step"])
    before = [p._version for p in params.values()], own._version
    stale = (params["weight"] ** 2).sum()
    case.step(optimizer, loss)
    assert all(p._version > v for p, v in zip(params.values(), before[0], strict=True))
    assert own._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_parameters_keep_their_identity(case: Case) -> None:
    """No rebinding of .data: an alias sees the step; nothing of the step requires a gradient."""
    params, loss, optimizer = started(case)
    alias = params["weight"].detach()
    case.run(optimizer, loss, 2)
    assert alias.data_ptr() == params["weight"].data_ptr()
    assert all(p.is_leaf and p.requires_grad for p in params.values())
    value = case.step(optimizer, loss)
    assert not value.requires_grad


def test_data_replaced_after_construction(case: Case) -> None:
    params, loss, optimizer = started(case)
    case.run(optimizer, loss, 3)
    for p in params.values():
        p.data = p.data.clone()
    straight_params, straight_loss, straight = started(case)
    case.run(straight, straight_loss, 6)
    case.run(optimizer, loss, 3)
    assert everything(params, optimizer) == everything(straight_params, straight)


def test_grad_path_equals_closure(case: Case) -> None:
    """``.grad`` filled by the caller, a closure that calls backward, and a closure that does not: the same bits."""
    second_order = case.driver == "graph_closure"
    outcomes = []
    for form in ("closure", "backward in the closure", "no closure"):
        for language in LANGUAGES:
            params, loss, optimizer = started(case, language)
            mirror = case.make("python", list(params.values()))  # tells is_second_order for the C++ face
            each = mirror.param_groups[0]["update_each"] if second_order else 1
            for t in range(7):

                def backward(
                    params: dict[str, Tensor] = params,
                    loss: Any = loss,
                    create_graph: bool = second_order and t % each == 0,
                ) -> Tensor:
                    for p in params.values():
                        p.grad = None
                    value = loss() * case.loss_sign
                    value.backward(create_graph=create_graph)
                    return value

                if language == "python" and second_order:
                    assert optimizer.is_second_order == (t % each == 0)
                if form == "closure":
                    case.step(optimizer, loss)
                elif form == "no closure":
                    backward()
                    optimizer.step()
                else:
                    optimizer.step(backward)
                assert all(p.grad is None or p.grad.grad_fn is None for p in params.values())
            outcomes.append(everything(params, optimizer))
    assert all(outcome == outcomes[0] for outcome in outcomes)


# ---- automatic mixed precision


def backward_scaled(case: Case, optimizer: Any, scaler: Any, params: list[Tensor], factor: float = 1.0) -> None:
    for p in params:
        p.grad = None
    loss = quartic(params)() * (case.loss_sign * factor)
    scaler.scale(loss).backward(create_graph=getattr(optimizer, "is_second_order", False))


def test_grad_scaler(case: Case) -> None:
    """READY path: the step itself divides by the scale; a power of two changes no bit. An infinite step is skipped."""
    plain, scaled = inputs((4, 6), (2, 3, 2, 2), (4,)), inputs((4, 6), (2, 3, 2, 2), (4,))
    a, b = case.make("python", plain), case.make("python", scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for _ in range(6):
        case.step(a, quartic(plain))
        backward_scaled(case, b, scaler, scaled)
        scaler.step(b)
        scaler.update()
        assert not hasattr(b, "grad_scale")
        assert not hasattr(b, "found_inf")
    assert scaler.get_scale() == 4096.0
    assert bits(plain) == bits(scaled)
    assert b.skipped_steps.item() == 0

    before = bits([scaled, without_counters(b.state_dict())["state"]])
    backward_scaled(case, b, scaler, scaled, factor=math.inf)
    scaler.step(b)
    scaler.update()
    assert scaler.get_scale() == 2048.0
    assert bits([scaled, without_counters(b.state_dict())["state"]]) == before
    assert b.skipped_steps.item() == 1


def test_grad_scaler_unscaled(case: Case) -> None:
    """After unscale_() second derivatives still carry the scale: a refresh needs loss_scale, and says so."""
    plain, scaled = inputs((4, 6), (4,)), inputs((4, 6), (4,))
    a, b = case.make("python", plain), case.make("python", scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(6):
        case.step(a, quartic(plain))
        backward_scaled(case, b, scaler, scaled)
        scaler.unscale_(b)
        if getattr(b, "is_second_order", False):
            before = bits([scaled, b.state_dict()])
            with pytest.raises(RuntimeError, match=r"loss_scale=scaler\.get_scale\(\)"):
                scaler.step(b)
            assert not hasattr(b, "grad_scale")  # which GradScaler leaves behind when a step raises
            assert not hasattr(b, "found_inf")
            assert bits([scaled, b.state_dict()]) == before
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            backward_scaled(case, b, scaler, scaled)
            scaler.unscale_(b)
            scaler.step(b, loss_scale=scaler.get_scale())
        else:
            scaler.step(b)
        scaler.update()
    assert bits(plain) == bits(scaled)
    if case.driver != "graph_closure":
        return
    backward_scaled(case, b, scaler, scaled)
    with pytest.raises(ValueError, match="loss_scale: the GradScaler passes its scale itself"):
        scaler.step(b, loss_scale=1024.0)


# ---- torch.compile


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiled_step(case: Case) -> None:
    """A compiled function may call step(); the step itself runs eagerly (its C++ part is no traceable graph)."""
    params, loss, optimizer = started(case)
    compiled_params, compiled_loss, compiled = started(case)
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def train() -> Any:
        return case.step(compiled, compiled_loss)

    for _ in range(4):
        case.step(optimizer, loss)
        train()
    assert everything(params, optimizer) == everything(compiled_params, compiled)
