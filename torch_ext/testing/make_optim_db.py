"""Writes ``tests/optim_db.json``, the one table of optimizers that GoogleTest and pytest read.

    python -m torch_ext.testing.make_optim_db           # computes every row from torch_ext.reference, writes the file
    python -m torch_ext.testing.make_optim_db --check   # computes and compares with the file, writes nothing

A row: ``driver`` says how the optimizer is driven (``graph_closure``: a closure that returns the loss with a graph
that can be differentiated twice and calls no backward; ``grad``: gradients alone, here through the same closure;
``counts``: the experts that a loss's ``ids()`` selects, recorded before each step;
``population``: the losses of members that stand in the parameters one after another; ``loss``: losses alone);
``problem`` is a function of :mod:`torch_ext.testing.problems`; ``options_bad`` holds ``[options, word in the
message]``; every variant has its ``options`` (``betas`` is a list: JSON has no tuples), the factor ``loss_sign`` of
the loss, the relative tolerance ``rtol`` (to the scale of the tensor; other instruction sets round matmul and tanh
differently: 3e-14 seen, 1e-10 with finite differences; M-FAC's window rounds to its format, where a flipped last bit
stays until the method has converged over it) and a ``trajectory``: after the steps number ``iterations`` (0 is the
first) the value ``loss`` which that step returned, without ``loss_sign``, and all ``parameters``, row-major. Numbers
are the shortest decimals that read back to the same float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_ext.reference.optim.adahessian import AdaHessianReference
from torch_ext.reference.optim.alflb import ALFLBReference
from torch_ext.reference.optim.eggroll import EggrollReference
from torch_ext.reference.optim.mezo import MeZOReference
from torch_ext.reference.optim.mfac import MFACReference
from torch_ext.testing import problems

PATH = Path(__file__).resolve().parents[2] / "tests" / "optim_db.json"
ITERATIONS, SAMPLE_EVERY = 1001, 100

Step = Callable[[Callable[[], Tensor]], Tensor]


def trajectory(
    make_step: Callable[[list[Tensor]], Step],
    *,
    problem: str,
    loss_sign: int = 1,
    iterations: int = ITERATIONS,
    every: int = SAMPLE_EVERY,
    counts: bool = False,
) -> dict[str, Any]:
    """Runs ``step = make_step(params)`` on a problem and samples it every so many iterations."""
    params, loss = getattr(problems, problem)()
    step = make_step(list(params.values()))
    out: dict[str, Any] = {"iterations": [], "loss": [], "parameters": {name: [] for name in params}}
    for i in range(iterations):
        value = float(step(loss if counts else lambda: loss() * loss_sign)) * loss_sign
        if i % every == 0:
            out["iterations"].append(i)
            out["loss"].append(value)
            for name, p in params.items():
                out["parameters"][name].append(p.detach().reshape(-1).tolist())
    return out


ADAHESSIAN_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "weight_decay": {"weight_decay": 0.01},
    "maximize": {"maximize": True},
    "hessian_power_0": {"hessian_power": 0.0, "lr": 0.5},
    "hessian_power_0.5": {"hessian_power": 0.5},
    "hessian_power_0.7": {"hessian_power": 0.7},
    "n_samples_4": {"n_samples": 4},
    "update_each_5": {"update_each": 5},
    "row": {"linear_averaging": "row"},
    "block": {"linear_averaging": "block", "block_size": 3},
    "signed_mean_row": {"linear_averaging": "row", "averaging": "signed_mean"},
    "no_conv_averaging": {"average_conv": False},
    "max_update": {"max_update": 0.05},
    "betas": {"betas": [0.8, 0.95]},
    "seed": {"seed": 81985529216486895},
    "finite_difference": {"hvp": "finite_difference"},
    "together": {
        "lr": 0.1,
        "betas": [0.85, 0.99],
        "eps": 1e-3,
        "weight_decay": 0.005,
        "hessian_power": 0.5,
        "n_samples": 2,
        "update_each": 3,
        "linear_averaging": "row",
        "averaging": "signed_mean",
        "max_update": 0.5,
        "seed": 7,
    },
}

ADAHESSIAN_BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr"),
    ({"eps": -1e-8}, "eps"),
    ({"betas": [-0.1, 0.999]}, "betas"),
    ({"betas": [1.0, 0.999]}, "betas"),
    ({"betas": [0.9, -0.1]}, "betas"),
    ({"betas": [0.9, 1.0]}, "betas"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"hessian_power": -0.1}, "hessian_power"),
    ({"hessian_power": 1.1}, "hessian_power"),
    ({"n_samples": 0}, "n_samples"),
    ({"update_each": 0}, "update_each"),
    ({"linear_averaging": "column"}, "linear_averaging"),
    ({"linear_averaging": "block"}, "block_size"),
    ({"linear_averaging": "block", "block_size": -1}, "block_size"),
    ({"linear_averaging": "block", "block_size": 5}, "block_size"),
    ({"averaging": "mean"}, "averaging"),
    ({"max_update": -1.0}, "max_update"),
    ({"hvp": "forward"}, "hvp"),
]


def adahessian(names: Sequence[str] | None = None, iterations: int = ITERATIONS) -> dict[str, Any]:
    """The row of AdaHessian."""
    variants = []
    for name, options in ADAHESSIAN_VARIANTS.items():
        if names is not None and name not in names:
            continue
        sign = -1 if options.get("maximize") else 1  # maximising -f must follow the very trajectory of minimising f

        def make_step(params: list[Tensor], options: dict[str, Any] = options) -> Step:
            return AdaHessianReference(params, **options).step_closure

        path = trajectory(make_step, problem="tanh_layer", loss_sign=sign, iterations=iterations)
        rtol = 1e-7 if options.get("hvp") == "finite_difference" else 1e-9
        variants.append({"name": name, "options": options, "loss_sign": sign, "rtol": rtol, "trajectory": path})
    return {
        "driver": "graph_closure",
        "problem": "tanh_layer",
        "options_bad": [list(pair) for pair in ADAHESSIAN_BAD],
        "variants": variants,
    }


MFAC_BASE: dict[str, Any] = {"lr": 0.03, "num_grads": 16, "damping": 0.05}
MFAC_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "short_window": MFAC_BASE,
    "float64": {**MFAC_BASE, "window_format": "float64"},
    "bfloat16": {**MFAC_BASE, "window_format": "bfloat16"},
    "int8": {**MFAC_BASE, "window_format": "int8"},
    "topk": {**MFAC_BASE, "window_format": "topk", "topk": 0.03},
    "error_feedback": {**MFAC_BASE, "window_format": "int8", "error_feedback": True},
    "momentum": {**MFAC_BASE, "momentum": 0.9},
    "heavy_ball": {**MFAC_BASE, "lr": 0.004, "momentum": 0.9, "dampening": 0.0},
    "weight_decay": {**MFAC_BASE, "weight_decay": 0.005},
    "decoupled_weight_decay": {**MFAC_BASE, "weight_decay": 0.005, "decoupled_weight_decay": True},
    "maximize": {**MFAC_BASE, "maximize": True},
    "warmup_scaling": {**MFAC_BASE, "warmup_scaling": True},
    "warmup_steps": {**MFAC_BASE, "warmup_steps": 10},
    "together": {
        "lr": 0.02,
        "momentum": 0.8,
        "weight_decay": 0.01,
        "dampening": 0.5,
        "decoupled_weight_decay": True,
        "num_grads": 5,
        "damping": 0.05,
        "window_format": "bfloat16",
        "error_feedback": True,
        "warmup_scaling": True,
        "warmup_steps": 3,
        "blocks": "per_group",
        "window_device": "cpu",
    },
}

MFAC_BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr"),
    ({"momentum": -0.1}, "momentum"),
    ({"momentum": 1.0}, "momentum"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"dampening": -0.1}, "dampening"),
    ({"dampening": 1.0}, "dampening"),
    ({"num_grads": 0}, "num_grads"),
    ({"damping": 0.0}, "damping"),
    ({"damping": -1e-5}, "damping"),
    ({"window_format": "float16"}, "window_format"),
    ({"topk": 0.0}, "topk"),
    ({"topk": 1.5}, "topk"),
    ({"error_feedback": True}, "error_feedback"),
    ({"warmup_steps": -1}, "warmup_steps"),
    ({"blocks": "per_param"}, "blocks"),
    ({"window_device": "nowhere"}, "window_device"),
]

#: Of the window's rounding: see the module's text.
MFAC_RTOL = {"float64": 1e-9, "float32": 1e-6, "bfloat16": 1e-6, "int8": 1e-6, "topk": 1e-6}
#: Steps until the last bit of a step, which these formats sum in float32, has made another row of some gradient.
MFAC_COARSE = {"bfloat16", "int8", "topk"}
MFAC_COARSE_ITERATIONS, MFAC_COARSE_EVERY = 16, 5


def mfac(names: Sequence[str] | None = None, iterations: int = ITERATIONS) -> dict[str, Any]:
    """The row of MFAC."""
    variants = []
    for name, options in MFAC_VARIANTS.items():
        if names is not None and name not in names:
            continue
        sign = -1 if options.get("maximize") else 1
        known = {key: value for key, value in options.items() if key != "window_device"}

        def make_step(params: list[Tensor], options: dict[str, Any] = known) -> Step:
            return MFACReference(params, **options).step_closure

        window = options.get("window_format", "float32")
        every, length = SAMPLE_EVERY, iterations
        if window in MFAC_COARSE:
            every, length = MFAC_COARSE_EVERY, min(iterations, MFAC_COARSE_ITERATIONS)
        path = trajectory(make_step, problem="tanh_layer", loss_sign=sign, iterations=length, every=every)
        rtol = MFAC_RTOL[window]
        variants.append({"name": name, "options": options, "loss_sign": sign, "rtol": rtol, "trajectory": path})
    return {
        "driver": "grad",
        "problem": "tanh_layer",
        "options_bad": [list(pair) for pair in MFAC_BAD],
        "variants": variants,
    }


#: The quantile rule needs a router that fills its histogram: its trajectories are in its own tests.
ALFLB_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lr_power": {"lr": 0.05, "lr_power": 0.5},
    "uncentered": {"center": False},
    "proportional": {"rule": "proportional", "lr": 0.2},
    "proportional_decreasing": {"rule": "proportional", "lr": 2.0, "lr_power": 1.0},
    "proportional_load": {"rule": "proportional", "norm": "load", "lr": 0.02},
    "momentum": {"rule": "momentum", "lr": 5e-3},
    "together": {
        "rule": "momentum",
        "lr": 0.02,
        "lr_power": 0.25,
        "norm": "load",
        "center": False,
        "ema": 0.5,
        "momentum": 0.9,
        "kappa": 0.5,
        "qb_bins": 10,
    },
}

ALFLB_BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr"),
    ({"lr_power": -0.5}, "lr_power"),
    ({"rule": "adam"}, "rule"),
    ({"norm": "batch"}, "norm"),
    ({"ema": -0.1}, "ema"),
    ({"ema": 1.1}, "ema"),
    ({"momentum": -0.1}, "momentum"),
    ({"momentum": 1.0}, "momentum"),
    ({"kappa": 0.0}, "kappa"),
    ({"qb_bins": 0}, "qb_bins"),
]

ALFLB_ITERATIONS, ALFLB_EVERY = 201, 20


def alflb(names: Sequence[str] | None = None, iterations: int = ALFLB_ITERATIONS) -> dict[str, Any]:
    """The row of ALFLB."""
    variants = []
    for name, options in ALFLB_VARIANTS.items():
        if names is not None and name not in names:
            continue

        def make_step(params: list[Tensor], options: dict[str, Any] = options) -> Any:
            return ALFLBReference(params, **options).step_closure

        path = trajectory(make_step, problem="expert_scores", iterations=iterations, every=ALFLB_EVERY, counts=True)
        variants.append({"name": name, "options": options, "loss_sign": 1, "rtol": 1e-6, "trajectory": path})
    return {
        "driver": "counts",
        "problem": "expert_scores",
        "options_bad": [list(pair) for pair in ALFLB_BAD],
        "variants": variants,
    }


EGGROLL_BASE: dict[str, Any] = {"lr": 0.4, "sigma": 0.1, "population": 8}
EGGROLL_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"population": 4},
    "momentum": {**EGGROLL_BASE, "lr": 0.1, "momentum": 0.7, "weight_decay": 0.01},
    "independent": {**EGGROLL_BASE, "antithetic": False, "population": 9, "chunk_members": 5},
    "grouped": {**EGGROLL_BASE, "shaping": "grouped", "group_size": 4, "kind": "vector"},
    "centered_rank": {**EGGROLL_BASE, "shaping": "centered_rank", "nonfinite": "min", "noise_reuse": 3},
    "sign": {**EGGROLL_BASE, "lr": 0.05, "shaping": "sign", "noise": "rademacher", "update_scale": "paper"},
    "unbiased": {**EGGROLL_BASE, "lr": 0.05, "shaping": "raw", "update_scale": "unbiased", "noise": "binomial16"},
    "softmax": {**EGGROLL_BASE, "lr": 4.0, "shaping": "softmax", "temperature": 0.05, "noise": "binomial64", "rank": 2},
    "baseline": {**EGGROLL_BASE, "shaping": "baseline", "group_size": 8, "seed": 81985529216486895},
    "maximize": {**EGGROLL_BASE, "maximize": True},
}

EGGROLL_BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr"),
    ({"momentum": -0.1}, "momentum"),
    ({"momentum": 1.0}, "momentum"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"kind": "tensor"}, "kind"),
    ({"sigma": 0.0}, "sigma"),
    ({"sigma": -0.1}, "sigma"),
    ({"rank": 0}, "rank"),
    ({"rank": 5}, "rank"),
    ({"population": 0}, "population"),
    ({"population": 1}, "population"),
    ({"population": 7}, "population"),
    ({"group_size": -2}, "group_size"),
    ({"group_size": 3, "population": 12}, "group_size"),
    ({"group_size": 6, "population": 8}, "group_size"),
    ({"shaping": "grouped"}, "group_size"),
    ({"shaping": "baseline", "group_size": 2}, "group_size"),
    ({"noise_reuse": -1}, "noise_reuse"),
    ({"shaping": "rank"}, "shaping"),
    ({"shaping": "sign", "antithetic": False}, "shaping"),
    ({"temperature": 0.0}, "temperature"),
    ({"noise": "uniform"}, "noise"),
    ({"update_scale": "mean"}, "update_scale"),
    ({"nonfinite": "skip"}, "nonfinite"),
    ({"chunk_members": 0}, "chunk_members"),
    ({"chunk_members": 3}, "chunk_members"),
]

#: Every member is an evaluation: shorter paths.
EGGROLL_ITERATIONS, EGGROLL_EVERY = 61, 20


def eggroll(names: Sequence[str] | None = None, iterations: int = ITERATIONS) -> dict[str, Any]:
    """The row of Eggroll."""
    variants = []
    for name, options in EGGROLL_VARIANTS.items():
        if names is not None and name not in names:
            continue
        sign = -1 if options.get("maximize") else 1

        def make_step(params: list[Tensor], options: dict[str, Any] = options) -> Step:
            return EggrollReference(params, **options).step_closure

        path = trajectory(
            make_step,
            problem="tanh_layer",
            loss_sign=sign,
            iterations=min(iterations, EGGROLL_ITERATIONS),
            every=EGGROLL_EVERY,
        )
        variants.append({"name": name, "options": options, "loss_sign": sign, "rtol": 1e-9, "trajectory": path})
    return {
        "driver": "population",
        "problem": "tanh_layer",
        "options_bad": [list(pair) for pair in EGGROLL_BAD],
        "variants": variants,
    }


MEZO_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"lr": 0.01, "eps": 0.1, "weight_decay": 0.1},
    "maximize": {"lr": 0.01, "maximize": True, "seed": 81985529216486895},
}

MEZO_BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr"),
    ({"eps": 0.0}, "eps"),
    ({"eps": -1e-3}, "eps"),
    ({"weight_decay": -0.1}, "weight_decay"),
]

#: The difference of two nearly equal losses over 2 eps carries their rounding a few hundred times over.
MEZO_RTOL = 1e-7


def mezo(names: Sequence[str] | None = None, iterations: int = ITERATIONS) -> dict[str, Any]:
    """The row of MeZO."""
    variants = []
    for name, options in MEZO_VARIANTS.items():
        if names is not None and name not in names:
            continue
        sign = -1 if options.get("maximize") else 1

        def make_step(params: list[Tensor], options: dict[str, Any] = options) -> Step:
            return MeZOReference(params, **options).step_closure

        path = trajectory(make_step, problem="tanh_layer", loss_sign=sign, iterations=iterations)
        variants.append({"name": name, "options": options, "loss_sign": sign, "rtol": MEZO_RTOL, "trajectory": path})
    return {
        "driver": "loss",
        "problem": "tanh_layer",
        "options_bad": [list(pair) for pair in MEZO_BAD],
        "variants": variants,
    }


ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    "AdaHessian": adahessian,
    "MFAC": mfac,
    "ALFLB": alflb,
    "Eggroll": eggroll,
    "MeZO": mezo,
}


def dumps(value: Any, indent: int = 0) -> str:
    """JSON with one line for every list or dict that is short or has none inside."""
    line = json.dumps(value, allow_nan=False)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(line) <= 100 or not any(isinstance(c, (dict, list)) and c for c in children):
        return line
    pad, end = "\n" + " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict):
        body = [f"{json.dumps(k)}: {dumps(v, indent + 1)}" for k, v in value.items()]
        return "{" + pad + ("," + pad).join(body) + end + "}"
    return "[" + pad + ("," + pad).join(dumps(v, indent + 1) for v in value) + end + "]"


def difference(expected: dict[str, Any], actual: dict[str, Any]) -> float:
    """The largest difference between two trajectories over their common samples, relative to the tensor's scale."""
    n = min(len(expected["iterations"]), len(actual["iterations"]))
    pairs = [(expected["loss"][i], actual["loss"][i]) for i in range(n)]
    pairs += [
        (expected["parameters"][k][i], actual["parameters"][k][i]) for k in expected["parameters"] for i in range(n)
    ]
    worst = 0.0
    for a, b in pairs:
        x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        worst = max(worst, float((x - y).abs().max() / x.abs().max()))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes or checks tests/optim_db.json.")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    table = json.loads(PATH.read_text()) if PATH.exists() else {}
    bad = 0
    for optimizer, make in ROWS.items():
        row = make()
        if not check:
            table[optimizer] = row
            continue
        for new in row["variants"]:
            old = next((v for v in table[optimizer]["variants"] if v["name"] == new["name"]), None)
            error = float("nan") if old is None else difference(old["trajectory"], new["trajectory"])
            ok = old is not None and old["options"] == new["options"] and error <= new["rtol"]
            bad += not ok
            print(f"{optimizer} {new['name']}: {'ok' if ok else 'DIFFERS'} ({error:.1e})")
    if not check:
        PATH.write_text(dumps(table) + "\n")
        print(f"wrote {PATH}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
