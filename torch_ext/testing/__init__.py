"""What the tests of the library, and of extensions to it, share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_ext import _C, optim
from torch_ext.testing import problems

LANGUAGES = ("python", "cpp")

Loss = Callable[[], Tensor]


def cpp_optimizer(name: str, params: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any) -> _C.CppOptimizer:
    """The C++ class ``torch_ext::optim::<name>``, driven from Python.

    Args:
        name: such as ``"AdaHessian"``.
        params: tensors, or groups ``{"params": [...], **options}``.
        options: of the options class, by their Python names.

    Returns:
        an object with ``step(closure, **inputs)``, ``state_dict``, ``load_state_dict``, ``save_state_dict(path)``,
        ``load_state_dict_file(path)``, ``add_param_group``, ``option(group, name)``,
        ``set_option(group, name, value)``, ``zero_grad`` and ``skipped_steps``; what else the class offers by
        ``call(method, *arguments)``.

    Raises:
        TypeError: an option that the class does not have; otherwise what the C++ constructor raises.
    """
    known = {entry["name"] for entry in _C.schema(name)["fields"]}
    items = list(params)
    groups = [dict(i) for i in items if isinstance(i, dict)] or [{"params": items}]
    for given in (options, *groups):
        for key in given:
            if key not in known and key != "params":
                raise TypeError(f"{name} has no option {key!r}")
    for group in groups:
        group["params"] = list(group["params"])
    return _C.CppOptimizer(name, groups, options)


@contextmanager
def member(population: Any, i: int) -> Iterator[None]:
    """``population.member(i)``, also of the population that a C++ optimizer hands to its closure."""
    saved = getattr(population, "_members", population).perturb(i)
    try:
        yield
    finally:
        getattr(population, "_members", population).restore(saved)


@dataclass(frozen=True)
class Case:
    """One variant of one optimizer of ``tests/optim_db.json``."""

    optimizer: str
    variant: str
    driver: str
    problem: str
    options: dict[str, Any]
    loss_sign: int
    rtol: float
    trajectory: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.variant}"

    def make(self, language: str, params: Iterable[Any], **overrides: Any) -> Any:
        """The optimizer of this case in either language, on the given parameters."""
        options = {**self.options, **overrides}
        if language == "cpp":
            return cpp_optimizer(self.optimizer, params, **options)
        return getattr(optim, self.optimizer)(params, **options)

    def start(self) -> tuple[dict[str, Tensor], Loss]:
        """Fresh parameters of this case's problem and their loss."""
        params, loss = getattr(problems, self.problem)()
        return params, loss

    def step(self, optimizer: Any, loss: Loss) -> Any:
        """One step that makes ``loss`` smaller, whatever the optimizer needs for it."""
        if self.driver == "population":

            def values(population: Any) -> Tensor:
                found = []
                for i in range(len(population)):
                    with member(population, i):
                        found.append(loss().detach() * self.loss_sign)
                return torch.stack(found)

            return optimizer.step(values)
        if self.driver in ("graph_closure", "grad", "loss"):
            return optimizer.step(lambda: loss() * self.loss_sign)
        if self.driver == "counts":
            for layer, ids in enumerate(loss.ids() if isinstance(loss, problems.ExpertScores) else []):
                if isinstance(optimizer, _C.CppOptimizer):
                    optimizer.call("record", layer, ids)
                else:
                    optimizer.record(layer, ids)
            return optimizer.step(loss)
        raise NotImplementedError(f"no driver {self.driver!r}")

    def run(self, optimizer: Any, loss: Loss, steps: int) -> None:
        for _ in range(steps):
            self.step(optimizer, loss)


def cases() -> list[Case]:
    """All variants of all optimizers of ``tests/optim_db.json`` (in the source tree only)."""
    from torch_ext.testing.make_optim_db import PATH  # here: that module is also a program

    table: dict[str, Any] = json.loads(PATH.read_text())
    return [
        Case(
            optimizer=name,
            variant=variant["name"],
            driver=row["driver"],
            problem=row["problem"],
            options=variant["options"],
            loss_sign=variant["loss_sign"],
            rtol=variant["rtol"],
            trajectory=variant["trajectory"],
        )
        for name, row in table.items()
        for variant in row["variants"]
    ]


def bits(value: Any) -> Any:
    """A value that is equal to another's exactly if they have the same bits, types and structure."""
    if isinstance(value, Tensor):
        content = (
            value.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
        return str(value.dtype), tuple(value.shape), content
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value
