#include <ATen/ATen.h>
#include <torch/library.h>
#include <torch/nn/init.h>
#include <torch_ext/moe/dispatch_plan.h>
#include <torch_ext/moe/layer.h>

#include <cmath>
#include <utility>

#include "core/check.h"

namespace torch_ext::moe {
namespace {

using Optional = std::optional<at::Tensor>;

// Composite: made of differentiable operators. One grouped product per projection over all permuted tokens.
at::Tensor experts_op(const at::Tensor& x, const at::Tensor& gates, const at::Tensor& ids, const at::Tensor& gate_proj,
                      const at::Tensor& up_proj, const at::Tensor& down_proj, const Optional& shared_gate_proj,
                      const Optional& shared_up_proj, const Optional& shared_down_proj) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && gate_proj.dim() == 3 && x.sym_size(-1) == gate_proj.sym_size(2),
                    "MoELayer: x must be [..., dim = ", gate_proj.dim() == 3 ? gate_proj.sym_size(2) : 0, "], got ",
                    x.sym_sizes());
  const at::Tensor tokens = x.reshape_symint({-1, x.sym_size(-1)});
  const DispatchPlan plan = dispatch_plan(ids, gate_proj.sym_size(0).guard_int(__FILE__, __LINE__));
  const at::Tensor rows = permute(tokens, plan);
  const at::Tensor hidden =
      at::silu(grouped_mm(rows, gate_proj, plan.offsets)) * grouped_mm(rows, up_proj, plan.offsets);
  const at::Tensor z = grouped_mm(hidden, down_proj, plan.offsets);
  at::Tensor y = combine(z, gates.to(core::arithmetic_type(z.scalar_type())), plan);
  if (shared_gate_proj && shared_up_proj && shared_down_proj) {
    y = y + at::linear(at::silu(at::linear(tokens, *shared_gate_proj)) * at::linear(tokens, *shared_up_proj),
                       *shared_down_proj);
  }
  return y.view_symint(x.sym_sizes());
}

// Inner size of the shared experts together.
int64_t shared_hidden(int64_t dim, int64_t hidden, int64_t shared_experts) {
  TORCH_CHECK_VALUE(dim >= 1 && hidden >= 1, "MoELayer: dim and hidden must be positive, got ", dim, " and ", hidden);
  TORCH_CHECK_VALUE(shared_experts >= 0, "MoELayer: shared_experts must not be negative, got ", shared_experts);
  return shared_experts * hidden;
}

// Each expert as torch::nn::Linear initialises its weight.
at::Tensor uniform(at::IntArrayRef sizes) {
  at::Tensor weight = at::empty(sizes, at::kFloat);
  for (const at::Tensor& matrix : weight.dim() == 3 ? weight.unbind(0) : std::vector<at::Tensor>{weight}) {
    torch::nn::init::kaiming_uniform_(matrix, std::sqrt(5.0));
  }
  return weight;
}

}  // namespace

MoELayerImpl::MoELayerImpl(MoELayerOptions options_) : options(std::move(options_)) {
  const int64_t dim = options.dim(), hidden = options.hidden(), experts = options.num_experts();
  const int64_t shared = shared_hidden(dim, hidden, options.shared_experts());
  router = register_module("router", MoERouter(MoERouterOptions(dim, experts).route(options.route())));
  gate_proj = register_parameter("gate_proj", uniform({experts, hidden, dim}));
  up_proj = register_parameter("up_proj", uniform({experts, hidden, dim}));
  down_proj = register_parameter("down_proj", uniform({experts, dim, hidden}));
  if (shared == 0) return;
  shared_gate_proj = register_parameter("shared_gate_proj", uniform({shared, dim}));
  shared_up_proj = register_parameter("shared_up_proj", uniform({shared, dim}));
  shared_down_proj = register_parameter("shared_down_proj", uniform({dim, shared}));
}

at::Tensor MoELayerImpl::forward(const at::Tensor& x, const Optional& valid) {
  const RouteResult routed = router(x, valid);
  const auto optional = [](const at::Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; };
  return experts_op(x, routed.gates, routed.ids, gate_proj, up_proj, down_proj, optional(shared_gate_proj),
                    optional(shared_up_proj), optional(shared_down_proj));
}

void MoELayerImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::moe::MoELayer(dim=" << options.dim() << ", hidden=" << options.hidden()
         << ", num_experts=" << options.num_experts() << ", shared_experts=" << options.shared_experts() << ')';
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "moe_experts(Tensor x, Tensor gates, Tensor ids, Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor? "
      "shared_gate_proj=None, Tensor? shared_up_proj=None, Tensor? shared_down_proj=None) -> Tensor",
      experts_op);
  m.def("moe_shared_hidden(int dim, int hidden, int shared_experts) -> int", shared_hidden);
}

}  // namespace torch_ext::moe
