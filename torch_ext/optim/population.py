"""Members of a population of perturbed parameters, as :class:`torch_ext.optim.Eggroll` asks for their values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torch_ext import _C
from torch_ext.ops.eggroll import EggrollNoise


class PopulationLayer(nn.Module):
    """A layer that computes what all members of a population do with its parameters: base of the Eggroll layers."""

    _population: Population | None = None

    def perturbed(self) -> list[Tensor]:
        """The parameters that ``forward`` perturbs."""
        raise NotImplementedError

    def check_population(self, population: Population) -> None:
        """ValueError if this layer cannot perturb its parameters in the way that the population asks for."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_population"}


class Population:
    """The members ``begin`` ... ``begin + len(population) - 1`` of one update; made by :meth:`Eggroll.ask`.

    Values and members are counted from ``begin``: entry i of the values belongs to ``member(i)``. It holds references
    to the parameters and a few numbers, no noise. ::

        with pop.applied_to(model):  # Eggroll layers: all members in one pass
            y = model(x)  # x and y are [len(pop), ..., features]
        with pop.member(3):  # any module: one member stands in the parameters
            y = model(x)
    """

    def __init__(self, members: _C.Population) -> None:
        self._members = members
        self.begin: int = members.begin
        #: Which noise the layers are to make, as the operators take it.
        self.noise = EggrollNoise(*members.noise())  # type: ignore[arg-type]  # the law's word is checked in C++
        entries = members.params()
        self.params: list[Tensor] = [param for param, _, _ in entries]
        self._ordinals = {id(param): ordinal for param, ordinal, _ in entries}
        self._kinds = {id(param): kind for param, _, kind in entries}
        #: Rows whose member carries no noise (``shaping="baseline"``).
        self.unperturbed_rows: Tensor | None = members.unperturbed_rows() if members.baseline else None

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"Population(begin={self.begin}, len={len(self)}, {self.noise})"

    def ordinal(self, param: Tensor | None) -> int:
        """The number that keys a parameter's noise; -1 for one that is not perturbed."""
        return -1 if param is None else self._ordinals.get(id(param), -1)

    def kind(self, param: Tensor | None) -> str | None:
        """How a parameter is perturbed: ``"matrix"``, ``"embedding"`` or ``"vector"``; None: not at all."""
        return None if param is None else self._kinds.get(id(param))

    @contextmanager
    def applied_to(self, *models: nn.Module) -> Iterator[Population]:
        """Inside, row i of what goes into an Eggroll layer of these models is that of member i.

        Raises ValueError if some parameter of the population is in none of their Eggroll layers, so that it would be
        updated without having been perturbed.
        """
        layers = [layer for model in models for layer in model.modules() if isinstance(layer, PopulationLayer)]
        covered = {id(param) for layer in layers for param in layer.perturbed()}
        for param in self.params:
            if id(param) not in covered:
                raise ValueError(
                    f"Eggroll: parameter {self.ordinal(param)} (shape {list(param.shape)}) is in no Eggroll layer of "
                    "this model, so it would be updated without having been perturbed: convert the model with "
                    "eggroll_convert, evaluate with member(i), or do not pass this parameter to the optimizer"
                )
        for layer in layers:
            layer.check_population(self)
        before = [layer._population for layer in layers]
        try:
            for layer in layers:
                layer._population = self
            yield self
        finally:
            for layer, population in zip(layers, before, strict=True):
                layer._population = population

    @contextmanager
    def member(self, i: int) -> Iterator[None]:
        """Inside, the parameters' own storage holds member i, for modules of any kind; afterwards the old bits.

        Costs a copy of the parameters. Raises IndexError unless ``0 <= i < len(population)``.
        """
        saved = self._members.perturb(i)
        try:
            yield
        finally:
            self._members.restore(saved)
