"""The damped empirical Fisher matrix of the last m gradients, and products with its inverse.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
arXiv:2107.03356. With the rows q_1 ... q_t of the window, oldest first (t <= m), G = [q_1; ...; q_t] and lambda the
damping::

    F = lambda I + (1/m) G^T G                          always 1/m, also while fewer than m rows have come
    K = m lambda I + G G^T                              t x t

    F^-1 x   = (x - G^T K^-1 G x) / lambda              any x (Woodbury)
    F^-1 q_t = m G^T K^-1 e_t                           the newest row (push-through identity)

The second form has no subtraction and no 1/lambda: in single precision the first one loses |q| / (lambda |F^-1 q|)
times the rounding error. A row is encoded first and everything is computed from what was stored, because the part of a
row that the window does not hold would be multiplied by 1/lambda.

Formats, over tiles of 1024 columns (the last one padded with zeros):

    ==================  ============================================================================================
    float64, float32    the row, rounded
    bfloat16            the row, rounded through float32
    int8                per 256 columns: scale = max|x| / 127 (float32), rint(x / scale) stored, meaning that * scale
    topk                per tile the ceil(topk * 1024) entries of largest magnitude, as bfloat16 with their columns
    ==================  ============================================================================================

With error feedback (always for topk; a choice for bfloat16 and int8) the row is added to what earlier rows lost in
float32, and what this one loses is kept for the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE, SCALE_BLOCK = 1024, 256
FORMATS = ("float32", "float64", "bfloat16", "int8", "topk")


def kept_per_tile(topk: float) -> int:
    """How many entries of a tile the format topk keeps."""
    return max(1, math.ceil(topk * TILE))


def stored_row(row: Tensor, window_format: str, topk: float = 0.01) -> Tensor:
    """What the window holds of ``row`` [d] after encoding and decoding: float64 for float64 and int8, else float32."""
    if window_format == "float64":
        return row.double()
    row = row.float()
    if window_format == "float32":
        return row.clone()
    if window_format == "bfloat16":
        return row.bfloat16().float()
    padded = torch.nn.functional.pad(row, (0, -row.numel() % TILE))
    if window_format == "int8":
        blocks = padded.reshape(-1, SCALE_BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        values = (blocks / scale).round().clamp(-127, 127)
        values = torch.where(scale == 0, torch.zeros_like(values), values)
        return (values.double() * scale.double()).reshape(-1)[: row.numel()]  # exact
    if window_format == "topk":
        tiles = padded.reshape(-1, TILE)
        largest = tiles.abs().sort(dim=1, descending=True, stable=True).indices[:, : kept_per_tile(topk)]
        kept = torch.zeros_like(tiles).scatter(1, largest, tiles.gather(1, largest))
        return kept.bfloat16().float().reshape(-1)[: row.numel()]
    raise ValueError(f"window_format must be one of {FORMATS}, got {window_format!r}")


class FisherWindowReference:
    """The window in plain torch on the CPU: keeps decoded rows, factorizes K anew at every product, in float64.

    Args:
        num_grads: m, >= 1. dim: d, >= 1. damping: lambda > 0. window_format: one of ``FORMATS``. topk: kept share of
        a tile. error_feedback: None is True for topk, else False.
    """

    def __init__(
        self,
        num_grads: int,
        dim: int,
        damping: float,
        window_format: str = "float32",
        *,
        topk: float = 0.01,
        error_feedback: bool = False,
    ) -> None:
        if num_grads < 1:
            raise ValueError(f"num_grads must be >= 1, got {num_grads}")
        if not 0 < damping < math.inf:
            raise ValueError(f"damping must be finite and > 0, got {damping}")
        if error_feedback and window_format in ("float32", "float64"):
            raise ValueError("error_feedback is for window_format bfloat16, int8 and topk")
        self.num_grads, self.dim, self.damping = num_grads, dim, damping
        self.window_format, self.topk = window_format, topk
        self.dtype = torch.float64 if window_format == "float64" else torch.float32
        self.error = torch.zeros(dim) if error_feedback or window_format == "topk" else None
        self.rows: list[Tensor] = []  # oldest first
        self.accepted = 0  # in total

    @property
    def count(self) -> int:
        """Rows held, at most ``num_grads``."""
        return len(self.rows)

    @property
    def matrix(self) -> Tensor:
        """G in float64, [t, d], oldest first."""
        return torch.stack(self.rows).double() if self.rows else torch.zeros(0, self.dim, dtype=torch.float64)

    def push(self, row: Tensor) -> bool:
        """Adds a row and drops the oldest of a full window; False, and nothing changes, if the row is not finite."""
        acc = row.detach().to(self.dtype) if self.error is None else self.error + row.detach().float()
        stored = stored_row(acc, self.window_format, self.topk)
        norm = stored.double().square().sum()
        if not bool(norm.isfinite()):
            return False
        if self.error is not None:
            self.error = acc - stored.float()
        self.rows = [*self.rows, stored][-self.num_grads :]
        self.accepted += 1
        return True

    def gram(self) -> Tensor:
        """G G^T without damping, float64 [t, t], oldest first."""
        return self.matrix @ self.matrix.t()

    def _solve(self, b: Tensor) -> Tensor:
        k = self.gram() + self.num_grads * self.damping * torch.eye(self.count, dtype=torch.float64)
        return torch.cholesky_solve(b.reshape(-1, 1), torch.linalg.cholesky(k)).reshape(-1)

    def coefficients(self) -> Tensor:
        """m K^-1 e_t: what each row, oldest first, counts in :meth:`solve_newest`."""
        e = torch.zeros(self.count, dtype=torch.float64)
        e[-1] = 1
        return self.num_grads * self._solve(e)

    def solve_newest(self) -> Tensor:
        """F^-1 q of the newest row, float64 [d]."""
        return self.matrix.t() @ self.coefficients()

    def ihvp(self, x: Tensor) -> Tensor:
        """F^-1 x of any x, float64 [d]."""
        x = x.double()
        if not self.rows:
            return x / self.damping
        return (x - self.matrix.t() @ self._solve(self.matrix @ x)) / self.damping


def dense_fisher(rows: Tensor, damping: float, num_grads: int | None = None) -> Tensor:
    """F itself, [d, d], of the rows [t, d]; ``num_grads`` is m, by default t."""
    m = rows.size(0) if num_grads is None else num_grads
    return damping * torch.eye(rows.size(1), dtype=rows.dtype) + rows.t() @ rows / m


def mfac_recursion(rows: Tensor, x: Tensor, damping: float) -> Tensor:
    """F^-1 x by the published recursion, in the dtype of ``rows`` [m, d], which must be a full window.

    With S = G G^T: D = strict upper part and diagonal of U - m I, U the upper factor of S / lambda + m I without
    pivoting, so that D_ij = g_i . F_{i-1}^-1 g_j with F_i the Fisher matrix of the first i rows; then::

        B_ii = 1/lambda,  B_ij = -sum_{k=j}^{i-1} D_ki / (m + D_kk) B_kj        F_{i-1}^-1 g_i = sum_j B_ij g_j
        q = G x / lambda,  q_i -= sum_{k<i} D_ki / (m + D_kk) q_k
        F^-1 x = x / lambda - G^T B^T (q / (m + diag D))

    O(m^3), and two vectors of size |x| / lambda are subtracted at the end. Slow and for comparisons only.
    """
    m = rows.size(0)
    u = rows @ rows.t() / damping + m * torch.eye(m, dtype=rows.dtype)
    for i in range(m - 1):  # elimination without pivoting; only the upper factor is needed
        u[i + 1 :, i:] -= torch.outer(u[i + 1 :, i] / u[i, i], u[i, i:])
    d = u.triu() - m * torch.eye(m, dtype=rows.dtype)
    scale = m + d.diagonal()
    b = torch.zeros(m, m, dtype=rows.dtype)
    q = rows @ x / damping
    for i in range(m):
        weights = d[:i, i] / scale[:i]
        b[i] = -(weights @ b[:i])
        b[i, i] = 1 / damping
        q[i] -= weights @ q[:i]
    return x / damping - rows.t() @ (b.t() @ (q / scale))
