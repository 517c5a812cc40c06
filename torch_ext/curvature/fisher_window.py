"""The damped empirical Fisher matrix of the last m gradients, and products with its inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from torch_ext import _C

WindowFormat = Literal["float32", "float64", "bfloat16", "int8", "topk"]


class FisherWindow:
    """A sliding window of gradients for M-FAC (Frantar, Kurtic, Alistarh, arXiv:2107.03356).

    With the rows q_1 ... q_t it holds, oldest first (t <= m), G = [q_1; ...; q_t] and lambda the damping::

        F = lambda I + (1/m) G^T G                always 1/m, also while fewer than m rows have come
        K = m lambda I + G G^T                    t x t, float64
        F^-1 q_t = m G^T K^-1 e_t                 the newest row: neither a subtraction nor a division by lambda
        F^-1 x = (x - G^T K^-1 G x) / lambda      any x: loses about |x| / (lambda |F^-1 x|) times the rounding error

    No d x d matrix is formed. A row that comes costs one pass over the window (2 m d flops) and m^2, because the factor
    of K is updated and not made anew; a product costs one or two passes. A row with an infinite or NaN element is
    rejected: the rows held stay as they are, bit for bit, and ``rejected`` grows. All state is plain tensors, so
    ``copy.deepcopy``, ``pickle`` and ``torch.save`` work.

    Args:
        num_grads: m >= 1.
        dim: d >= 1.
        damping: lambda > 0.
        window_format: how rows are stored; everything is computed from what was stored. ``"float32"`` and ``"float64"``
            as they are, ``"bfloat16"`` rounded, ``"int8"`` with one scale (max / 127) per 256 elements, ``"topk"`` the
            largest ceil(topk * 1024) of each 1024 elements as bfloat16; what is left over joins the next row.
        topk: kept share, in (0, 1].
        error_feedback: what rounding loses joins the next row; for ``"bfloat16"`` and ``"int8"``, always on for
            ``"topk"``.
        device: where the window lives; rows and x may come from any device.

    Raises:
        ValueError: an argument out of range, or a window that does not fit into the device's free memory (the message
            has the bytes and the formats that would fit).
    """

    def __init__(
        self,
        num_grads: int,
        dim: int,
        damping: float,
        window_format: WindowFormat = "float32",
        *,
        topk: float = 0.01,
        error_feedback: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        _C.fisher_window_check(num_grads, dim, damping, window_format, topk, error_feedback)
        self.num_grads, self.dim, self.window_format = num_grads, dim, window_format
        self._damping = damping
        self._layout = (num_grads, dim, window_format, topk, error_feedback)
        self._state = _C.fisher_window_state(*self._layout, torch.device(device))

    def push(self, row: Tensor) -> None:
        """Adds ``row`` [d] (any floating dtype, any device), dropping the oldest of a full window.

        Raises:
            ValueError: another shape. TypeError: another dtype. RuntimeError: a sparse or complex row.
        """
        _C.fisher_window_check_row(row, self.dim, "the row")
        s, row = self._state, row.detach()
        slots = s["gram"].shape[:1]  # one number each
        dots, coefficients = s["gram"].new_empty(slots), s["gram"].new_empty(slots)
        with torch.no_grad():
            torch.ops.torch_ext.fisher_window_dots_(
                s["rows"],
                s["scales"],
                s["indices"],
                s["error"],
                dots,
                s["ring"],
                grads=[row],
                params=[row],
                weight_decay=[0.0],
                negate=False,
                grad_scale=None,
                format=self.window_format,
            )
            torch.ops.torch_ext.fisher_window_commit_(
                s["gram"], s["factor"], s["ring"], coefficients, dots, self.damping
            )

    def solve_newest(self) -> Tensor:
        """F^-1 q of the newest row q as it was stored: [d], float64 for ``"float64"``, else float32.

        Raises:
            ValueError: no row has been pushed.
        """
        if self.count == 0:
            raise ValueError("FisherWindow: there is no newest row; push one first")
        s = self._state
        newest: Tensor = torch.ops.torch_ext.fisher_window_combine(
            s["rows"], s["scales"], s["indices"], self._solve(None), s["ring"], self.dim, self.window_format
        )
        return newest

    def ihvp(self, x: Tensor) -> Tensor:
        """F^-1 x for ``x`` [d], in the dtype of :meth:`solve_newest`; x / damping while the window is empty."""
        _C.fisher_window_check_row(x, self.dim, "x")
        s, x = self._state, x.detach()
        products = torch.ops.torch_ext.fisher_window_project(
            s["rows"], s["scales"], s["indices"], s["ring"], x, self.window_format
        )
        product: Tensor = torch.ops.torch_ext.fisher_window_residual(
            s["rows"],
            s["scales"],
            s["indices"],
            self._solve(products),
            s["ring"],
            x,
            self.damping,
            self.window_format,
        )
        return product

    def gram(self) -> Tensor:
        """G G^T without damping, float64 [t, t], oldest first."""
        products: Tensor = torch.ops.torch_ext.fisher_window_gram(self._state["gram"], self._state["ring"], self.count)
        return products

    @property
    def damping(self) -> float:
        """lambda; the factor that the window keeps is of this one, so it cannot be changed."""
        return self._damping

    @property
    def count(self) -> int:
        """Rows held. On CUDA it waits for the device, as do ``rejected``, ``gram`` and ``solve_newest``."""
        return int(self._state["ring"][0])

    @property
    def rejected(self) -> int:
        """Rows rejected so far because they were not finite."""
        return int(self._state["ring"][5])

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors of the window."""
        return _C.fisher_window_bytes(*self._layout)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, not copied, and ``about``: damping and dim."""
        return {**self._state, "about": _C.fisher_window_about(self.damping, self.dim)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the tensors of another window, from any device. The factor of another damping is made anew.

        Raises:
            ValueError: they are of another num_grads, dim or window_format; nothing has changed then.
        """
        _C.fisher_window_load(*self._layout, self.damping, self._state, dict(state_dict))

    def to(self, device: torch.device | str) -> FisherWindow:
        """Moves the window, and returns it. Between CPU and CUDA the factor of K is made anew with the next call."""
        self._state = {name: tensor.to(device) for name, tensor in self._state.items()}
        return self

    def _solve(self, right_side: Tensor | None) -> Tensor:
        s = self._state
        solution: Tensor = torch.ops.torch_ext.fisher_window_solve_(
            s["gram"], s["factor"], s["ring"], right_side, self.damping
        )
        return solution
