// The operators that take an encoded network, as C++ functions.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "ops/local_lipschitz/lipschitz_bounds.h"
#include "ops/local_lipschitz/lipschitz_layers.h"

namespace torch_ext::ops {

// A network and boxes [boxes, input] that have been checked. Autocast is off while it lives: half-precision products
// would void every bound.
class LipschitzProblem {
 public:
  LipschitzProblem(const char* what, at::TensorList tensors, at::IntArrayRef layers, at::ArrayRef<double> numbers,
                   std::string_view names, const at::Tensor& lo, const at::Tensor& hi);
  LipschitzNetwork network;
  at::Tensor lo, hi;  // flat

 private:
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

// [x - eps, x + eps], eps a number or per feature (it broadcasts); rounded outward if `safe`.
std::tuple<at::Tensor, at::Tensor> lipschitz_box(const at::Tensor& x, const at::Tensor& eps, bool safe);

}  // namespace torch_ext::ops
