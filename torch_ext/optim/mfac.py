"""M-FAC: natural gradient with the full empirical Fisher matrix of the last m gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from torch_ext import _C
from torch_ext.optim._base import Closure, Optimizer, ParamsT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MFAC(Optimizer):
    r"""M-FAC of Frantar, Kurtic and Alistarh (NeurIPS 2021, arXiv:2107.03356).

    All parameters of a window are one vector of d elements, and the matrix G holds its last t <= m rows:

    .. math::
        q &= g + \mathtt{weight\_decay} \, p \quad \text{(coupled decay; rounded to the window's format)} \\
        u &= F^{-1} q = m \, G^T K^{-1} e_t, \quad
        F = \lambda I + \tfrac{1}{m} G^T G, \quad K = m \lambda I + G G^T, \quad q \text{ the newest row of } G \\
        b &= \mathtt{momentum} \, b + (1 - \mathtt{dampening}) \, u \quad \text{(without momentum } b = u\text{)} \\
        p &= p - \mathtt{lr} \, b

    The form with :math:`K^{-1} e_t` does not cancel (the authors' subtracts vectors of size :math:`|g| / \lambda`), and
    the factor of K (float64) is updated in O(m^2) when the window slides. ::

        opt = torch_ext.optim.MFAC(model.parameters(), lr=1e-2, num_grads=64, damping=1e-3)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))  # or backward() and opt.step(), or torch's usual closure

    About :math:`|u| = m / |g|` when g is nearly orthogonal to the older rows: keep lr m near 0.5 ... 1 and m damping
    well below :math:`|g|^2`; for m other than 1024 scale lr and damping by 1024 / m. Where :math:`|g|^2` is much less
    than m damping a step is SGD with rate lr / damping. The step is not invariant to the scale of the loss; GradScaler
    works (the step divides by its scale).

    Args:
        params: parameters, named parameters or groups; float32, float64, bfloat16 or float16 in any memory layout. All
            of them are columns of the window, also those without a gradient: leave out what is not trained.
        lr: step size in [0, inf) (1e-3, authors' code).
        momentum: decay of the average of steps, in [0, 1).
        weight_decay: in [0, inf).
        dampening: a step enters its average with 1 - dampening, in [0, 1). None: equal to momentum, an exponential
            moving average (authors' code). 0: heavy ball.
        decoupled_weight_decay: False: decay is added to the gradient and becomes part of F (authors' code). True: p is
            multiplied by 1 - lr weight_decay.
        num_grads: m, rows of the window, >= 1 (1024, authors' code). This and the following: the same in all groups.
        damping: lambda in (0, inf) (1e-5, authors' code); :meth:`set_damping` changes it.
        window_format: how rows are stored. ``"float32"``, ``"float64"``, ``"bfloat16"``, ``"int8"`` (a scale per 256
            elements) or ``"topk"`` (the largest of each 1024 elements in bfloat16; the rest is carried to the next
            row). The step is taken from the stored row.
        topk: share of the elements that ``"topk"`` keeps, in (0, 1].
        error_feedback: carries what ``"bfloat16"`` or ``"int8"`` lost to the next row (``"topk"`` always does).
        warmup_scaling: multiplies steps by t/m while the window fills, which averages over t rows with damping
            m/t lambda; without it (authors' code) the first steps are about m/t times longer.
        warmup_steps: the first so many rows are collected while a step uses its own row alone.
        blocks: ``"global"``: one window for all parameters. ``"per_group"``: one for each group.
        window_device: where the window lives, such as ``"cpu"``. None: with the first parameter of its block.
        maximize: ascend.
        process_group: average gradients over these processes and keep a slice of the columns on each: reduce-scatter of
            the gradient, all-reduce of m + 2 numbers, all-gather of the update. Run the raw module on every rank; all
            must have gradients for the same parameters. None: not distributed.

    State of a parameter: ``step`` (float32) and with momentum ``momentum_buffer``. The first parameter of each block
    has the window besides, under ``window_*``. Memory: d (num_grads + 1) elements of the format, d rounded up to 1024
    (float32 4 bytes, float64 8, bfloat16 2, int8 1 + 1/64, topk 4 topk), 8 d bytes more with error feedback, 16 m^2 and
    more for Gram matrix and factor: :attr:`memory_bytes` says it before the first step allocates it, and
    ``TORCH_CPP_LOG_LEVEL=INFO`` prints it then.

    A parameter without a gradient has zeros in the row and is not written. Without any gradient nothing happens. If any
    gradient is infinite or NaN the step changes nothing and :attr:`skipped_steps` grows. Parameters that
    ``add_param_group`` adds later get new columns, of zeros in the rows so far.

    Raises:
        ValueError: an option is out of range, parameters are repeated, the window does not fit the memory (with the
            bytes, what is free, and the formats that would fit).
        RuntimeError: sparse gradients or complex parameters.
    """

    _name = "MFAC"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        dampening: float | None = None,
        decoupled_weight_decay: bool = False,
        num_grads: int = 1024,
        damping: float = 1e-5,
        window_format: Literal["float32", "float64", "bfloat16", "int8", "topk"] = "float32",
        topk: float = 0.01,
        error_feedback: bool = False,
        warmup_scaling: bool = False,
        warmup_steps: int = 0,
        blocks: Literal["global", "per_group"] = "global",
        window_device: str | torch.device | None = None,
        maximize: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "dampening": dampening,
            "decoupled_weight_decay": decoupled_weight_decay,
            "num_grads": num_grads,
            "damping": damping,
            "window_format": window_format,
            "topk": topk,
            "error_feedback": error_feedback,
            "warmup_scaling": warmup_scaling,
            "warmup_steps": warmup_steps,
            "blocks": blocks,
            "window_device": str(window_device) if isinstance(window_device, torch.device) else window_device,
            "maximize": maximize,
        }
        super().__init__(params, options, process_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update.

        Args:
            closure: returns the loss without calling backward, or zeroes the gradients and calls backward itself. None:
                ``.grad`` is used.

        Returns:
            what the closure returned, a loss without its graph; None without a closure.
        """
        try:
            return self._step(closure)
        except BaseException:
            self._abandon_step()
            raise

    def _step(self, closure: Closure | None) -> Any:
        self._check_edited_options()
        returned, grads = self._first_order_gradients(closure)
        self._group_of_step()
        blocks = self._blocks(grads)
        if not blocks.prepare():
            return returned
        self._keep(blocks)
        found_inf: Any = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # GradScaler sums over no gradients to the int 0
            found_inf = None
        blocks.step(getattr(self, "grad_scale", None), found_inf, self._counter("global_skipped"))
        return returned

    def precondition(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """F^-1 x with the window as it is, for one x per parameter.

        Args:
            vectors: a tensor like each parameter, of any floating dtype; None counts as zeros and stays None.

        Returns:
            tensors like ``vectors``. They are (x - G^T K^-1 G x) / damping and lose what that subtraction cancels.
        """
        _C.mfac_check_vectors([param for group in self.param_groups for param in group["params"]], list(vectors))
        self._group_of_step()
        blocks = self._blocks(list(vectors))
        result = blocks.precondition()
        self._keep(blocks)
        return result

    def set_damping(self, damping: float) -> None:
        """Another damping, from the next step on: F is that of a new object with this damping and the same rows."""
        checked = self._checked({**self.defaults, "damping": damping})["damping"]
        for options in (self.defaults, *self.param_groups):
            options["damping"] = checked

    @property
    def window_count(self) -> int:
        """Rows in the window, 0 ... num_grads; with several windows, of the fullest. (Reads the device.)"""
        return self._blocks(None).window_count()

    @property
    def memory_bytes(self) -> int:
        """Bytes of all windows of this process, known before they exist."""
        return self._blocks(None).memory_bytes()

    def state_dict(self, include_window: bool = True) -> dict[str, Any]:
        """As in torch, with an entry ``torch_ext`` that names optimizer and format; C++ reads and writes the same.

        Args:
            include_window: False leaves the windows out: the file is small, and the loaded optimizer fills new ones.
                With a process group each process saves and loads its own file; the file of one process is split when a
                group's processes load it.
        """
        result = super().state_dict()
        if not include_window:
            result["state"] = {
                index: {name: value for name, value in state.items() if not _C.mfac_is_window(name)}
                for index, state in result["state"].items()
            }
        return result

    def _blocks(self, values: list[Tensor | None] | None) -> _C.MFACBlocks:
        """The windows with their parameters, and a gradient or vector for each parameter."""
        every = [param for group in self.param_groups for param in group["params"]]
        states = [self.state.get(param) for param in every]
        given = [None for _ in every] if values is None else values
        return _C.MFACBlocks(self.param_groups, given, states, self._process_group)

    def _keep(self, blocks: _C.MFACBlocks) -> None:
        """State that a call has made or moved."""
        every = [param for group in self.param_groups for param in group["params"]]
        for ordinal, state in blocks.states().items():
            self.state[every[ordinal]].update(state)

    def _check_state(self, param: Tensor, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        _C.mfac_check_state(param, options, state)

    def _check_loaded(self, groups: list[dict[str, Any]], states: dict[int, dict[str, Any]]) -> None:
        every = [param for group in groups for param in group["params"]]
        loaded = [states.get(id(param)) for param in every]
        _C.MFACBlocks(groups, [None for _ in every], loaded, None).check_columns()
