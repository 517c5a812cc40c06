// Branch and bound on the local Lipschitz constant of torch_ext/ops/local_lipschitz.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>

namespace torch_ext::solvers {

struct LipschitzBabOptions {
  TORCH_ARG(std::optional<int64_t>, output) = std::nullopt;  // the row of J; the largest of all rows if not given
  // "input" halves the box along the feature of the largest width times |J|, and bounds both halves anew. It converges
  // to L where kinks of the network do not coincide (a network without biases keeps all of them at 0); for few
  // features. "activation" fixes the slope of an open ReLU to one of its ends and keeps the forward bounds. It
  // converges to the largest norm over all patterns of the open ReLUs, which need not occur in the box: an upper bound
  // of L. For many.
  TORCH_ARG(std::string, split) = "input";
  TORCH_ARG(int64_t, max_nodes) = 1000;                          // boxes bounded, the root included
  TORCH_ARG(std::optional<double>, max_seconds) = std::nullopt;  // wall time, looked at between batches
  TORCH_ARG(double, tol) = 1e-6;                                 // stops at upper - lower <= tol upper
  TORCH_ARG(bool, safe) = false;                                 // as in LocalLipschitzOptions
};

struct LipschitzBabResult {
  double upper, lower;  // lower <= L <= upper, whenever it stops; lower is a norm of J at some point of the box
  int64_t nodes;
};

// The box [lo, hi], each shaped like one input of the model. Up to 128 boxes at a time, best first; a child's bound is
// never above its parent's, so that more nodes never loosen the result.
// Errors: those of ops::local_lipschitz; ValueError for max_nodes < 1, tol or max_seconds < 0, another split, an output
// that does not exist, and split = "activation" with smooth activations.
TORCH_EXT_API LipschitzBabResult lipschitz_bab(const torch::nn::Module& model, const at::Tensor& lo,
                                               const at::Tensor& hi, const LipschitzBabOptions& options = {});

}  // namespace torch_ext::solvers
