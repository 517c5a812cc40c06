// What moe.route refuses.
#include <cmath>

#include "core/check.h"
#include "moe/route/route_kernel.h"
#include "moe/route/route_op.h"

namespace torch_ext::moe {
namespace {

constexpr const char* kName = "moe.route";

void check_groups(const RouteOptions& o, int64_t experts) {
  const int64_t groups = o.num_groups();
  TORCH_CHECK_VALUE(groups >= 1 && experts % groups == 0, kName, ": num_groups must divide the number of experts, ",
                    experts, "; got ", groups);
  if (groups == 1) return;
  const int64_t size = experts / groups;
  TORCH_CHECK_VALUE(o.top_groups() >= 1 && o.top_groups() <= groups, kName,
                    ": top_groups must be in [1, num_groups = ", groups, "], got ", o.top_groups());
  TORCH_CHECK_VALUE(o.top_groups() * size >= o.top_k(), kName, ": the top_groups = ", o.top_groups(), " groups of ",
                    size, " experts hold fewer than top_k = ", o.top_k(), "; raise top_groups");
  TORCH_CHECK_VALUE(o.group_score_k() >= 1 && o.group_score_k() <= size, kName, ": group_score_k must be in [1, ", size,
                    "], the experts of a group; got ", o.group_score_k());
}

void check_beside(const at::Tensor& tensor, const char* name, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), kName, ": ", name, " is on ", tensor.device(), ", logits on ",
                    logits.device());
}

void check_per_expert(const at::Tensor& tensor, const char* name, at::ScalarType type, const at::Tensor& logits) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, kName, ": ", name, " must be ", type, ", got ", tensor.scalar_type(),
                   type == at::kFloat ? " (a bias in a narrow type would not move by 1e-3)" : "");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == logits.sym_size(1), kName, ": ", name,
                    " must be [E = ", logits.sym_size(1), "], got ", tensor.sym_sizes());
  check_beside(tensor, name, logits);
}

void check_histogram(const at::Tensor& logits, const RouteOptions& o, const at::Tensor& histogram,
                     const at::Tensor& bounds) {
  TORCH_CHECK_VALUE(o.num_groups() == 1, kName, ": a quantile histogram is not defined with groups; num_groups is ",
                    o.num_groups());
  TORCH_CHECK_VALUE(o.top_k() < logits.sym_size(1), kName,
                    ": a quantile histogram needs a (top_k + 1)-th key, but top_k is the number of experts");
  TORCH_CHECK_TYPE(histogram.scalar_type() == at::kLong && bounds.scalar_type() == at::kFloat, kName,
                   ": histogram must be int64 and histogram_bounds float32, got ", histogram.scalar_type(), " and ",
                   bounds.scalar_type());
  TORCH_CHECK_VALUE(histogram.dim() == 2 && histogram.sym_size(0) == logits.sym_size(1) && histogram.sym_size(1) > 0 &&
                        bounds.dim() == 1 && bounds.sym_size(0) == 2,
                    kName, ": histogram must be [E = ", logits.sym_size(1), ", bins] and histogram_bounds [2], got ",
                    histogram.sym_sizes(), " and ", bounds.sym_sizes());
  check_beside(histogram, "histogram", logits);
  check_beside(bounds, "histogram_bounds", logits);
}

void check_device_limits(const at::Tensor& logits, const RouteOptions& o, int64_t experts) {
  if (!logits.is_cuda()) return;
  TORCH_CHECK_VALUE(experts <= kernels::kRouteMaxExpertsCuda && o.top_k() <= kernels::kRouteMaxTopKCuda &&
                        o.num_groups() <= kernels::kRouteMaxGroupsCuda,
                    kName, ": on CUDA at most ", kernels::kRouteMaxExpertsCuda, " experts, top_k ",
                    kernels::kRouteMaxTopKCuda, " and ", kernels::kRouteMaxGroupsCuda, " groups; got ", experts, ", ",
                    o.top_k(), " and ", o.num_groups());
}

}  // namespace

RouteMode route_mode(int64_t top_k, std::string_view score, bool normalize, std::string_view nan_policy) {
  using kernels::RouteGate;
  using kernels::RouteScore;
  TORCH_CHECK_VALUE(nan_policy == "propagate" || nan_policy == "zero", kName,
                    ": nan_policy must be 'propagate' or 'zero', got '", nan_policy, "'");
  const bool zero_nan = nan_policy == "zero";
  if (score == "post_softmax") {
    TORCH_CHECK_VALUE(normalize, kName, ": score 'post_softmax' is normalized by definition; normalize must be true");
    return {RouteScore::kIdentity, RouteGate::kSoftmax, false, zero_nan};
  }
  const bool normalized = normalize && top_k > 1;  // one gate would always be 1
  if (score == "softmax") {
    return {RouteScore::kSoftmax, normalized ? RouteGate::kSoftmax : RouteGate::kPlain, !normalized, zero_nan};
  }
  const RouteGate gate = normalized ? RouteGate::kNormalized : RouteGate::kPlain;
  if (score == "sigmoid") return {RouteScore::kSigmoid, gate, false, zero_nan};
  if (score == "sqrtsoftplus") return {RouteScore::kSqrtSoftplus, gate, false, zero_nan};
  TORCH_CHECK_VALUE(score == "none", kName,
                    ": score must be 'sigmoid', 'softmax', 'sqrtsoftplus', 'none' or 'post_softmax', got '", score,
                    "'");
  return {RouteScore::kIdentity, gate, false, zero_nan};
}

void check_route_options(const RouteOptions& options, int64_t num_experts) {
  TORCH_CHECK_VALUE(num_experts >= 1, kName, ": the number of experts must be positive, got ", num_experts);
  TORCH_CHECK_VALUE(options.top_k() >= 1 && options.top_k() <= num_experts, kName,
                    ": top_k must be in [1, E = ", num_experts, "], got ", options.top_k());
  route_mode(options.top_k(), options.score(), options.normalize(), options.nan_policy());
  TORCH_CHECK_VALUE(std::isfinite(options.route_scale()), kName, ": route_scale must be finite, got ",
                    options.route_scale());
  TORCH_CHECK_VALUE(
      options.count_in() == "backward" || options.count_in() == "forward" || options.count_in() == "manual", kName,
      ": count_in must be 'backward', 'forward' or 'manual', got '", options.count_in(), "'");
  check_groups(options, num_experts);
}

void check_route(const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                 const std::optional<at::Tensor>& valid, const RouteOptions& options,
                 const std::optional<at::Tensor>& load, const std::optional<at::Tensor>& histogram,
                 const std::optional<at::Tensor>& bounds) {
  core::dtype_of(logits, "moe.route: logits");
  TORCH_CHECK_VALUE(logits.dim() == 2, kName, ": logits must be [T, E], got ", logits.sym_sizes());
  const int64_t experts = logits.sym_size(1).guard_int(__FILE__, __LINE__);
  check_route_options(options, experts);
  check_device_limits(logits, options, experts);
  TORCH_CHECK_VALUE(logits.sym_size(0) * options.top_k() <= INT32_MAX, kName, ": ", logits.sym_size(0), " tokens of ",
                    options.top_k(), " experts are more than counts of 32 bits hold; route them in parts");
  if (bias) check_per_expert(*bias, "bias", at::kFloat, logits);
  if (load) check_per_expert(*load, "load", at::kLong, logits);
  if (valid) {
    TORCH_CHECK_TYPE(valid->scalar_type() == at::kBool, kName, ": valid must be bool (true = a token), got ",
                     valid->scalar_type());
    TORCH_CHECK_VALUE(valid->dim() == 1 && valid->sym_size(0) == logits.sym_size(0), kName,
                      ": valid must be [T = ", logits.sym_size(0), "], got ", valid->sym_sizes());
    check_beside(*valid, "valid", logits);
  }
  TORCH_CHECK_VALUE(histogram.has_value() == bounds.has_value(), kName,
                    ": histogram and histogram_bounds go together; only one is given");
  if (histogram) check_histogram(logits, options, *histogram, *bounds);
}

}  // namespace torch_ext::moe
