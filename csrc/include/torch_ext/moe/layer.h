// A mixture-of-experts layer: router, SwiGLU experts over the permuted tokens, shared experts.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch_ext/export.h>
#include <torch_ext/moe/router.h>

#include <optional>
#include <ostream>

namespace torch_ext::moe {

struct MoELayerOptions {
  MoELayerOptions(int64_t dim, int64_t hidden, int64_t num_experts)
      : dim_(dim), hidden_(hidden), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, hidden);  // of one expert
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, shared_experts) = 0;  // every token takes them, with gate 1; DeepSeek-V3: 1
  TORCH_ARG(RouteOptions, route) = {};
};

// y[t] = sum_k gates[t, k] F_ids[t, k](x[t]) + F_shared(x[t]),   F(x) = down (silu(gate x) * (up x)),   no biases.
//
// x [..., dim] -> y of the same shape. valid [...] bool: tokens that are not valid go to no expert (shared ones take
// them). Parameters are initialised as torch's Linear's and named as in Python: router.weight, gate_proj and up_proj
// [num_experts, hidden, dim], down_proj [num_experts, dim, hidden]; with shared experts shared_gate_proj,
// shared_up_proj [shared_experts hidden, dim] and shared_down_proj [dim, shared_experts hidden]; buffer
// router.expert_bias.
// Errors: those of MoERouter; ValueError for sizes.
class TORCH_EXT_API MoELayerImpl : public torch::nn::Module {
 public:
  explicit MoELayerImpl(MoELayerOptions options);
  at::Tensor forward(const at::Tensor& x, const std::optional<at::Tensor>& valid = std::nullopt);
  void pretty_print(std::ostream& stream) const override;

  MoELayerOptions options;
  MoERouter router{nullptr};
  at::Tensor gate_proj, up_proj, down_proj;
  at::Tensor shared_gate_proj, shared_up_proj, shared_down_proj;  // undefined without shared experts
};
TORCH_MODULE(MoELayer);

// One product per segment: rows offsets[e] ... offsets[e + 1] - 1 of x [S, D] times weight[e] [N, D] transposed, in one
// [S, N]; rows past offsets[E] are zeros. Differentiable to any order. On CUDA it reads offsets back to the host.
// Errors: ValueError for shapes and devices, TypeError for dtypes.
TORCH_EXT_API at::Tensor grouped_mm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets);

}  // namespace torch_ext::moe
