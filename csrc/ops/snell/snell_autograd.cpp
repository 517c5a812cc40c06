#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>
#include <torch_ext/ops/snell.h>

#include <string>
#include <utility>
#include <vector>

#include "ops/snell/snell_layer.h"
#include "ops/snell/snell_op.h"
#include "ops/snell/snell_second.h"

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

// What ends a chain of derivatives: results that say so when they are differentiated.
variable_list without_further_derivative(variable_list results) {
  if (!at::GradMode::is_enabled()) return results;
  variable_list inputs;
  for (const at::Tensor& result : results) {
    inputs.push_back(result.defined() ? result.detach().set_requires_grad(true) : result);
  }
  const auto count = static_cast<int64_t>(inputs.size());
  torch::autograd::DelayedError error("snell_linear has no third derivative", count);
  return error(std::move(inputs));
}

struct SnellLinearBackward : torch::autograd::Function<SnellLinearBackward> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& a,
                               const at::Tensor& b, const at::Tensor& t, double scale, double sparsity,
                               const std::string& sparsifier, const std::string& grad, std::array<bool, 3> wanted) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [dx, da, db] = snell_linear_backward(grad_y, x, a, b, t, scale, sparsity, sparsifier, grad, wanted);
    ctx->save_for_backward({grad_y, x, a, b, t});
    ctx->set_materialize_grads(false);
    save_options(ctx, scale, sparsity, sparsifier, grad);
    ctx->saved_data["wanted"] = std::vector<bool>(wanted.begin(), wanted.end());
    return {dx, da, db};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto wanted = data["wanted"].toBoolList();
    const at::Tensor &dy = saved[0], &x = saved[1], &a = saved[2], &b = saved[3], &t = saved[4], none;
    variable_list results;
    {
      const at::AutoGradMode disabled(false);
      const c10::OptionalDeviceGuard guard(device_of(x));
      const SnellLayer layer =
          make_snell_layer("snell_linear", a, b, data["scale"].toDouble(), data["sparsifier"].toStringRef(),
                           data["grad"].toStringRef(), /*values=*/false);
      const auto type = layer.a.scalar_type();
      const auto wide = [&](size_t i) { return wanted[i] && grads[i].defined() ? grads[i].to(type) : none; };
      const auto matrix = [&](const at::Tensor& from, int64_t features) {
        return from.defined() ? from.to(type).reshape({-1, features}) : none;
      };
      const SnellSecond second = snell_second(layer, t, matrix(x, a.size(1)), matrix(dy, b.size(1)),
                                              {matrix(wide(0), a.size(1)), wide(1), wide(2)},
                                              /*pulled=*/data["sparsity"].toDouble() > 0);
      results = {second.grad_y.to(dy.scalar_type()).view_as(dy), second.x.to(x.scalar_type()).view_as(x),
                 second.a.to(a.scalar_type()), second.b.to(b.scalar_type())};
    }
    results = without_further_derivative(std::move(results));
    results.resize(10);  // the threshold and the options have no gradient
    return results;
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
