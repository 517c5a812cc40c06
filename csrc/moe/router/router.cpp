#include <ATen/ATen.h>
#include <torch/library.h>
#include <torch/nn/modules/linear.h>
#include <torch_ext/moe/router.h>

#include <utility>

#include "core/check.h"
#include "moe/router/router_op.h"

namespace torch_ext::moe {

at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight) {
  core::dtype_of(x, "MoERouter: x");
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 1 && x.sym_size(-1) == weight.sym_size(1),
                    "MoERouter: x must be [..., dim = ", weight.sym_size(1), "], got ", x.sym_sizes());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = core::arithmetic_type(weight.scalar_type());
  return at::linear(x.reshape_symint({-1, weight.sym_size(1)}).to(type), weight.to(type));
}

MoERouterImpl::MoERouterImpl(MoERouterOptions options_) : options(std::move(options_)) {
  TORCH_CHECK_VALUE(options.dim() >= 1, "MoERouter: dim must be positive, got ", options.dim());
  check_route_options(options.route(), options.num_experts());
  const torch::nn::Linear linear(torch::nn::LinearOptions(options.dim(), options.num_experts()).bias(false));
  weight = register_parameter("weight", linear->weight);
  expert_bias = register_buffer("expert_bias", at::zeros({options.num_experts()}, at::kFloat));
  load = at::zeros({options.num_experts()}, at::kLong);
}

RouteResult MoERouterImpl::forward(const at::Tensor& x, const std::optional<at::Tensor>& valid) {
  const at::Tensor logits = router_logits(x, weight);
  const auto rows = valid ? std::optional<at::Tensor>(valid->reshape({-1})) : std::nullopt;
  const bool counting = is_training();
  const auto histogram = counting && quantile_histogram.defined()
                             ? std::optional<RouteHistogram>({quantile_histogram, quantile_bounds})
                             : std::nullopt;
  return route(logits, expert_bias, options.route(), rows, counting ? std::optional<at::Tensor>(load) : std::nullopt,
               histogram);
}

template <typename... Arguments>
void MoERouterImpl::move(const Arguments&... arguments) {
  const at::Tensor before = expert_bias.detach();
  Module::to(arguments...);
  const auto device = expert_bias.device();
  if (expert_bias.scalar_type() != at::kFloat) expert_bias.set_data(before.to(device));
  load = load.to(device);
  if (quantile_histogram.defined()) quantile_histogram = quantile_histogram.to(device);
  if (quantile_bounds.defined()) quantile_bounds = quantile_bounds.to(device);
}

void MoERouterImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  move(device, dtype, non_blocking);
}
void MoERouterImpl::to(torch::Dtype dtype, bool non_blocking) { move(dtype, non_blocking); }
void MoERouterImpl::to(torch::Device device, bool non_blocking) { move(device, non_blocking); }

void MoERouterImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::moe::MoERouter(dim=" << options.dim() << ", num_experts=" << options.num_experts()
         << ", top_k=" << options.route().top_k() << ", score=" << options.route().score() << ')';
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) { m.def("moe_router_logits(Tensor x, Tensor weight) -> Tensor", router_logits); }

}  // namespace torch_ext::moe
