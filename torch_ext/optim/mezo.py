"""MeZO: fine-tuning with the memory of inference, from two losses a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_ext import _C
from torch_ext.optim._base import Closure, Optimizer, ParamsT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MeZO(Optimizer):
    r"""MeZO of Malladi et al. (arXiv:2305.17333): one pair of members with full-rank noise and raw values.

    .. math::
        s &= \frac{L(p + \epsilon z) - L(p - \epsilon z)}{2 \epsilon}, \quad z \sim N(0, I) \\
        p &= p - \mathtt{lr} \, (s z + \mathtt{weight\_decay} \, p)

    z is a function of seed, step, parameter and element and never stored. The losses are taken at the parameters' own
    storage, for modules of any kind, and before the update the parameters have their old bits again. Adding and
    subtracting the same noise does not give them back (the authors' code drifts): an element whose exponent grew has
    lost bits. Those elements and a bit for every element are kept during a forward pass: numel / 8 bytes, and about 8 %
    of the parameters' memory where they are of size 0.02. Where eps is far above the parameters that is a copy. ::

        opt = torch_ext.optim.MeZO(model.parameters(), lr=1e-6)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    Args:
        params: parameters, named parameters or groups; float32, float64, bfloat16 or float16. Those that require no
            gradient are left alone.
        lr: step size in [0, inf) (1e-6 or 1e-7 for whole language models, the paper).
        eps: size of the perturbation in (0, inf), the same in all groups (1e-3, the paper).
        weight_decay: in [0, inf).
        seed: key of the noise, the same in all groups.
        maximize: ascend.
        process_group: average the losses over these processes; each sees its own share of the data, and all make the
            same update. None: not distributed.

    State of a parameter: ``step`` (float32).

    Raises:
        ValueError: an option is out of range, parameters are repeated.
        RuntimeError: complex parameters; a step without a closure or a closure without a loss.
    """

    _name = "MeZO"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-6,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        maximize: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        options = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": seed, "maximize": maximize}
        super().__init__(params, options, process_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update.

        Args:
            closure: returns the loss at the parameters as they are; called twice, without gradients, and must see the
                same data both times. If it raises, parameters and state are as they were.

        Returns:
            the mean of both losses, a 0-dim float64 tensor. If their difference is infinite or NaN nothing changes but
            :attr:`skipped_steps`.
        """
        try:
            return self._step(closure)
        except BaseException:
            self._abandon_step()
            raise

    def _step(self, closure: Closure | None) -> Tensor:
        self._check_edited_options()
        calls = self._counter_value("global_calls")
        mean: Tensor
        mean, slope = _C.mezo_losses(self.param_groups, calls, closure, self._group_of_step())
        _C.mezo_update(self.param_groups, calls, slope, self._counter("global_skipped"), self.state.__getitem__)
        self._counter("global_calls", on_cpu=True).add_(1)
        return mean

    def _check_state(self, param: Tensor, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        _C.mezo_check_state(param, state)
