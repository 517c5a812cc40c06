// torch's closure protocol: a closure either returns a loss with a graph, or also calls backward() itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace torch_ext::optim {

using Closure = std::function<at::Tensor()>;

struct Evaluation {
  at::Tensor loss;                // what the closure returned; may be undefined if it ran backward
  std::vector<at::Tensor> grads;  // one per parameter, undefined where it has none; with a graph if asked for
  bool ran_backward;              // the gradients are the parameters' .grad
};

// Runs the closure with gradients enabled. If it changed some parameter's .grad it has called backward, and .grad is
// the answer; else the returned loss is differentiated here and .grad stays as it is.
Evaluation evaluate(const Closure& closure, const std::vector<at::Tensor>& params, bool create_graph);

// The gradients that a first-order step reads: those of a closure of either kind, or without one .grad as it stands.
// What the closure did not write itself goes to .grad. Each gradient is checked (core::check_gradient) against its
// parameter, which messages of `optimizer` call by its ordinal. Nothing is left with a graph.
TORCH_EXT_API Evaluation first_order_gradients(const char* optimizer, const Closure& closure,
                                               const std::vector<at::Tensor>& params,
                                               const std::vector<int64_t>& ordinals);

// Detaches .grad of all parameters when it goes out of scope, so that no graph outlives the step (a graph in .grad is a
// reference cycle that C++ never collects).
class DetachGradients {
 public:
  explicit DetachGradients(const std::vector<at::Tensor>& params) : params_(params) {}
  DetachGradients(const DetachGradients&) = delete;
  DetachGradients& operator=(const DetachGradients&) = delete;
  ~DetachGradients();

 private:
  const std::vector<at::Tensor>& params_;
};

}  // namespace torch_ext::optim
