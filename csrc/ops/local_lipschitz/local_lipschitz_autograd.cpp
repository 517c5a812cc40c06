#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <utility>

#include "core/library.h"
#include "ops/local_lipschitz/lipschitz_relax.h"

namespace torch_ext::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Gradients that say so when they are differentiated again. They stay tied to what they were computed from: the engine
// passes over a node that leads to none of the tensors it is asked about.
variable_list only_once(variable_list grads, const variable_list& saved, const variable_list& incoming) {
  if (!at::GradMode::is_enabled()) return grads;
  const size_t count = grads.size();
  for (at::Tensor& grad : grads) grad = grad.detach();
  for (const variable_list* tensors : {&saved, &incoming}) {
    for (const at::Tensor& tensor : *tensors) {
      if (tensor.defined()) grads.push_back(tensor);
    }
  }
  const auto inputs = static_cast<int64_t>(grads.size());
  torch::autograd::DelayedError error("local_lipschitz has no second derivative", inputs);
  variable_list results = error(std::move(grads));
  results.resize(count);
  return results;
}

struct Lines : torch::autograd::Function<Lines> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gl, const at::Tensor& gu, const at::Tensor& sl,
                            const at::Tensor& su, bool constant) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gl, gu, sl, su});
    ctx->saved_data["constant"] = constant;
    return lipschitz_lines(gl, gu, sl, su, constant);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const bool constant = ctx->saved_data["constant"].toBool();
    LipschitzLinesGrads ends;
    {
      const at::AutoGradMode disabled(false);
      ends = lipschitz_lines_backward(grads[0], saved[0], saved[1], saved[2], saved[3], constant);
    }
    auto [gl, gu, sl, su] = ends;
    variable_list results = only_once({gl, gu, sl, su}, saved, grads);
    results.emplace_back();
    return results;
  }
};

struct Relax : torch::autograd::Function<Relax> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& lines, bool mirror) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({a, lines});
    ctx->saved_data["mirror"] = mirror;
    const auto [out, c] = lipschitz_relax(a, lines, mirror);
    return {out, c};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    std::tuple<at::Tensor, at::Tensor> ends;
    {
      const at::AutoGradMode disabled(false);
      ends = lipschitz_relax_backward(grads[0], grads[1], saved[0], saved[1], ctx->saved_data["mirror"].toBool());
    }
    variable_list results = only_once({std::get<0>(ends), std::get<1>(ends)}, saved, grads);
    results.emplace_back();
    return results;
  }
};

at::Tensor lines_autograd(const at::Tensor& gl, const at::Tensor& gu, const at::Tensor& sl, const at::Tensor& su,
                          bool constant) {
  return Lines::apply(gl, gu, sl, su, constant);
}

std::tuple<at::Tensor, at::Tensor> relax_autograd(const at::Tensor& a, const at::Tensor& lines, bool mirror) {
  const auto out = Relax::apply(a, lines, mirror);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("lipschitz_lines", lines_autograd);
  m.impl("lipschitz_relax", relax_autograd);
  m.impl("lipschitz_lines_backward", core::not_differentiable());
  m.impl("lipschitz_relax_backward", core::not_differentiable());
}

}  // namespace torch_ext::ops
