// What the operators of ops/snell share: checks, the threshold, and products with the update that exists tile by tile.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "ops/snell/snell_kernel.h"

namespace torch_ext::ops {

// The factors in their arithmetic type, with what the kernels need.
struct SnellLayer {
  at::Tensor a;  // [2, rows, q] contiguous
  at::Tensor b;  // [2 q, columns] contiguous
  kernels::SnellWeights weights;
  core::DType type;
  bool exact;

  bool on_cuda() const { return a.is_cuda(); }
  int64_t entries() const { return weights.rows * weights.columns; }
};

// Everything about shapes, types and options that meta tensors show too.
void check_snell(const char* op, const at::Tensor& a, const at::Tensor& b, double scale, double sparsity,
                 std::string_view sparsifier, std::string_view grad);
void check_snell_input(const char* op, const at::Tensor& x, const at::Tensor& a);

// Checked factors, ready for the kernels. `values` refuses NaN and infinity too (on the CPU; on CUDA that would wait
// for the device, and a NaN goes through to the output).
SnellLayer make_snell_layer(const char* op, const at::Tensor& a, const at::Tensor& b, double scale,
                            std::string_view sparsifier, std::string_view grad, bool values);

// The threshold of Eq. 5, a 0-dim tensor of the arithmetic type. "code": linear-interpolation quantile; "paper",
// "hard", "soft": the ceil(sparsity * entries)-th smallest magnitude, 0 if sparsity is 0; "none": 0.
at::Tensor snell_threshold(const SnellLayer& layer, double sparsity);

// out = phi(W).
void snell_fill(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& out);

// x [n, rows] -> x phi(W) [n, columns]; transposed: x [n, columns] -> x phi(W)^T [n, rows].
at::Tensor snell_product(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& x, bool transposed);

struct SnellGradients {
  at::Tensor x, a, b;
};
// The gradients of sum(grad_y * (x phi(W))); x only if asked for. `pulled`: t depends on the factors.
SnellGradients snell_gradients(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& x,
                               const at::Tensor& grad_y, bool pulled, bool want_x);

}  // namespace torch_ext::ops
