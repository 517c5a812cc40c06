#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <torch_ext/moe/route.h>

#include "moe/route/route_op.h"

namespace torch_ext::moe {
namespace {

using Optional = std::optional<at::Tensor>;
using RouteOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

RouteOptions options_of(int64_t top_k, std::string_view score, bool normalize, double route_scale, int64_t num_groups,
                        int64_t top_groups, int64_t group_score_k, std::string_view nan_policy,
                        std::string_view count_in) {
  return RouteOptions()
      .top_k(top_k)
      .score(std::string(score))
      .normalize(normalize)
      .route_scale(route_scale)
      .num_groups(num_groups)
      .top_groups(top_groups)
      .group_score_k(group_score_k)
      .nan_policy(std::string(nan_policy))
      .count_in(std::string(count_in));
}

void check_options_op(int64_t num_experts, int64_t top_k, std::string_view score, bool normalize, double route_scale,
                      int64_t num_groups, int64_t top_groups, int64_t group_score_k, std::string_view nan_policy,
                      std::string_view count_in) {
  check_route_options(
      options_of(top_k, score, normalize, route_scale, num_groups, top_groups, group_score_k, nan_policy, count_in),
      num_experts);
}

RouteOutputs route_op(const at::Tensor& logits, const Optional& bias, int64_t top_k, std::string_view score,
                      bool normalize, double route_scale, int64_t num_groups, int64_t top_groups, int64_t group_score_k,
                      std::string_view nan_policy, std::string_view count_in, const Optional& valid,
                      const Optional& load, const Optional& histogram, const Optional& histogram_bounds) {
  const RouteOptions options =
      options_of(top_k, score, normalize, route_scale, num_groups, top_groups, group_score_k, nan_policy, count_in);
  check_route(logits, bias, valid, options, load, histogram, histogram_bounds);
  return route_differentiable(logits, bias, valid, options, {load, histogram, histogram_bounds});
}

}  // namespace

RouteResult route(const at::Tensor& logits, const Optional& bias, const RouteOptions& options, const Optional& valid,
                  const Optional& load, const std::optional<RouteHistogram>& histogram) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_route", "").typed<decltype(route_op)>();
  const auto part = [&](at::Tensor RouteHistogram::*member) {
    return histogram ? Optional((*histogram).*member) : std::nullopt;
  };
  auto [gates, ids, counts, cutoff] =
      op.call(logits, bias, options.top_k(), options.score(), options.normalize(), options.route_scale(),
              options.num_groups(), options.top_groups(), options.group_score_k(), options.nan_policy(),
              options.count_in(), valid, load, part(&RouteHistogram::counts), part(&RouteHistogram::bounds));
  return {gates, ids, counts, cutoff};
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "moe_route(Tensor logits, Tensor? bias=None, *, int top_k=2, str score='sigmoid', bool normalize=True, "
      "float route_scale=1.0, int num_groups=1, int top_groups=1, int group_score_k=2, str nan_policy='propagate', "
      "str count_in='backward', Tensor? valid=None, Tensor(a!)? load=None, Tensor(b!)? histogram=None, "
      "Tensor? histogram_bounds=None) -> (Tensor gates, Tensor ids, Tensor counts, Tensor cutoff)");
  m.def(
      "moe_route_check(int num_experts, *, int top_k, str score, bool normalize, float route_scale, int num_groups, "
      "int top_groups, int group_score_k, str nan_policy, str count_in) -> ()",
      check_options_op);
}
// The same above and below autograd: without gradients it only adds what counts in the forward pass.
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("moe_route", route_op); }
TORCH_LIBRARY_IMPL(torch_ext, CompositeExplicitAutograd, m) { m.impl("moe_route", route_op); }

}  // namespace torch_ext::moe
