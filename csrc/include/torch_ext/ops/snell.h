// SNELL (Shen et al., NeurIPS 2024, arXiv:2411.01800): a sparse, full-rank update of a frozen linear layer, generated
// from two small factors whenever it is needed and never stored.
//
//   d_p[i, j] = ||A[p, i] - B[p, j]||,  p = 0, 1      W = scale (d_0 - d_1)      [in_features, out_features]
//   y = x phi(W)                                      t = threshold of |W|
//
// sparsifier  t                                                        phi(w), 0 where |w| <= t
// "code"      linear-interpolated `sparsity`-quantile of |W|           w |w|      (the published code)
// "paper"     ceil(sparsity * entries)-th smallest |W|, 0 if none      w (|w| - t)                (Eq. 5)
// "hard"      as "paper"                                               w
// "soft"      as "paper"                                               sign(w) (|w| - t)
// "none"      0                                                        w everywhere
//
// grad = "detached" takes the factor next to w in phi and the threshold for constants, as the published code does (for
// "code" that is half of the true slope); "exact" differentiates all of it, the threshold through the entry that holds
// it. Both set the gradient of a distance to 0 where two rows coincide.
//
// W, t and all sums are float32, float64 if A and B are; x may be bfloat16 or float16 beside. Besides its results an
// evaluation allocates one tile of at most 512 x 512 entries and 2 (in_features + out_features) rank numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <string_view>
#include <tuple>

namespace torch_ext::ops {

// x [..., in_features], A [2, in_features, rank / 2], B [2, out_features, rank / 2] -> y [..., out_features] in x's
// dtype (the branch only: add the frozen layer's output), and t, a 0-dim tensor on A's device without gradient.
// Differentiable twice in x, A and B.
// Errors: ValueError for shapes that do not fit, devices, sparsity outside [0, 1), a scale that is not finite, unknown
// words, and (on the CPU) a NaN or an infinity in A or B; TypeError for integer or complex dtypes, and for float64
// beside another type.
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor> snell_linear(const at::Tensor& x, const at::Tensor& A,
                                                              const at::Tensor& B, double scale, double sparsity,
                                                              std::string_view sparsifier = "code",
                                                              std::string_view grad = "detached");

// phi(W) [in_features, out_features] in A's dtype, without gradient. torch's weight of the merged layer is
// weight + snell_merge(...).t(). Same errors.
TORCH_EXT_API at::Tensor snell_merge(const at::Tensor& A, const at::Tensor& B, double scale, double sparsity,
                                     std::string_view sparsifier = "code");

}  // namespace torch_ext::ops
