// Certificates of monotonicity from the bounds of torch_ext/ops/local_lipschitz.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch_ext/export.h>

namespace torch_ext::solvers {

// Boxes [lo, hi], both [boxes, ...] -> int8 [boxes, outputs, features]: 1 where the output provably never falls as the
// feature grows (the lower bound of J is >= 0, so also where it does not depend on it), -1 where it never rises (the
// upper bound is <= 0), else 0: not decided. safe: as in LocalLipschitzOptions; rounding outward then leaves exact
// zeros undecided. Errors as in ops::local_lipschitz.
TORCH_EXT_API at::Tensor monotonicity(const torch::nn::Module& model, const at::Tensor& lo, const at::Tensor& hi,
                                      bool safe = false);

}  // namespace torch_ext::solvers
