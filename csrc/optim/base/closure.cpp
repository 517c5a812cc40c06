#include "optim/base/closure.h"

#include <ATen/core/grad_mode.h>

#include "core/check.h"
#include "curvature/hvp/hvp.h"

namespace torch_ext::optim {
namespace {

struct Snapshot {
  at::Tensor grad;
  uint32_t version;
};

// True if backward() has written some .grad since. zero_grad(set_to_none=False) writes zeros in place without any
// backward; with a differentiable loss in hand, all-zero gradients mean that.
bool backward_ran(const std::vector<at::Tensor>& params, const std::vector<Snapshot>& before, const at::Tensor& loss) {
  std::vector<at::Tensor> rewritten;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& grad = params[i].grad();
    if (!grad.defined()) continue;
    if (!grad.is_same(before[i].grad)) return true;
    if (grad._version() != before[i].version) rewritten.push_back(grad);
  }
  if (rewritten.empty()) return false;
  if (!loss.defined() || !loss.requires_grad()) return true;
  for (const at::Tensor& grad : rewritten) {
    if (grad.requires_grad() || grad.detach().any().item<bool>()) return true;
  }
  return false;
}

}  // namespace

Evaluation evaluate(const Closure& closure, const std::vector<at::Tensor>& params, bool create_graph) {
  std::vector<Snapshot> before;
  before.reserve(params.size());
  for (const at::Tensor& param : params) {
    const at::Tensor& grad = param.grad();
    before.push_back({grad, grad.defined() ? static_cast<uint32_t>(grad._version()) : 0});
  }
  Evaluation result;
  {
    const at::AutoGradMode enabled(true);
    result.loss = closure();
  }
  result.ran_backward = backward_ran(params, before, result.loss);
  if (result.ran_backward) {
    for (const at::Tensor& param : params) result.grads.push_back(param.grad());
  } else {
    result.grads = curvature::gradients(result.loss, params, create_graph, /*keep_graph=*/false);
  }
  return result;
}

Evaluation first_order_gradients(const char* optimizer, const Closure& closure, const std::vector<at::Tensor>& params,
                                 const std::vector<int64_t>& ordinals) {
  const DetachGradients detach(params);
  Evaluation result;
  if (closure) {
    result = evaluate(closure, params, /*create_graph=*/false);
  } else {
    result.ran_backward = true;
    for (const at::Tensor& param : params) result.grads.push_back(param.grad());
  }
  for (size_t i = 0; i < params.size(); ++i) {
    if (result.grads[i].defined())
      core::check_gradient(optimizer, static_cast<size_t>(ordinals[i]), params[i], result.grads[i]);
  }
  if (result.loss.defined()) result.loss = result.loss.detach();
  for (size_t i = 0; i < params.size(); ++i) {
    at::Tensor& grad = result.grads[i];
    if (grad.defined()) grad = grad.detach();  // also of a view, which zero_grad could not detach in place
    if (!result.ran_backward) params[i].mutable_grad() = grad;
  }
  return result;
}

DetachGradients::~DetachGradients() {
  for (const at::Tensor& param : params_) {
    at::Tensor& grad = param.mutable_grad();
    if (grad.defined() && grad.requires_grad()) grad = grad.detach();
  }
}

}  // namespace torch_ext::optim
