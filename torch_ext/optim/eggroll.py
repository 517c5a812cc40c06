"""EGGROLL: evolution strategies with low-rank perturbations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from torch_ext import _C
from torch_ext.optim._base import Optimizer, ParamsT
from torch_ext.optim.population import Population

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PopulationClosure: TypeAlias = Callable[[Population], Tensor]


class Eggroll(Optimizer):
    r"""EGGROLL of Sarkar et al. (arXiv:2511.16652): trains what is not or cannot be differentiated, from values alone.

    N members evaluate :math:`W + s_i \sigma E_p`, :math:`E_p = A_p B_p^T / \sqrt{\mathtt{rank}}` for matrices and full
    noise for vectors; members 2p and 2p + 1 are a pair with opposite signs. With f = -value (value with
    ``maximize``):

    .. math::
        c_p &= z_{2p} - z_{2p+1}, \quad z = \mathrm{shaping}(f) \\
        G &= -\kappa \sum_p c_p E_p \\
        b &= \mathtt{momentum} \, b + (G + \mathtt{weight\_decay} \, p), \quad p = p - \mathtt{lr} \, b

    Values are minimised, rewards pass ``maximize=True``. ::

        opt = torch_ext.optim.Eggroll(model.parameters(), lr=0.1, sigma=0.1, population=128)
        torch_ext.nn.eggroll_convert(model)
        pop = opt.ask()
        with pop.applied_to(model):
            logits = model(x.expand(len(pop), *x.shape))  # [members, rows, classes]
        opt.tell(losses(logits))  # [members]

    or in one call ``opt.step(closure)`` with ``closure(pop)`` returning the values. ``opt.tell(values, update=False)``
    leaves G, the pseudo-gradient of what is minimised, in ``.grad`` for any other optimizer (Adam is what works best
    on small networks) instead of taking a step.

    Args:
        params: parameters, named parameters or groups; float32, float64, bfloat16 or float16. What is not passed, or
            requires no gradient, is neither perturbed nor updated.
        lr: step size in [0, inf).
        momentum: in [0, 1).
        weight_decay: in [0, inf), added to G times the parameter.
        kind: how a group is perturbed: ``"matrix"`` and ``"embedding"`` (low rank, as [size 0, rest]) or ``"vector"``
            (full). None: two or more dimensions are a matrix, fewer a vector. All further options are the same in all
            groups.
        sigma: size of the perturbations, in (0, inf); :meth:`set_sigma` changes it.
        rank: of a perturbation, 1 ... min(m, n); it hardly matters.
        population: N, even with antithetic pairs. The option that matters most, then sigma, then lr.
        antithetic: members come in pairs with opposite noise.
        group_size: consecutive members that were given the same task, for ``"grouped"`` and ``"baseline"``.
        noise_reuse: updates that see the same noise; 0: all of them.
        shaping: ``"zscore"``; ``"grouped"`` (mean of the group, deviation of all); ``"centered_rank"``; ``"sign"``
            (which member of a pair is better); ``"raw"``; ``"softmax"``; ``"baseline"`` (compares with the first pair
            of a group, which carries no noise; the authors clip G to norm 1 with it: ``update=False`` and
            ``clip_grad_norm_``). Values that are all equal give a zero update.
        temperature: of ``"softmax"``.
        noise: its law. The last three are cheaper, and sums over them do not depend on the order.
        update_scale: kappa. ``"reference"`` (authors' code) sigma / sqrt(N): a step of about lr sigma sqrt(N) with
            z-scores, so halve lr when N grows fourfold; ``"paper"`` 1 / N; ``"unbiased"`` 1 / (N sigma), with
            ``shaping="raw"`` the gradient of the smoothed mean value.
        nonfinite: values that are infinite or NaN are an error (reading them waits for the device), or with ``"min"``
            count as the worst finite value.
        chunk_members: members of one call of ``step``'s closure. None: all that this process evaluates. A number makes
            every call equally large for any number of processes.
        seed: key of the noise.
        maximize: values are to become larger.
        process_group: every process evaluates a share of the members and all gather the values: 4 bytes each, with
            ``"sign"`` a fifth of a byte a pair. Each then makes the same update. None: not distributed.

    State of a parameter: ``step`` (float32) and with momentum ``momentum_buffer``. Memory: those, G of one parameter at
    a time and a bounded workspace, whatever N is; no noise is stored. A checkpoint holds all that a run needs to go on
    bit for bit. bfloat16 parameters do not move by steps below 2^-9 of their size: keep what is trained in float32.

    Raises:
        ValueError: an option is out of range, parameters are repeated, a rank is above min(m, n), values are not one
            per member or not finite, parameters or options changed between ``ask`` and ``tell``. Nothing is changed.
        RuntimeError: complex parameters, ``tell`` before ``ask``.
    """

    _name = "Eggroll"
    #: Each process computes a share of the rows of G and all gather it, instead of each computing all of it.
    sharded_update = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        kind: Literal["matrix", "embedding", "vector"] | None = None,
        sigma: float = 1e-2,
        rank: int = 1,
        population: int = 256,
        antithetic: bool = True,
        group_size: int = 0,
        noise_reuse: int = 1,
        shaping: Literal["zscore", "grouped", "centered_rank", "sign", "raw", "softmax", "baseline"] = "zscore",
        temperature: float = 1.0,
        noise: Literal["gaussian", "binomial16", "binomial64", "rademacher"] = "gaussian",
        update_scale: Literal["reference", "paper", "unbiased"] = "reference",
        nonfinite: Literal["error", "min"] = "error",
        chunk_members: int | None = None,
        seed: int = 0,
        maximize: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "kind": kind,
            "sigma": sigma,
            "rank": rank,
            "population": population,
            "antithetic": antithetic,
            "group_size": group_size,
            "noise_reuse": noise_reuse,
            "shaping": shaping,
            "temperature": temperature,
            "noise": noise,
            "update_scale": update_scale,
            "nonfinite": nonfinite,
            "chunk_members": chunk_members,
            "seed": seed,
            "maximize": maximize,
        }
        self._asked: _C.Population | None = None
        super().__init__(params, options, process_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._asked = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._asked = None

    @property
    def updates(self) -> int:
        """Updates so far, skipped ones and those with ``update=False`` too."""
        return self._counter_value("global_updates")

    @property
    def members(self) -> range:
        """The members that this process evaluates."""
        return range(*_C.eggroll_members(self.param_groups[0], self._group_of_step()))

    def set_sigma(self, sigma: float) -> None:
        """Another sigma in all groups, from the next :meth:`ask` on."""
        checked = self._checked({**self.defaults, "sigma": sigma})["sigma"]
        for options in (self.defaults, *self.param_groups):
            options["sigma"] = checked

    def ask(self, begin: int = 0, end: int | None = None) -> Population:
        """Members [begin, end) of the next update.

        Args:
            begin, end: even with antithetic pairs. Without them all that this process has to evaluate. May be called
                several times for one update.
        """
        self._check_edited_options()
        return self._ask(begin, end)

    @_disable_dynamo
    def _ask(self, begin: int = 0, end: int | None = None) -> Population:
        own, total = self.members, self.param_groups[0]["population"]
        if begin == 0 and end is None:
            begin, end = own.start, own.stop
        self._asked = _C.Population(self.param_groups, self.updates, begin, total if end is None else end)
        return Population(self._asked)

    def tell(self, values: Tensor, *, update: bool = True) -> Tensor:
        """The update from the values of all members that this process evaluates, in their order.

        Args:
            values: [members], of any real dtype.
            update: False: no parameter changes and no step hooks run, G is left in ``.grad``. The next population sees
                new noise all the same.

        Returns:
            the mean of all values (with several processes and ``"sign"``, of the own ones), a 0-dim float64 tensor.
        """
        if update:
            mean: Tensor = self.step(values=values)
            return mean
        return self._tell(values, update=False)

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, *, values: Tensor | None = None) -> Any:
        """One update.

        Args:
            closure: takes a :class:`~torch_ext.optim.population.Population` and returns its values, [len(population)];
                called for ``chunk_members`` members at a time.
            values: instead of a closure: those of the population that was asked for, as :meth:`tell` takes them.

        Returns:
            the mean value, see :meth:`tell`.
        """
        try:
            if values is not None:
                if closure is not None:
                    raise ValueError("Eggroll: step() takes a closure or values, not both")
                return self._tell(values, update=True)
            if closure is None:
                raise ValueError(
                    "Eggroll: step() needs a closure that returns the members' values; or use ask() and tell()"
                )
            return self._tell(self._evaluate(closure), update=True)
        except BaseException:
            self._abandon_step()
            raise

    @_disable_dynamo
    def _evaluate(self, closure: PopulationClosure) -> Tensor:
        """The values of this process's members, chunk by chunk."""
        self._check_edited_options()
        parts = []
        for begin, end in _C.eggroll_chunks(self.param_groups[0], self._group_of_step()):
            part = closure(self._ask(begin, end))
            if not isinstance(part, Tensor):
                raise TypeError("Eggroll: the closure must return a tensor with one value for each member")
            _C.eggroll_check_values(part, len(range(begin, end)))
            parts.append(part.detach())
        if not parts:  # more processes than chunks
            self._ask(0, self.param_groups[0]["population"])
            return torch.empty(0, device=self._first_param.device, dtype=torch.float32)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @_disable_dynamo
    @torch.no_grad()
    def _tell(self, values: Tensor, *, update: bool) -> Tensor:
        asked = self._asked
        if asked is None:
            raise RuntimeError("Eggroll: tell() without ask(): the values belong to no population")
        group = self._group_of_step()
        self._check_edited_options()
        now = _C.Population(self.param_groups, self.updates, 0, self.param_groups[0]["population"])
        if not asked.same_as(now):
            raise ValueError("Eggroll: parameters or options changed between ask() and tell(): ask again")
        coefficients, mean, nonfinite = _C.eggroll_shaped(self.param_groups[0], values, group)
        self._asked = None
        _C.eggroll_update(
            self.param_groups,
            asked,
            self.state.__getitem__,
            coefficients,
            nonfinite,
            self._counter("global_skipped"),
            update,
            group,
            self.sharded_update,
        )
        self._counter("global_updates", on_cpu=True).add_(1)
        result: Tensor = mean
        return result

    def check_parameters(self) -> None:
        """RuntimeError unless the parameters have the same bits on all processes."""
        every = [param for group in self.param_groups for param in group["params"]]
        _C.eggroll_check_equal(every, self._group_of_step())

    def _check_state(self, param: Tensor, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        _C.eggroll_check_state(param, options, state)
