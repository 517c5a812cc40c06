// The derivative of moe.route in the logits, to any order, and the counting of loads in the backward pass.
//
// The node returns `a` beside the gates, so that it can be saved as an output: under create_graph the gradient is made
// of torch's operators on a, and what flows back into a goes through this node again. Nothing of the size [T, E] is
// saved but for softmax without normalize.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <utility>

#include "core/check.h"
#include "moe/route/route_op.h"

namespace torch_ext::moe {
namespace {

using kernels::RouteGate;
using kernels::RouteScore;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void save_options(AutogradContext* ctx, const RouteOptions& o, const at::Tensor& logits) {
  auto& data = ctx->saved_data;
  data["top_k"] = o.top_k();
  data["score"] = o.score();
  data["normalize"] = o.normalize();
  data["route_scale"] = o.route_scale();
  data["nan_policy"] = o.nan_policy();
  data["num_experts"] = logits.sym_size(1).guard_int(__FILE__, __LINE__);
  data["dtype"] = static_cast<int64_t>(logits.scalar_type());
}

RouteOptions saved_options(AutogradContext* ctx) {
  auto& data = ctx->saved_data;
  return RouteOptions()
      .top_k(data["top_k"].toInt())
      .score(data["score"].toStringRef())
      .normalize(data["normalize"].toBool())
      .route_scale(data["route_scale"].toDouble())
      .nan_policy(data["nan_policy"].toStringRef());
}

// Loads grow once per node: recomputed forward passes have nodes of their own, which never run backward, and a node
// that runs backward several times counts the first time only.
void count_once(AutogradContext* ctx, const at::Tensor& counts, const at::Tensor& histogram) {
  auto& data = ctx->saved_data;
  if (data["counted"].toBool()) return;
  data["counted"] = true;
  // In saved_data and not among the saved variables: other micro-batches have written to them since, as they should.
  if (data["load"].isTensor()) load_add_(data["load"].toTensor(), counts);
  if (data["histogram"].isTensor()) load_add_(data["histogram"].toTensor(), histogram);
}

struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& valid, const RouteOptions& options,
                               const RouteCounting& counting, bool cutoffs, bool in_backward) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const bool dense = route_mode(options.top_k(), options.score(), options.normalize(), options.nan_policy()).dense;
    auto [gates, ids, counts, cutoff, a, norm] = route_forward(logits, bias, valid, options, cutoffs);
    const at::Tensor histogram =
        counting.histogram
            ? route_histogram(logits, cutoff, valid, *counting.bounds,
                              counting.histogram->sym_size(1).guard_int(__FILE__, __LINE__), options.score())
            : at::empty({0}, counts.options());
    ctx->save_for_backward({ids, a, counts, histogram, dense ? logits : at::Tensor(), dense ? norm : at::Tensor()});
    save_options(ctx, options, logits);
    ctx->saved_data["counted"] = !in_backward;
    if (counting.load) ctx->saved_data["load"] = *counting.load;
    if (counting.histogram) ctx->saved_data["histogram"] = *counting.histogram;
    ctx->mark_non_differentiable({ids, counts, cutoff, histogram});
    ctx->set_materialize_grads(false);
    return {gates, ids, counts, cutoff, a, histogram};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    count_once(ctx, saved[2], saved[3]);
    const at::Tensor &by_gates = grads[0], &by_a = grads[4];
    variable_list results(7);
    if (!by_gates.defined() && !by_a.defined()) return results;
    const auto optional = [](const at::Tensor& t) { return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt; };
    const RouteSaved from{saved[0],
                          saved[1],
                          optional(saved[4]),
                          optional(saved[5]),
                          ctx->saved_data["num_experts"].toInt(),
                          static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt())};
    const auto gradient = at::GradMode::is_enabled() ? route_backward_composite : route_backward;
    results[0] = gradient(by_gates, by_a, from, saved_options(ctx));
    return results;
  }
};

// d s / d l as a function of s = a, see kernels::route_slope.
at::Tensor slope(RouteScore score, const at::Tensor& a) {
  if (score == RouteScore::kSigmoid) return a * (1 - a);
  if (score == RouteScore::kIdentity) return at::ones_like(a);
  const at::Tensor some = at::where(a > 0, a, 1);
  return at::where(a > 0, -at::expm1(-some * some) / (2 * some), 0);
}

at::Tensor sum_over_experts(const at::Tensor& x) { return x.sum(-1, /*keepdim=*/true); }

}  // namespace

at::Tensor route_backward_composite(const at::Tensor& grad_gates, const at::Tensor& grad_a, const RouteSaved& saved,
                                    const RouteOptions& options) {
  const RouteMode mode = route_mode(options.top_k(), options.score(), options.normalize(), options.nan_policy());
  const double scale = options.route_scale();
  const at::Tensor valid = saved.ids.ge(0), index = saved.ids.clamp_min(0).to(at::kLong);
  const at::Tensor bad = saved.a.isnan().any(-1, /*keepdim=*/true);
  const at::Tensor usable = valid.logical_and(bad.logical_not());
  const at::Tensor a = at::where(usable, saved.a, 1);  // a NaN would reach every derivative, also where it is masked
  const at::Tensor none = at::zeros_like(a, a.options().requires_grad(false));
  const at::Tensor w = grad_gates.defined() ? at::where(usable, grad_gates, 0) : none;
  const at::Tensor v = grad_a.defined() ? at::where(usable, grad_a, 0) : none;
  const double filler = mode.zero_nan ? 0 : std::numeric_limits<double>::quiet_NaN();
  if (mode.dense) {
    const at::Tensor row = usable.select(-1, 0).unsqueeze(-1);
    const at::Tensor s = at::softmax(at::where(row, saved.logits->to(a.scalar_type()), 0), -1);
    const at::Tensor up = at::zeros_like(s).scatter_add(-1, index, scale * w + v);
    const at::Tensor grad = at::where(bad, filler, s * (up - sum_over_experts(s * up)));
    return at::where(valid.select(-1, 0).unsqueeze(-1), grad, 0).to(saved.dtype);
  }
  at::Tensor grad;
  if (mode.gate == RouteGate::kSoftmax) {
    const at::Tensor up = scale * w + v;
    grad = a * (up - sum_over_experts(up * a));
  } else if (mode.gate == RouteGate::kNormalized) {
    const at::Tensor total = sum_over_experts(a) + kernels::kRouteTiny;
    grad = (scale * (w - sum_over_experts(w * (a / total))) / total + v) * slope(mode.score, a);
  } else {
    grad = (scale * w + v) * slope(mode.score, a);
  }
  grad = at::where(valid, at::where(bad, filler, grad), 0);
  auto sizes = saved.ids.sym_sizes().vec();
  sizes.back() = saved.num_experts;
  return at::zeros_symint(sizes, grad.options().requires_grad(false)).scatter_add(-1, index, grad).to(saved.dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_differentiable(const at::Tensor& logits,
                                                                                const std::optional<at::Tensor>& bias,
                                                                                const std::optional<at::Tensor>& valid,
                                                                                const RouteOptions& options,
                                                                                const RouteCounting& counting) {
  const bool in_backward = options.count_in() == "backward" && at::GradMode::is_enabled() && logits.requires_grad();
  const bool in_forward = options.count_in() == "forward";
  const RouteCounting active = in_backward || in_forward ? counting : RouteCounting{};
  const auto out = Route::apply(logits, bias, valid, options, active, counting.histogram.has_value(), in_backward);
  if (in_forward && counting.load) load_add_(*counting.load, out[2]);
  if (in_forward && counting.histogram) load_add_(*counting.histogram, out[5]);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace torch_ext::moe
