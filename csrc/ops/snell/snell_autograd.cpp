#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch_ext/ops/snell.h>

#include <string>

#include "ops/snell/snell_op.h"

namespace torch_ext::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void save_options(AutogradContext* ctx, double scale, double sparsity, const std::string& sparsifier,
                  const std::string& grad) {
  ctx->saved_data["scale"] = scale;
  ctx->saved_data["sparsity"] = sparsity;
  ctx->saved_data["sparsifier"] = sparsifier;
  ctx->saved_data["grad"] = grad;
}

// Saves x, the factors and the threshold; nothing of the size of W.
struct SnellLinear : torch::autograd::Function<SnellLinear> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                               double scale, double sparsity, const std::string& sparsifier, const std::string& grad) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, t] = snell_linear(x, a, b, scale, sparsity, sparsifier, grad);
    ctx->save_for_backward({x, a, b, t});
    ctx->mark_non_differentiable({t});
    save_options(ctx, scale, sparsity, sparsifier, grad);
    return {y, t};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    auto& data = ctx->saved_data;
    const auto [x, a, b] = snell_linear_backward(grads[0], saved[0], saved[1], saved[2], saved[3],
                                                 data["scale"].toDouble(), data["sparsity"].toDouble(),
                                                 data["sparsifier"].toStringRef(), data["grad"].toStringRef(), wanted);
    const at::Tensor none;
    return {wanted[0] ? x : none, wanted[1] ? a : none, wanted[2] ? b : none, none, none, none, none};
  }
};

struct SnellLinearBackward : torch::autograd::Function<SnellLinearBackward> {
  static variable_list forward(AutogradContext*, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& a,
                               const at::Tensor& b, const at::Tensor& t, double scale, double sparsity,
                               const std::string& sparsifier, const std::string& grad, std::array<bool, 3> wanted) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [dx, da, db] = snell_linear_backward(grad_y, x, a, b, t, scale, sparsity, sparsifier, grad, wanted);
    return {dx, da, db};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "snell_linear cannot be differentiated twice");
  }
};

std::tuple<at::Tensor, at::Tensor> linear_autograd(const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                                                   double scale, double sparsity, std::string_view sparsifier,
                                                   std::string_view grad) {
  const auto out = SnellLinear::apply(x, a, b, scale, sparsity, std::string(sparsifier), std::string(grad));
  return {out[0], out[1]};
}

SnellGrads backward_autograd(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                             const at::Tensor& t, double scale, double sparsity, std::string_view sparsifier,
                             std::string_view grad, std::array<bool, 3> wanted) {
  const auto out = SnellLinearBackward::apply(grad_y, x, a, b, t, scale, sparsity, std::string(sparsifier),
                                              std::string(grad), wanted);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("snell_linear", linear_autograd);
  m.impl("snell_linear_backward", backward_autograd);
}

}  // namespace torch_ext::ops
