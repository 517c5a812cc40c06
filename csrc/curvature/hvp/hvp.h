// Derivatives as the optimizers use them; the public face is <torch_ext/curvature/hvp.h>.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace torch_ext::curvature {

using GradientFn = std::function<std::vector<at::Tensor>()>;

// d loss / d params, undefined where a parameter does not enter the loss.
std::vector<at::Tensor> gradients(const at::Tensor& loss, at::TensorList params, bool create_graph, bool keep_graph);

// d <grads, v> / d params for gradients that carry a graph. Gradients that are undefined or constant contribute
// nothing, and a parameter that is not reached gets zeros. Rethrows what the engine throws with a hint at the cure.
std::vector<at::Tensor> hvp_of_gradients(at::TensorList grads, at::TensorList params, at::TensorList v,
                                         bool keep_graph);

// Central difference of the gradient along v; see <torch_ext/curvature/hvp.h>.
std::vector<at::Tensor> finite_difference_hvp(const GradientFn& gradient, at::TensorList params, at::TensorList v);

}  // namespace torch_ext::curvature
