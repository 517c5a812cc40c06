// The two passes: bounds of what enters the activations, forward, and of the Jacobian, backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "ops/local_lipschitz/lipschitz_activation.h"
#include "ops/local_lipschitz/lipschitz_network.h"

namespace torch_ext::ops {

enum class LipschitzBackward { kTight, kRecurJac, kIbp };

struct LipschitzMethod {
  bool crown = true;
  LipschitzBackward backward = LipschitzBackward::kTight;
  int64_t alpha_iters = 0;
  bool detach_intermediate = false;
  double gamma = 0;  // 0: roundoff is not accounted for
};

// Per node, defined for activations only; [boxes, size].
using LipschitzIntervals = std::vector<LipschitzInterval>;

// Bounds of the inputs of all activations for x in [lo, hi] [boxes, input]: interval arithmetic, and with `crown`
// intersected with linear bounds propagated back to the input (CROWN, arXiv:1811.00866).
LipschitzIntervals lipschitz_forward(const LipschitzNetwork& network, const at::Tensor& lo, const at::Tensor& hi,
                                     const LipschitzMethod& method);
LipschitzIntervals lipschitz_all_slopes(const LipschitzNetwork& network, const LipschitzIntervals& inputs,
                                        const LipschitzMethod& method);

struct LipschitzJacobian {
  at::Tensor norm, lo, hi;  // [boxes, outputs], [boxes, outputs, input] twice
  // What the branching rule reads, if asked for: per activation, coefficients of its slope-times-gradient in the row of
  // the norm, and bounds of the gradient; [boxes, outputs, size].
  struct Branching {
    at::Tensor coefficients;
    LipschitzInterval gradient;
  };
  std::vector<Branching> branching;
};

// Bounds of rows `outputs` of the Jacobian, whose activations have slopes in the given ranges, and of their l1 norms.
LipschitzJacobian lipschitz_backward(const LipschitzNetwork& network, const LipschitzIntervals& slopes, int64_t boxes,
                                     const at::TensorOptions& options, at::IntArrayRef outputs,
                                     const LipschitzMethod& method, bool branching = false);
// Both passes for boxes [boxes, input].
LipschitzJacobian lipschitz_jacobian(const LipschitzNetwork& network, const at::Tensor& lo, const at::Tensor& hi,
                                     at::IntArrayRef outputs, const LipschitzMethod& method);

// ||J(x)||_1 of the rows `outputs` at points x [points, input], for one element of Clarke's Jacobian; [points,
// outputs].
at::Tensor lipschitz_norm_at(const LipschitzNetwork& network, const at::Tensor& x, at::IntArrayRef outputs);

// ValueError naming the argument.
LipschitzMethod lipschitz_method(const LipschitzNetwork& network, at::ScalarType type, std::string_view forward,
                                 std::string_view backward, int64_t alpha_iters, bool safe, bool detach_intermediate);

// Chosen rows of the output; all where none are given. ValueError for numbers that are no rows.
std::vector<int64_t> lipschitz_outputs(const LipschitzNetwork& network, at::OptionalIntArrayRef outputs);

// Products of float32 are exact to rounding (ValueError where TF32 or bfloat16 may replace them).
void lipschitz_check_precision(const LipschitzNetwork& network, const at::Tensor& input);

}  // namespace torch_ext::ops
