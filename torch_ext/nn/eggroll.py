"""Layers that compute what every member of a population does with their weights (EGGROLL, arXiv:2511.16652)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.ops.eggroll import eggroll_conv2d, eggroll_embedding, eggroll_linear, eggroll_vector
from torch_ext.optim.population import Population, PopulationLayer

Model = TypeVar("Model", bound=nn.Module)


class _EggrollLayer(PopulationLayer):
    """What the four layers share: checks, and members without noise."""

    #: Parameters by name, True for those that are perturbed as a matrix.
    _parts: ClassVar[dict[str, bool]]

    def perturbed(self) -> list[Tensor]:
        return [p for p in (getattr(self, name) for name in self._parts) if p is not None]

    def check_population(self, population: Population) -> None:
        for name, matrix in self._parts.items():
            param = getattr(self, name)
            kind = population.kind(param)
            if kind is not None and (kind != "vector") != matrix:
                raise ValueError(
                    f'Invalid kind: {type(self).__name__} perturbs its {name} as a "{"matrix" if matrix else "vector"}"'
                    f', parameter {population.ordinal(param)} is in a group with kind="{kind}"'
                )

    def _checked(self, x: Tensor, population: Population) -> Population:
        if x.dim() < 1 or x.size(0) != len(population):
            raise ValueError(
                f"{type(self).__name__}: dimension 0 of the input is the member: expected {len(population)}, got shape "
                f"{list(x.shape)}"
            )
        return population

    def _with_baseline(self, y: Tensor, x: Tensor, population: Population, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Members without noise see the plain layer: their rows of ``y`` are computed again."""
        rows = population.unperturbed_rows
        if rows is None or rows.numel() == 0:
            return y
        rows = rows.to(x.device)
        return y.index_copy(0, rows, plain(x.index_select(0, rows)))


class EggrollLinear(_EggrollLayer, nn.Linear):
    """``torch.nn.Linear``; with a population ``[members, ..., in_features] -> [members, ..., out_features]``.

    Without a population (see :meth:`Population.applied_to`) it is the plain layer, bit for bit. The same holds for the
    other layers of this module.
    """

    _parts: ClassVar = {"weight": True, "bias": False}

    def forward(self, input: Tensor) -> Tensor:
        if self._population is None:
            return super().forward(input)
        pop = self._checked(input, self._population)
        y = eggroll_linear(input, self.weight, self.bias, pop.noise, pop.ordinal(self.weight), pop.ordinal(self.bias))
        return self._with_baseline(y, input, pop, super().forward)


class EggrollEmbedding(_EggrollLayer, nn.Embedding):
    """``torch.nn.Embedding``; with a population ``[members, ...] -> [members, ..., embedding_dim]``."""

    _parts: ClassVar = {"weight": True}

    def check_population(self, population: Population) -> None:
        super().check_population(population)
        if self.max_norm is not None:
            raise ValueError("EggrollEmbedding: max_norm changes the weight while reading it and is not supported")

    def forward(self, input: Tensor) -> Tensor:
        if self._population is None:
            return super().forward(input)
        pop = self._checked(input, self._population)
        y = eggroll_embedding(input, self.weight, pop.noise, pop.ordinal(self.weight))
        return self._with_baseline(y, input, pop, super().forward)


class EggrollLayerNorm(_EggrollLayer, nn.LayerNorm):
    """``torch.nn.LayerNorm``; with a population ``[members, ..., *normalized_shape]``, gain and bias as vectors."""

    _parts: ClassVar = {"weight": False, "bias": False}

    def forward(self, input: Tensor) -> Tensor:
        if self._population is None:
            return super().forward(input)
        pop = self._checked(input, self._population)
        y = F.layer_norm(input, self.normalized_shape, None, None, self.eps)
        if self.weight is not None:
            y = y * self._of_members(self.weight, input, pop)
        if self.bias is not None:
            y = y + self._of_members(self.bias, input, pop)
        return self._with_baseline(y, input, pop, super().forward)

    def _of_members(self, theta: Tensor, x: Tensor, pop: Population) -> Tensor:
        ordinal = pop.ordinal(theta)
        if ordinal < 0:
            return theta
        between = (1,) * (x.dim() - 1 - theta.dim())
        return eggroll_vector(theta, len(pop), pop.noise, ordinal).view(len(pop), *between, *theta.shape)


class EggrollConv2d(_EggrollLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` with one group and padding by zeros.

    With a population ``[members, channels, height, width]`` or ``[members, batch, channels, height, width]``; the
    weight counts as the matrix [out_channels, in_channels * kh * kw].
    """

    _parts: ClassVar = {"weight": True, "bias": False}

    def check_population(self, population: Population) -> None:
        super().check_population(population)
        if self.groups != 1:
            raise ValueError(f"EggrollConv2d: groups={self.groups} is not supported, only 1")
        if self.padding_mode != "zeros" or self._padding() is None:
            raise ValueError("EggrollConv2d: padding must be zeros, as many on both sides")

    def _padding(self) -> tuple[int, int] | None:
        """Zeros on both sides, as torch's "valid" and "same" mean them; None if they are not equal."""
        if not isinstance(self.padding, str):
            return self.padding[0], self.padding[1]
        if self.padding == "valid":
            return 0, 0
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)

    def forward(self, input: Tensor) -> Tensor:
        if self._population is None:
            return super().forward(input)
        pop = self._checked(input, self._population)
        y = eggroll_conv2d(
            input,
            self.weight,
            self.bias,
            pop.noise,
            pop.ordinal(self.weight),
            pop.ordinal(self.bias),
            stride=self.stride,
            padding=self._padding() or (0, 0),
            dilation=self.dilation,
        )
        return self._with_baseline(y, input, pop, self._plain)

    def _plain(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1) if x.dim() == 5 else x
        y = super().forward(flat)
        return y.view(*x.shape[:2], *y.shape[1:]) if x.dim() == 5 else y


_TWINS: dict[type[nn.Module], type[_EggrollLayer]] = {
    nn.Linear: EggrollLinear,
    nn.Embedding: EggrollEmbedding,
    nn.LayerNorm: EggrollLayerNorm,
    nn.Conv2d: EggrollConv2d,
}


def eggroll_convert(model: Model) -> Model:
    """Makes every Linear, Embedding, LayerNorm and Conv2d of a model its Eggroll twin, in place.

    The modules stay the same objects with the same parameters, buffers, hooks and ``state_dict``; only their class
    changes, so that an optimizer made before or after sees no difference. Subclasses of torch's layers, which may
    compute something else, stay as they are: ``Population.applied_to`` says so if their parameters are to be perturbed.

    Returns:
        ``model``.
    """
    return _exchange(model, _TWINS)


def eggroll_revert(model: Model) -> Model:
    """The other way: torch's own layers again, in place."""
    return _exchange(model, {twin: plain for plain, twin in _TWINS.items()})


def _exchange(model: Model, classes: Mapping[Any, type[nn.Module]]) -> Model:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its inference path reads the weights of its layers without calling them; this turns it off.
            converted = isinstance(module.linear1, PopulationLayer)
            if converted and not hasattr(module, "_eggroll_fast_path"):
                module._eggroll_fast_path = module.activation_relu_or_gelu  # type: ignore[assignment]
                module.activation_relu_or_gelu = 0
            elif not converted and hasattr(module, "_eggroll_fast_path"):
                module.activation_relu_or_gelu = module._eggroll_fast_path  # type: ignore[assignment]
                del module._eggroll_fast_path
    return model
