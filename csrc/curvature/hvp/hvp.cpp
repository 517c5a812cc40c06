#include "curvature/hvp/hvp.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>
#include <torch_ext/curvature/hvp.h>

#include <algorithm>
#include <memory>
#include <unordered_set>
#include <utility>

#include "core/check.h"

namespace torch_ext::curvature {
namespace {

void check_vectors(at::TensorList params, at::TensorList v) {
  TORCH_CHECK_VALUE(params.size() == v.size(), "hvp: got ", params.size(), " parameters and ", v.size(), " vectors");
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK_VALUE(params[i].sizes() == v[i].sizes(), "hvp: parameter ", i, " has shape ", params[i].sizes(),
                      ", its vector ", v[i].sizes());
  }
}

std::vector<at::Tensor> zero_filled(std::vector<at::Tensor> tensors, at::TensorList like) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined()) tensors[i] = at::zeros_like(like[i], like[i].options().requires_grad(false));
  }
  return tensors;
}

// Restores parameters and generators to the bit, also on an exception.
class Replay {
 public:
  explicit Replay(at::TensorList params) : params_(params.vec()) {
    std::vector<at::Device> devices{at::Device(at::kCPU)};
    for (size_t i = 0; i < params_.size(); ++i) {
      const at::Tensor& param = params_[i];
      core::walking_strides(param, /*any_order=*/true, "parameter", i);  // refuses an expanded one
      originals_.push_back(param.detach().clone());
      if (std::find(devices.begin(), devices.end(), param.device()) == devices.end()) devices.push_back(param.device());
    }
    for (const at::Device& device : devices) {
      at::Generator generator =
          device.is_cpu() ? at::detail::getDefaultCPUGenerator() : at::globalContext().defaultGenerator(device);
      states_.push_back(generator.get_state());
      generators_.push_back(std::move(generator));
    }
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  ~Replay() {
    rewind();
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < params_.size(); ++i) params_[i].copy_(originals_[i]);
  }

  void rewind() {
    for (size_t i = 0; i < generators_.size(); ++i) generators_[i].set_state(states_[i]);
  }
  void shift(at::TensorList v, const at::Tensor& step) {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < params_.size(); ++i) {
      const auto h = step.to(params_[i].device(), params_[i].scalar_type());
      params_[i].copy_(originals_[i] + h * v[i]);
    }
  }

 private:
  std::vector<at::Tensor> params_, originals_, states_;
  std::vector<at::Generator> generators_;
};

// Takes the hooks off the parameters: they have acted on the gradient, whose graph holds what they did, and are not
// meant for H v, on which the engine would run them again.
class WithoutHooks {
 public:
  explicit WithoutHooks(at::TensorList params) : params_(params.vec()), hooks_(params.size()) { swap(); }
  WithoutHooks(const WithoutHooks&) = delete;
  WithoutHooks& operator=(const WithoutHooks&) = delete;
  ~WithoutHooks() { swap(); }

 private:
  void swap() {
    for (size_t i = 0; i < params_.size(); ++i) {
      if (params_[i].requires_grad()) hooks_[i].swap(torch::autograd::impl::hooks(params_[i]));
    }
  }

  std::vector<at::Tensor> params_;
  std::vector<std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>>> hooks_;
};

// The graph of a function that refuses a second derivative (once_differentiable) ends in a node that raises. As that
// node leads to no parameter the engine would leave it out, and the curvature behind it would silently be zero.
void refuse_dead_ends(const std::vector<at::Tensor>& outputs) {
  std::unordered_set<const torch::autograd::Node*> seen;
  std::vector<const torch::autograd::Node*> waiting;
  const auto visit = [&](const torch::autograd::Node* node) {
    if (node != nullptr && seen.insert(node).second) waiting.push_back(node);
  };
  for (const at::Tensor& output : outputs) visit(output.grad_fn().get());
  while (!waiting.empty()) {
    const torch::autograd::Node* node = waiting.back();
    waiting.pop_back();
    const auto* error = dynamic_cast<const torch::autograd::Error*>(node);
    const bool keeps_its_edges = dynamic_cast<const torch::autograd::NotImplemented*>(node) != nullptr;
    TORCH_CHECK(error == nullptr || keeps_its_edges, error->msg);
    for (const auto& edge : node->next_edges()) visit(edge.function.get());
  }
}

// The same bits for every number of threads and every memory layout: rows are summed whole, in row-major order.
at::Tensor sum_of_squares(const at::Tensor& tensor) {
  constexpr int64_t kRow = 1024;
  at::Tensor rest = tensor.detach().to(at::kDouble).square().contiguous().view({-1});
  while (rest.numel() > kRow) {
    const int64_t whole = rest.numel() / kRow * kRow;
    const at::Tensor tail = rest.narrow(0, whole, rest.numel() - whole);
    rest = at::cat({rest.narrow(0, 0, whole).view({-1, kRow}).sum(1), tail.sum().view({1})});
  }
  return rest.sum();
}

// rho max(|p|_2 / sqrt(d), 1e-3) as a 0-dim float64 tensor on the first parameter's device.
at::Tensor difference_step(at::TensorList params) {
  const at::NoGradGuard no_grad;
  at::Tensor squares = at::zeros({}, params[0].options().dtype(at::kDouble).requires_grad(false));
  int64_t count = 0;
  bool all_double = true;
  for (const at::Tensor& param : params) {
    squares += sum_of_squares(param).to(squares.device());
    count += param.numel();
    all_double = all_double && param.scalar_type() == at::kDouble;
  }
  const double rho = all_double ? 1e-4 : 1e-2;
  return squares.div(static_cast<double>(std::max<int64_t>(1, count))).sqrt().clamp_min(1e-3).mul(rho);
}

}  // namespace

std::vector<at::Tensor> gradients(const at::Tensor& loss, at::TensorList params, bool create_graph, bool keep_graph) {
  TORCH_CHECK(loss.defined() && loss.numel() == 1, "the loss must be one number, got ",
              loss.defined() ? c10::str("shape ", loss.sizes()) : std::string("nothing: does the closure return it?"));
  TORCH_CHECK(loss.requires_grad(),
              "the loss carries no graph: compute it from the parameters with gradients enabled and do not detach it");
  if (params.empty()) return {};  // all frozen
  const at::AutoGradMode enabled(true);
  return torch::autograd::grad({loss}, params.vec(), {}, keep_graph || create_graph, create_graph,
                               /*allow_unused=*/true);
}

std::vector<at::Tensor> hvp_of_gradients(at::TensorList grads, at::TensorList params, at::TensorList v,
                                         bool keep_graph) {
  std::vector<at::Tensor> outputs, weights;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined() || !grads[i].requires_grad()) continue;  // constant gradient: no curvature
    outputs.push_back(grads[i]);
    weights.push_back(v[i]);
  }
  if (outputs.empty()) return zero_filled(std::vector<at::Tensor>(params.size()), params);
  const at::AutoGradMode enabled(true);
  std::vector<at::Tensor> result;
  try {
    refuse_dead_ends(outputs);
    const WithoutHooks guard(params);
    result = torch::autograd::grad(outputs, params.vec(), weights, keep_graph, /*create_graph=*/false,
                                   /*allow_unused=*/true);
  } catch (const std::exception& error) {  // not only c10::Error: compiled models and Python functions raise their own
    const auto* ours = dynamic_cast<const c10::Error*>(&error);
    const std::string what = ours != nullptr ? ours->what_without_backtrace() : error.what();
    const auto says = [&](const char* words) { return what.find(words) != std::string::npos; };
    if (!says("derivative") && !says("double backward") && !says("differentiate twice")) throw;
    TORCH_CHECK(
        false, what,
        "\nA Hessian-vector product needs every op of the model to be twice differentiable. Replace the op (the "
        "math backend of scaled_dot_product_attention, an uncompiled model, a CPU or non-cuDNN RNN), or use "
        "hvp=\"finite_difference\".");
  }
  return zero_filled(std::move(result), params);
}

std::vector<at::Tensor> finite_difference_hvp(const GradientFn& gradient, at::TensorList params, at::TensorList v) {
  if (params.empty()) return {};
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK_TYPE(params[i].scalar_type() == at::kFloat || params[i].scalar_type() == at::kDouble,
                     "finite_difference needs float32 or float64 parameters (the difference is lost in rounding): "
                     "parameter ",
                     i, " is ", params[i].scalar_type());
  }
  const at::Tensor step = difference_step(params);
  std::vector<at::Tensor> ahead, behind;
  {
    Replay replay(params);
    replay.shift(v, step);
    ahead = gradient();
    replay.rewind();
    replay.shift(v, -step);
    behind = gradient();
  }
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> result(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (!ahead[i].defined() || !behind[i].defined()) continue;
    result[i] =
        (ahead[i].detach() - behind[i].detach()).div((2 * step).to(params[i].device(), params[i].scalar_type()));
  }
  return zero_filled(std::move(result), params);
}

std::vector<at::Tensor> hvp(const at::Tensor& loss, at::TensorList params, at::TensorList v) {
  check_vectors(params, v);
  return hvp_of_gradients(gradients(loss, params, /*create_graph=*/true, /*keep_graph=*/true), params, v,
                          /*keep_graph=*/true);
}

std::vector<at::Tensor> hvp(const LossFn& loss, at::TensorList params, at::TensorList v, const std::string& mode) {
  check_vectors(params, v);
  const auto evaluate = [&] {
    const at::AutoGradMode enabled(true);
    return loss();
  };
  if (mode == "double_backward") return hvp(evaluate(), params, v);
  TORCH_CHECK_VALUE(mode == "finite_difference", "hvp: mode must be 'double_backward' or 'finite_difference', got '",
                    mode, "'");
  return finite_difference_hvp([&] { return gradients(evaluate(), params, false, false); }, params, v);
}

}  // namespace torch_ext::curvature
