// The operator behind the derivative of snell_linear.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>
#include <tuple>

namespace torch_ext::ops {

using SnellGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Gradients of x, A and B; empty tensors for those that are not wanted. t is the threshold of the forward pass: another
// one, recomputed under other dtypes, could select other entries.
SnellGrads snell_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                 const at::Tensor& B, const at::Tensor& t, double scale, double sparsity,
                                 std::string_view sparsifier, std::string_view grad, std::array<bool, 3> wanted);

}  // namespace torch_ext::ops
