// What one AdaHessian step reads: gradients and, on refresh steps, curvature estimates. Shared by both languages.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "curvature/hutchinson_diag/hutchinson_diag.h"
#include "optim/base/closure.h"

namespace torch_ext::optim {

struct AdaHessianRequest {
  std::vector<at::Tensor> params;  // that require gradients, in order; ordinals in probes
  curvature::Probes probes;
  bool refresh;            // curvature is wanted
  bool finite_difference;  // instead of double backward
  bool magnitude_only;     // no group averages signed values
  bool scaler_unscaled;    // a GradScaler has divided .grad by a scale that second derivatives still carry
  std::optional<std::vector<at::Tensor>> hessian;  // the user's (averaged) diagonal: one per parameter of the optimizer
  size_t n_params;                                 // of the optimizer, those included that need no gradient
  Closure closure, curvature_closure;
};

struct AdaHessianDerivatives {
  at::Tensor loss;
  std::vector<at::Tensor> grads;      // undefined where a parameter has none; without graph
  std::vector<at::Tensor> curvature;  // empty unless refresh
};

// Checks that both languages make before anything runs: ValueError unless the scale is in (0, inf); RuntimeError if the
// parameters that take part are no longer those whose gradients accumulate() has summed.
TORCH_EXT_API void adahessian_check_loss_scale(double scale);
TORCH_EXT_API void adahessian_check_same_params(const std::vector<at::Tensor>& summed,
                                                const std::vector<at::Tensor>& now);

TORCH_EXT_API AdaHessianDerivatives adahessian_derivatives(const AdaHessianRequest& request);

// Micro-batches: sums of weight * gradient and weight * curvature, in the arithmetic dtype; empty before the first.
struct AdaHessianSums {
  std::vector<at::Tensor> grads, curvature;
};
TORCH_EXT_API void adahessian_accumulate(AdaHessianSums& sums, const AdaHessianRequest& request, const at::Tensor& loss,
                                         double weight);

}  // namespace torch_ext::optim
