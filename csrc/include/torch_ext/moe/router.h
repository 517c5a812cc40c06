// The linear router of a mixture of experts, with the bias that optim::ALFLB moves and the loads that it reads.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch_ext/export.h>
#include <torch_ext/moe/route.h>

#include <optional>
#include <ostream>

namespace torch_ext::moe {

struct MoERouterOptions {
  MoERouterOptions(int64_t dim, int64_t num_experts) : dim_(dim), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(RouteOptions, route) = {};
};

// forward: x [..., dim], valid [...] -> route(x weight^T, expert_bias), T = all tokens of x in row-major order. Logits
// are computed in float32 (float64 for float64 weights), also under autocast.
//
// While training, counts go into `load` (route options: count_in); in eval mode nothing is counted.
// Errors: those of route(), and ValueError for the size of x.
class TORCH_EXT_API MoERouterImpl : public torch::nn::Module {
 public:
  explicit MoERouterImpl(MoERouterOptions options);

  RouteResult forward(const at::Tensor& x, const std::optional<at::Tensor>& valid = std::nullopt);

  // float32 and int64 stay what they are: a bfloat16 bias above 0.5 would not move by 1e-3.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;
  void pretty_print(std::ostream& stream) const override;

  MoERouterOptions options;
  at::Tensor weight;       // parameter [num_experts, dim]
  at::Tensor expert_bias;  // buffer [num_experts] float32, zeros at first; saved
  // [num_experts] int64: tokens since the balancer last read and cleared it. No buffer: DistributedDataParallel would
  // overwrite every process's counts with those of the first. Not saved.
  at::Tensor load;
  // Set by a balancer with the quantile rule (both or neither): [num_experts, bins] int64, and [2] float32, the range
  // of the bins. See RouteHistogram.
  at::Tensor quantile_histogram, quantile_bounds;

 private:
  template <typename... Arguments>
  void move(const Arguments&... arguments);
};
TORCH_MODULE(MoERouter);

}  // namespace torch_ext::moe
