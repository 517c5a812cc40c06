"""The damped empirical Fisher matrix of a fixed set of gradients, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor


class StaticFisher:
    """F = damping I + (1/m) sum_i g_i g_i^T over the rows of ``gradients``, in diagonal blocks; gives F^-1.

    A block of B > m columns is held as the Cholesky factor L of K = m damping I + G G^T, and
    F^-1 = (I - W^T W) / damping with W = L^-1 G; row i of W is h_i sqrt(damping / n_i) in the rank-one recursion of the
    M-FAC paper (arXiv:2107.03356, section 3.1). A block of B <= m columns is held as its inverse, from the Cholesky
    factor of damping I + G^T G / m, which does not cancel. Equal blocks are worked on together. All arithmetic is
    float64.

    Memory: the gradients, referred to and not copied (do not change them), and 8 min(B, m)^2 bytes a block; work space
    of 32 MiB, or one block of B columns if that is larger. Time: O(d m min(B, m)).

    Args:
        gradients: ``[m, d]``, one gradient a row; float32, float64, bfloat16 or float16, on any device.
        damping: > 0.
        block: columns a block, the last may be shorter; None is one block of d columns.

    Raises:
        ValueError: shapes, damping or block out of range, gradients that are not finite, or a damping that vanishes in
            float64 against the gradients' Gram matrix.
        TypeError: another dtype.
    """

    def __init__(self, gradients: Tensor, damping: float, block: int | None = None) -> None:
        factor, tail = torch.ops.torch_ext.static_fisher_factor(gradients, damping, block)
        #: ``[m, d]`` as given.
        self.gradients = gradients
        self.damping = damping
        self.block = gradients.shape[1] if block is None else min(block, gradients.shape[1])
        #: float64 ``[d // block, k, k]``, k = min(block, m): L where block > m, F^-1 elsewhere.
        self.factor: Tensor = factor
        #: The same of the shorter last block, ``[0 or 1, k', k']``.
        self.tail_factor: Tensor = tail

    @property
    def num_grads(self) -> int:
        """m."""
        return self.gradients.shape[0]

    @property
    def dim(self) -> int:
        """d."""
        return self.gradients.shape[1]

    def diag(self) -> Tensor:
        """The diagonal of F^-1, ``[d]``; float64 for float64 gradients, else float32.

        Never below 1 / F_ii, which bounds it from below.
        """
        diagonal: Tensor = torch.ops.torch_ext.static_fisher_diag(
            self.gradients, self.factor, self.tail_factor, self.damping, self.block
        )
        return diagonal

    def mul(self, x: Tensor) -> Tensor:
        """F^-1 x for x ``[..., d]``, in the dtype of x.

        In blocks of B > m it subtracts vectors of the size of \\|x\\| / damping: where x lies within the span of the
        gradients, about log10(cond F) of float64's 16 digits are lost.
        """
        product: Tensor = torch.ops.torch_ext.static_fisher_mul(
            x, self.gradients, self.factor, self.tail_factor, self.damping, self.block
        )
        return product

    def element(self, i: int, j: int) -> float:
        """(F^-1)_ij, from two columns of the gradients. Raises IndexError."""
        return float(
            torch.ops.torch_ext.static_fisher_element(
                self.gradients, self.factor, self.tail_factor, self.damping, self.block, i, j
            )
        )

    def rows(self) -> Tensor:
        """W ``[m, d]`` of every block, computed anew; dtype as :meth:`diag`."""
        rows: Tensor = torch.ops.torch_ext.static_fisher_rows(self.gradients, self.damping, self.block)
        return rows

    def __repr__(self) -> str:
        return f"StaticFisher(num_grads={self.num_grads}, dim={self.dim}, damping={self.damping}, block={self.block})"
