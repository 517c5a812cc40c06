// Hessian-vector products.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <functional>
#include <string>
#include <vector>

namespace torch_ext::curvature {

// Returns the scalar loss, with its graph.
using LossFn = std::function<at::Tensor()>;

// H v for H the Hessian of `loss` with respect to all of `params` jointly, by double backward (Pearlmutter's trick):
// differentiate <grad loss, v>. `loss` is a scalar with a graph, which is kept; v has the shapes of params. A parameter
// that does not enter the loss, or enters linearly, gets zeros. The result carries no graph.
// Errors: ValueError for lengths or shapes, RuntimeError with a hint if an op has no second derivative.
TORCH_EXT_API std::vector<at::Tensor> hvp(const at::Tensor& loss, at::TensorList params, at::TensorList v);

// The same through a loss function. mode "double_backward" calls it once; "finite_difference" twice at shifted
// parameters, (g(p + h v) - g(p - h v)) / 2h with h = rho max(|p|_2 / sqrt(d), 1e-3), rho = 1e-4 if all parameters are
// float64 and 1e-2 otherwise: needs no second derivative and the memory of a first-order step, but a smooth,
// deterministic loss (the generators are replayed for each call; running statistics are the caller's). Parameters are
// restored to the bit, also when the loss throws.
TORCH_EXT_API std::vector<at::Tensor> hvp(const LossFn& loss, at::TensorList params, at::TensorList v,
                                          const std::string& mode);

}  // namespace torch_ext::curvature
