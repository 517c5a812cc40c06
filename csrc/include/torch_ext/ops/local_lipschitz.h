// Certified bounds of the Jacobian of a network over boxes, and with them of its local Lipschitz constant
// (Shi et al., NeurIPS 2022, arXiv:2210.07394).
//
//   f(x) = W_n h_{n-1} + b_n,  h_k = sigma(z_k),  z_k = W_k h_{k-1} + b_k,  h_0 = x in [x - eps, x + eps]
//   J = W_n S_{n-1} W_{n-1} ... S_1 W_1,  S_k = diag(s_k),  s_k in the range of sigma' on the bounds of z_k
//   L_i = sup sum_j |J_ij| >= sup |f_i(x) - f_i(y)| / ||x - y||_inf
//
// J is the set that the chain rule gives with Clarke's slopes: [0, 1] for a ReLU at 0. Forward, the z_k are bounded;
// backward, each row of the Jacobian is the gradient g_k of one output, whose product with s_k is relaxed to the lines
// through the corners of their box, and the bound of every entry is propagated back to the constants. Layers: Linear,
// Conv2d, BatchNorm1d and 2d in eval mode, ReLU, LeakyReLU, Tanh, Sigmoid, Softplus, GELU, SiLU, Flatten, Dropout (as
// in eval mode), Identity, Sequential, torch_ext::nn::Residual.
//
// Memory: one matrix of coefficients, twice the widest layer squared, for as many boxes and outputs at a time as fit a
// cache; if a gradient is wanted, for all of them and every layer.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torch_ext::ops {

struct LocalLipschitzOptions {
  // "crown": linear bounds of the z_k, intersected with interval arithmetic. "ibp": interval arithmetic alone.
  TORCH_ARG(std::string, forward) = "crown";
  // "tight": the lines above. "recurjac": constants where the sign of g_k is open (arXiv:1810.11783). "ibp": interval
  // arithmetic. Never tighter from left to right, up to rounding.
  TORCH_ARG(std::string, backward) = "tight";
  // Steps of Adam on the lower slopes of open ReLUs in the forward bounds (the published code takes 20).
  TORCH_ARG(int64_t, alpha_iters) = 0;
  TORCH_ARG(std::optional<std::vector<int64_t>>, outputs) = std::nullopt;  // rows of J; all if not given
  // Rounds outward: every sum of k terms is enlarged by k u / (1 - k u) of the sum of magnitudes.
  TORCH_ARG(bool, safe) = false;
  // Takes the bounds within for constants when differentiating: still valid bounds, half the memory and time, but not
  // the gradient of the bound.
  TORCH_ARG(bool, detach_intermediate) = false;
};

// x [boxes, ...], float64 or float32, eps >= 0: a number, or a tensor that broadcasts over x. -> L [boxes, outputs],
// and lower and upper bounds of J [boxes, outputs, features]. Differentiable once in x, eps and the model's parameters,
// piecewise smooth; with ReLUs alone piecewise constant in x, eps and the biases, which then get no gradient. Bounds
// that overflow are infinite, never NaN. At eps = 0, where no z_k is 0, L is the norm of J(x). Errors: TypeError naming
// a layer that has no bound, and for other dtypes; ValueError for options, shapes, NaN, eps < 0, a BatchNorm in
// training mode, and float32 while TF32 or bfloat16 products are on (autocast is ignored).
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor, at::Tensor> local_lipschitz(const torch::nn::Module& model,
                                                                             const at::Tensor& x, double eps,
                                                                             const LocalLipschitzOptions& options = {});
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor, at::Tensor> local_lipschitz(const torch::nn::Module& model,
                                                                             const at::Tensor& x, const at::Tensor& eps,
                                                                             const LocalLipschitzOptions& options = {});

}  // namespace torch_ext::ops
