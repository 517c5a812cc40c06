"""Defects that a review found, each with the shortest script that showed it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_ext.optim import AdaHessian
from torch_ext.testing import LANGUAGES, cpp_optimizer

both_languages = pytest.mark.parametrize("language", LANGUAGES)


def make(language: str, params: Any, **options: Any) -> Any:
    return AdaHessian(params, **options) if language == "python" else cpp_optimizer("AdaHessian", params, **options)


def leaf() -> Tensor:
    return torch.tensor([1.0, 2.0], requires_grad=True)


def loss_of(p: Tensor) -> Tensor:
    """Gradient (5, 34), Hessian diagonal (13, 49)."""
    return (p**2).sum() / 2 + (p**4).sum()


def first_step(optimizer: Any) -> tuple[list[float], list[float]]:
    """Gradient and Hessian diagonal of the only step so far, from the averages."""
    state = optimizer.state_dict()["state"][0]
    gradient, curvature = state["exp_avg"] / 0.1, (state["exp_hessian_diag_sq"] / 0.001).sqrt()
    return pytest.approx(gradient.tolist(), rel=1e-5), pytest.approx(curvature.tolist(), rel=1e-4)


# ---- what is differentiated


@both_languages
@pytest.mark.parametrize("form", ["returns loss", "backward"])
def test_hook_of_a_parameter_acts_once(language: str, form: str) -> None:
    p = leaf()
    p.register_hook(lambda g: 2 * g)
    optimizer = make(language, [p])
    for expected in (([10, 68], [26, 98]), None):  # the hook is still there at the second step
        if form == "backward":
            p.grad = None
            loss_of(p).backward(create_graph=True)
        before = loss_of(p)
        gradient = torch.autograd.grad(before, p)[0]
        optimizer.step(None if form == "backward" else lambda: loss_of(p))
        if expected is not None:
            assert first_step(optimizer) == expected
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient)


@both_languages
@pytest.mark.parametrize("main", ["returns loss", "backward"])
@pytest.mark.parametrize("keep", ["retain_graph", "create_graph"])
def test_curvature_closure_that_calls_backward(language: str, main: str, keep: str) -> None:
    p = leaf()
    optimizer = make(language, [p])

    def closure() -> Tensor:
        loss = loss_of(p)
        if main == "backward":
            p.grad = None
            loss.backward()
        return loss

    def curvature() -> Tensor:
        loss = loss_of(p)
        loss.backward(**{keep: True})
        return loss

    if keep == "retain_graph":  # gradients without a graph: refused instead of added to those of the closure
        with pytest.raises(RuntimeError, match="curvature_closure must return its loss without calling backward"):
            optimizer.step(closure, curvature_closure=curvature)
        assert p.tolist() == [1, 2]
        return
    optimizer.step(closure, curvature_closure=curvature)
    assert first_step(optimizer) == ([5, 34], [13, 49])
    assert p.grad is not None
    assert p.grad.tolist() == [5, 34]


@both_languages
def test_frozen_parameters_and_a_loss_of_others(language: str) -> None:
    frozen, other = torch.ones(2), leaf()
    optimizer = make(language, [frozen])
    assert optimizer.step(lambda: loss_of(other)).item() == 19.5
    assert frozen.tolist() == [1, 1]


# ---- accumulate


@pytest.mark.parametrize("change", ["freeze", "add", "add and go on"])
def test_parameters_that_change_between_accumulate_and_step(change: str) -> None:
    """The sums of one parameter moved another one that had taken its place."""
    a, b = leaf(), leaf().detach()
    optimizer = AdaHessian([a, b])
    optimizer.accumulate(loss_of(a))
    if change == "freeze":
        a.requires_grad_(False)
        b.requires_grad_(True)
    else:
        optimizer.add_param_group({"params": [c := leaf()]})
    go_on = (lambda: optimizer.accumulate(loss_of(c))) if change == "add and go on" else optimizer.step
    with pytest.raises(RuntimeError, match="have changed since accumulate"):
        go_on()
    assert a.tolist() == b.tolist() == [1, 2]
    optimizer.step(lambda: loss_of(b if change == "freeze" else a))  # the sums are gone


def test_update_each_edited_between_accumulate_and_step() -> None:
    p = leaf()
    optimizer = AdaHessian([p], update_each=2)
    for update_each in (2, 1):  # the second micro-batch was first-order when it was accumulated
        optimizer.accumulate(loss_of(p))
        optimizer.param_groups[0]["update_each"] = update_each
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 2
    assert optimizer.state[p]["bias_products"][1].item() == pytest.approx(0.999**2)


# ---- GradScaler, loss_scale, hessian


def test_scale_of_a_grad_scaler_does_not_outlive_a_step_that_raised() -> None:
    p, q = leaf(), leaf()
    optimizer, other = AdaHessian([p]), AdaHessian([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(p)).backward()  # create_graph is missing
    with pytest.raises(RuntimeError, match="create_graph"):
        scaler.step(optimizer)
    for opt, param in ((optimizer, p), (other, q)):
        opt.step(lambda param=param: loss_of(param))
    assert torch.equal(p, q)


@both_languages
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_loss_scale_out_of_range(language: str, scale: float) -> None:
    p = leaf()
    with pytest.raises(ValueError, match="Invalid loss_scale"):
        make(language, [p]).step(lambda: loss_of(p), loss_scale=scale)
    assert p.tolist() == [1, 2]


@pytest.mark.parametrize("hessian", [[], torch.ones(1, 2), [1.0], [np.ones(2)]], ids=str)
def test_hessian_that_is_no_list_of_tensors(hessian: Any) -> None:
    """The empty list made an off-schedule estimate that ignored loss_scale."""
    p = leaf()
    optimizer = AdaHessian([p])
    with pytest.raises((TypeError, ValueError), match=r"AdaHessian: hessian (has 0|must be a list)"):
        optimizer.step(lambda: loss_of(p), hessian=hessian)
    assert p.tolist() == [1, 2]


@both_languages
def test_wide_hessian_of_a_half_parameter(language: str) -> None:
    p = torch.tensor([1.0, 2.0], dtype=torch.float16, requires_grad=True)
    optimizer = make(language, [p])
    optimizer.step(lambda: (p * p).sum(), hessian=[torch.tensor([1e5, 2e5])])  # infinite in float16
    assert first_step(optimizer) == ([2, 4], [1e5, 2e5])


@both_languages
def test_sparse_hessian(language: str) -> None:
    p = leaf()
    with pytest.raises(TypeError, match=r"hessian of parameter 0 \(shape \[2\]\) is sparse"):
        make(language, [p]).step(lambda: loss_of(p), hessian=[torch.ones(2).to_sparse()])


# ---- layouts


@both_languages
@pytest.mark.parametrize("layout", ["as_strided", "unfold"])
def test_overlapping_parameter_is_refused(language: str, layout: str) -> None:
    """No stride is 0, yet elements share memory: the last copy back won."""
    base = torch.arange(5.0)
    view = base.as_strided((3, 3), (1, 1)) if layout == "as_strided" else base.unfold(0, 3, 1).detach()
    p = view.requires_grad_()
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \[3, 3\]\) is expanded or overlapping"):
        make(language, [p]).step(lambda: (p**2).sum())
    assert base.tolist() == [0, 1, 2, 3, 4]


@both_languages
def test_gaps_between_elements_are_fine(language: str) -> None:
    base = torch.ones(4, 9)
    p = base[::2, 1::3].requires_grad_()
    make(language, [p]).step(lambda: (p**2).sum())
    assert (base != 1).sum() == p.numel() == 6


# ---- options and checkpoints


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("lr", np.float32(0.5), 0.5),
        ("betas", (np.float32(0.5), np.float64(0.25)), (0.5, 0.25)),
        ("update_each", np.int64(2), 2),
        ("maximize", np.bool_(True), True),
    ],
)
def test_numpy_scalars_are_numbers(name: str, given: Any, kept: Any) -> None:
    optimizer = AdaHessian([leaf()], **{name: given})
    optimizer.add_param_group({"params": [leaf()], name: given})
    for values in (optimizer.defaults, *optimizer.param_groups):
        assert values[name] == kept
        assert type(values[name]) is type(kept)


def test_tensor_option_of_several_elements_is_named() -> None:
    with pytest.raises(ValueError, match="Tensor weight_decay must have one element"):
        AdaHessian([leaf()], weight_decay=torch.ones(2))  # type: ignore[arg-type]


def test_tensor_learning_rate_resumes_in_cpp(tmp_path: Path) -> None:
    p = leaf()
    optimizer = AdaHessian([p], lr=torch.tensor(0.5))
    optimizer.step(lambda: loss_of(p))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = make("cpp", [leaf()])
    other.load_state_dict_file(str(tmp_path / "state.pt"))
    assert other.option(0, "lr") == 0.5


@both_languages
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam"])
def test_state_of_torch_optimizers_is_refused(language: str, name: str) -> None:
    p = leaf()
    foreign = getattr(torch.optim, name)([p], lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
    loss_of(p).backward()
    foreign.step()
    with pytest.raises(ValueError, match="it is of another optimizer"):
        make(language, [p]).load_state_dict(foreign.state_dict())


@both_languages
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", torch.ones(3)),
        ("bias_products", torch.ones(5)),
        ("bias_products", 0.5),
        ("global_calls", torch.ones(2)),
        ("global_skipped", torch.ones(2)),
        ("exp_avg", None),
        ("exp_avg", torch.ones(2, dtype=torch.complex64)),
        ("exp_avg", torch.ones(2).to_sparse()),
    ],
    ids=str,
)
def test_damaged_state_is_refused_when_it_is_loaded(language: str, name: str, value: Any) -> None:
    p = leaf()
    optimizer = make(language, [p])
    optimizer.step(lambda: loss_of(p))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0][name] = value
    with pytest.raises(ValueError, match=name):
        optimizer.load_state_dict(bad)
    optimizer.step(lambda: loss_of(p))


@both_languages
@pytest.mark.parametrize("damage", ["keys are strings", "another index", "no params", "version", "header"])
def test_damaged_structure_is_refused(language: str, damage: str) -> None:
    """String keys, as JSON makes them, silently started from scratch."""
    p = leaf()
    optimizer = make(language, [p])
    optimizer.step(lambda: loss_of(p))
    bad = copy.deepcopy(optimizer.state_dict())
    if damage == "keys are strings":
        bad["state"] = {str(index): state for index, state in bad["state"].items()}
    elif damage == "another index":
        bad["param_groups"][0]["params"] = [7]
    elif damage == "no params":
        del bad["param_groups"][0]["params"]
    elif damage == "version":
        bad["torch_ext"]["format_version"] = "1"
    else:
        bad["torch_ext"] = None
    with pytest.raises(ValueError, match="state"):
        optimizer.load_state_dict(bad)
    optimizer.step(lambda: loss_of(p))


@both_languages
def test_numbers_are_loaded_in_the_dtype_of_their_field(language: str) -> None:
    p = leaf()
    optimizer = make(language, [p])
    optimizer.step(lambda: loss_of(p))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(global_calls=3, step=3)
    optimizer.load_state_dict(saved)
    state = optimizer.state_dict()["state"][0]
    assert (state["global_calls"].dtype, state["step"].dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("linear_averaging", "foo"),
        ("betas", (1.0, 0.9)),
        ("max_update", -1.0),
        ("hessian_power", 7.0),
        ("n_samples", 0),
        ("update_each", 0),
        ("lr", -1.0),
    ],
)
def test_edited_options_are_checked(option: str, value: Any) -> None:
    p = torch.tensor([[1.0, 2.0]], requires_grad=True)
    optimizer = AdaHessian([p])
    optimizer.step(lambda: (p**2).sum())
    before = p.detach().clone()
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option):
        optimizer.step(lambda: (p**2).sum())
    assert torch.equal(p, before)


def test_edited_options_are_checked_before_any_group_moves() -> None:
    a, b = (torch.ones(2, 4, requires_grad=True) for _ in range(2))
    optimizer = AdaHessian([{"params": [a]}, {"params": [b]}])
    optimizer.step(lambda: (a**2 + b**2).sum())
    before = a.detach().clone()
    optimizer.param_groups[1]["linear_averaging"] = "row"  # its second moments have another shape
    with pytest.raises(ValueError, match="exp_hessian_diag_sq"):
        optimizer.step(lambda: (a**2 + b**2).sum())
    assert torch.equal(a, before)
    optimizer.param_groups[1]["linear_averaging"] = "none"
    optimizer.param_groups[1]["seed"] = 5
    with pytest.raises(ValueError, match="seed is the same for all parameters"):
        optimizer.step(lambda: (a**2 + b**2).sum())
    assert torch.equal(a, before)
