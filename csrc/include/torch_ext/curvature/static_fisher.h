// The damped empirical Fisher matrix of a fixed set of gradients, and its inverse, without forming a d x d matrix.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>

namespace torch_ext::curvature {

// F = damping I + (1/m) sum_i g_i g_i^T over the m rows g_i of `gradients` [m, d], cut into diagonal blocks of `block`
// consecutive columns (the last block is shorter if block does not divide d; the default is one block of d columns).
//
// A block of B > m columns is held as the Cholesky factor L of K = m damping I + G G^T:
//   F^-1 = (I - W^T W) / damping,  W = L^-1 G,
// where row i of W is h_i sqrt(damping / n_i) in the rank-one recursion of the M-FAC paper (arXiv:2107.03356, section
// 3.1). A block of B <= m columns is held as its inverse, from the Cholesky factor of damping I + G^T G / m, which does
// not cancel. Blocks of equal width are worked on together, as batched matrix products; all arithmetic is float64
// whatever the dtype of the gradients.
//
// Memory: the gradients (referred to, not copied; do not change them) and 8 min(B, m)^2 bytes a block; work space of
// 32 MiB, or one block of B columns if that is larger. Time: O(d m min(B, m)).
// Errors: ValueError for shapes, damping <= 0, block < 1, gradients that are not finite, and a damping that vanishes in
// float64 against the gradients' Gram matrix; TypeError for dtypes other than float32, float64, bfloat16, float16.
class TORCH_EXT_API StaticFisher {
 public:
  StaticFisher(at::Tensor gradients, double damping, std::optional<int64_t> block = std::nullopt);

  // Diagonal of F^-1 [d]; float64 for float64 gradients, else float32. Never below 1 / F_ii, which bounds it. O(d m B)
  // for blocks of B > m columns.
  at::Tensor diag() const;
  // F^-1 x for x [..., d], in the dtype of x. For B > m it subtracts vectors of the size of |x| / damping: where x lies
  // within the span of the gradients about log10(cond F) digits are lost (of float64's 16).
  at::Tensor mul(const at::Tensor& x) const;
  // (F^-1)_ij; reads two columns.
  double element(int64_t i, int64_t j) const;
  // W [m, d] of every block, in the dtype of diag(); O(d m min(B, m)).
  at::Tensor rows() const;

  const at::Tensor& gradients() const { return gradients_; }
  double damping() const { return damping_; }
  int64_t block() const { return block_; }
  int64_t num_grads() const { return gradients_.size(0); }
  int64_t dim() const { return gradients_.size(1); }
  // [d / block, k, k] float64, k = min(block, m): L where block > m, F^-1 elsewhere; and the same of the shorter last
  // block, [0 or 1, k', k'].
  const at::Tensor& factor() const { return factor_; }
  const at::Tensor& tail_factor() const { return tail_factor_; }

 private:
  at::Tensor gradients_;
  double damping_;
  int64_t block_;
  at::Tensor factor_, tail_factor_;
};

}  // namespace torch_ext::curvature
