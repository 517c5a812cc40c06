"""AdaHessian: Adam whose second moment is built from the Hessian diagonal instead of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from torch_ext import _C
from torch_ext.optim._base import Closure, Optimizer, ParamsT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdaHessian(Optimizer):
    r"""AdaHessian of Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney (AAAI 2021, arXiv:2006.00719).

    .. math::
        D &= \mathrm{average}\,|z \odot Hz|, \quad z_i = \pm 1 \\
        v &= b v + (1 - b) D^2, \quad b = \beta_2^{\mathtt{update\_each}} \quad \text{(on refresh steps)} \\
        m &= \beta_1 m + (1 - \beta_1) g \\
        p &= p - \mathtt{lr} \, (\hat m / (\hat v^{k/2} + \epsilon) + \mathtt{weight\_decay} \, p)

    with :math:`\hat m, \hat v` divided by 1 minus the product of their betas so far and k = ``hessian_power``.

    A step takes a closure that returns the loss and does not call backward (preferred: no graph outlives the step)::

        opt = torch_ext.optim.AdaHessian(model.parameters(), linear_averaging="row")
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    or torch's usual closure that calls ``loss.backward(create_graph=opt.is_second_order)``, or no closure after such a
    backward. The two kinds are told apart by whether the closure changed any ``.grad``.

    Args:
        params: parameters, named parameters or groups; float32, float64, bfloat16 or float16 in any memory layout.
            State of half-precision parameters is float32.
        lr: step size in [0, inf) (0.15, the authors' code). Set the power of no schedule: attach any torch scheduler.
        betas: decay of the averages of gradient and squared curvature, each in [0, 1) (authors' code).
        eps: added to the denominator after root and power, in [0, inf) (1e-4, authors' code).
        weight_decay: decoupled decay in [0, inf), multiplied by lr. The authors' script divides its 5e-4 by lr first.
        hessian_power: k in [0, 1]; 1 is diagonal Newton, 0 SGD with momentum.
        n_samples: probes averaged per refresh, >= 1; the same in all groups.
        update_each: a refresh every so many steps, >= 1, the same in all groups; the steps between are first-order. A
            refresh that is skipped (non-finite) is not made up before the next one is due.
        linear_averaging: blocks of 2-D parameters that share one curvature: ``"none"``, ``"row"`` (mean over dim 1) or
            ``"block"`` (``block_size`` contiguous elements of a row).
        block_size: elements per block; must divide dim 1 of each 2-D parameter.
        average_conv: average over the kernel of 3-D, 4-D and 5-D parameters.
        averaging: ``"abs_mean"`` averages \|z Hz\| (authors' code), ``"signed_mean"`` z Hz, unbiased for a block trace.
        max_update: bound on \|m_hat / denominator\| per element, > 0. Guards directions of zero curvature, where the
            step is otherwise lr g / eps.
        hvp: ``"double_backward"`` (exact) or ``"finite_difference"`` (central; a smooth deterministic loss in float32
            or float64, no second derivatives needed, closure required); the same in all groups.
        seed: key of the Philox probes; the same in all groups.
        maximize: ascend.
        process_group: average gradients and Hz over these processes before anything nonlinear; run the raw module (not
            DistributedDataParallel) on every rank. None: not distributed.

    State of a parameter: ``step`` (float32), ``exp_avg``, ``exp_hessian_diag_sq`` (one element per block),
    ``bias_products`` (float64 [2]). Memory: 4 + 4 / block bytes per parameter element (8 + 8 / block in float64), and
    the probes of the last refresh in the parameter's dtype.

    A parameter that has never seen a refresh (it joined between two) waits for the next. If any gradient or curvature
    is infinite or NaN the step changes nothing and :attr:`skipped_steps` grows. Gradient clipping changes g, not D.

    Raises:
        ValueError: an option is out of range, parameters are repeated, a block size does not divide.
        RuntimeError: sparse gradients or complex parameters; ``.grad`` without a graph on a refresh step (the message
            names ``create_graph``); an op of the model has no second derivative.
    """

    _name = "AdaHessian"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        n_samples: int = 1,
        update_each: int = 1,
        linear_averaging: Literal["none", "row", "block"] = "none",
        block_size: int = 0,
        average_conv: bool = True,
        averaging: Literal["abs_mean", "signed_mean"] = "abs_mean",
        max_update: float | None = None,
        hvp: Literal["double_backward", "finite_difference"] = "double_backward",
        seed: int = 0,
        maximize: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "n_samples": n_samples,
            "update_each": update_each,
            "linear_averaging": linear_averaging,
            "block_size": block_size,
            "average_conv": average_conv,
            "averaging": averaging,
            "max_update": max_update,
            "hvp": hvp,
            "seed": seed,
            "maximize": maximize,
        }
        # of accumulate(): the parameters that took part, the sums of their gradients and of their curvature
        self._sums: tuple[list[Tensor], list[Tensor | None], list[Tensor]] | None = None
        self._probes: list[Tensor] = []  # memory of the last refresh's probes, written over by the next
        super().__init__(params, options, process_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sums, self._probes = None, []

    @property
    def is_second_order(self) -> bool:
        """True if the next :meth:`step` refreshes by double backward, so that backward needs ``create_graph``."""
        return self._due() and self.param_groups[0]["hvp"] == "double_backward"

    def _due(self) -> bool:
        return self._counter_value("global_calls") % int(self.param_groups[0]["update_each"]) == 0

    def _differentiated(self, *, refresh: bool) -> tuple[list[Tensor], list[int], int, dict[str, Any], bool, int, bool]:
        """Arguments that say what to differentiate: parameters, their running numbers, and the probes' key."""
        every = [param for group in self.param_groups for param in group["params"]]
        ordinals = [number for number, param in enumerate(every) if param.requires_grad]
        first = self.param_groups[0]
        options = {name: first[name] for name in ("n_samples", "seed", "hvp")}
        epoch = self._counter_value("global_calls") // int(first["update_each"])
        magnitude_only = all(group["averaging"] == "abs_mean" for group in self.param_groups)
        return [every[i] for i in ordinals], ordinals, len(every), options, refresh, epoch, magnitude_only

    @torch.no_grad()
    def step(
        self,
        closure: Closure | None = None,
        *,
        curvature_closure: Closure | None = None,
        hessian: Sequence[Tensor | None] | None = None,
        loss_scale: float | None = None,
    ) -> Any:
        """One update.

        Args:
            closure: returns the loss without calling backward, or calls
                ``backward(create_graph=opt.is_second_order)`` itself. None: ``.grad`` is used.
            curvature_closure: returns the loss whose curvature a refresh takes, such as that of a quarter of the batch.
            hessian: the (averaged) Hessian diagonal of each parameter, in its shape or reduced; replaces the estimate,
                counts as a refresh and is not divided by loss_scale. None entries mean no curvature.
            loss_scale: what the loss was multiplied by; gradient and curvature are divided by it. After
                ``GradScaler.unscale_`` only the curvature is: pass ``scaler.get_scale()`` on refresh steps.

        Returns:
            what the closure returned, a loss without its graph; None without a closure.
        """
        try:
            return self._step(closure, curvature_closure, hessian, loss_scale)
        except BaseException:
            self._abandon_step()
            raise

    def _step(
        self,
        closure: Closure | None,
        curvature_closure: Closure | None,
        hessian: Sequence[Tensor | None] | None,
        loss_scale: float | None,
    ) -> Any:
        if loss_scale is not None:
            _C.adahessian_check_loss_scale(loss_scale)
        hessian = self._checked_hessian(hessian)
        self._check_edited_options()
        refresh = hessian is not None or self._due()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Any = getattr(self, "found_inf", None)
        if grad_scale is not None and loss_scale is not None:
            raise ValueError("loss_scale: the GradScaler passes its scale itself unless unscale_() was called")
        unscaled = found_inf is not None and grad_scale is None
        if not isinstance(found_inf, Tensor):  # GradScaler sums over no gradients to the int 0
            found_inf = None
        arguments = self._differentiated(refresh=refresh)
        returned: list[Any] = []
        if self._sums is not None:
            if closure is not None or curvature_closure is not None or hessian is not None:
                raise RuntimeError("AdaHessian: accumulate() was called: step() takes its sums and no closure")
            (summed, grads, curvature), self._sums = self._sums, None
            _C.adahessian_check_same_params(summed, arguments[0])
            refresh = bool(curvature)  # accumulate() has decided
        else:

            def main() -> Any:  # finite differences call it again, at shifted parameters
                value = closure() if closure is not None else None
                if not returned:
                    returned.append(value.detach() if isinstance(value, Tensor) else value)
                return value

            needs_scale = unscaled and loss_scale is None
            grads, curvature, self._probes = _C.adahessian_derivatives(
                *arguments, main if closure is not None else None, curvature_closure, hessian, needs_scale, self._probes
            )
        self._apply(
            *arguments[:2],
            grads,
            curvature,
            grad_scale,
            1.0 if loss_scale is None else float(loss_scale),
            unscaled,
            hessian is not None,
            refresh=refresh,
            found_inf=found_inf,
        )
        return returned[0] if returned else None

    def accumulate(self, loss: Tensor, weight: float = 1.0) -> None:
        """Adds ``weight`` times gradient and curvature of one micro-batch; the next :meth:`step` takes the sums.

        All micro-batches of a step share their probes, so the sums equal those of the weighted total loss. ``.grad`` is
        not touched. A micro-batch that raises discards the unfinished sums with it.
        """
        sums, self._sums = self._sums, None
        arguments = self._differentiated(refresh=self._due())
        summed, grads, curvature = sums if sums is not None else (arguments[0], [], [])
        _C.adahessian_check_same_params(summed, arguments[0])
        self._sums = (summed, *_C.adahessian_accumulate(grads, curvature, *arguments, loss, weight))

    def _checked_hessian(self, hessian: Sequence[Tensor | None] | None) -> list[Tensor | None] | None:
        if hessian is None:
            return None
        entries = [] if isinstance(hessian, Tensor) else list(hessian)
        if isinstance(hessian, Tensor) or not all(entry is None or isinstance(entry, Tensor) for entry in entries):
            raise TypeError("AdaHessian: hessian must be a list with a tensor or None for each parameter")
        return entries

    def _apply(
        self,
        params: list[Tensor],
        ordinals: list[int],
        grads: list[Tensor | None],
        curvature: list[Tensor],
        *scaling: Any,
        refresh: bool,
        found_inf: Tensor | None,
    ) -> None:
        """The update from gradients and curvature."""
        present = [grad for grad in grads if grad is not None]
        if not present:
            return
        if self._process_group is not None or self._lost_process_group:
            reduced = iter(self._mean_over_processes([*present, *curvature]))
            grads = [None if grad is None else next(reduced) for grad in grads]
            curvature = list(reduced)
        owners = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        _C.adahessian_apply(
            params,
            ordinals,
            [owners[ordinal] for ordinal in ordinals],
            grads,
            curvature,
            [None if grad is None else self.state[param] for param, grad in zip(params, grads, strict=True)],
            [{**group, "lr": float(group["lr"])} for group in self.param_groups],
            refresh,
            found_inf,
            self._counter("global_skipped"),
            *scaling,
        )
        self._counter("global_calls", on_cpu=True).add_(1)

    def _check_state(self, param: Tensor, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        _C.adahessian_check_state(param, options, state)
