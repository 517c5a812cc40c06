#include <ATen/ops/ones.h>
#include <torch_ext/moe/stochastic_balance.h>

#include <algorithm>
#include <string>

#include "moe/stochastic_balance/stochastic_balance_op.h"

namespace torch_ext::moe {
namespace {

using kernels::BalanceDiscount;
using kernels::BalanceRule;

constexpr const char* kBalanceName = "stochastic_balance";

BalanceRule rule_of(const std::string& name) {
  if (name == "discount") return BalanceRule::kDiscount;
  if (name == "balance") return BalanceRule::kBalance;
  if (name == "load") return BalanceRule::kLoad;
  TORCH_CHECK_VALUE(name == "greedy", kBalanceName,
                    ": rule must be \"discount\", \"balance\", \"load\" or \"greedy\", got \"", name, "\"");
  return BalanceRule::kGreedy;
}

// Values are looked at on the CPU only: elsewhere it would wait for the device. False for NaN.
bool all_within_one(const at::Tensor& tensor) {
  return !tensor.is_cpu() || tensor.ge(0).logical_and_(tensor.le(1)).all().item<bool>();
}
bool all_finite(const at::Tensor& tensor) {
  return !tensor.is_cpu() || tensor.ge(0).logical_and_(tensor.isfinite()).all().item<bool>();
}

at::Tensor as_double(const at::Tensor& tensor, const at::Device& device) {
  return tensor.detach().to(device, at::kDouble).contiguous();
}

at::Tensor checked_table(const at::Tensor& given, const at::Device& device) {
  TORCH_CHECK_VALUE(given.defined() && given.dim() == 2 && given.size(1) == 2 && given.size(0) >= 1, kBalanceName,
                    ": g=\"table\" needs a table [points, 2] of x and g(x)");
  const at::Tensor table = as_double(given, at::kCPU);
  const auto* points = table.const_data_ptr<double>();
  for (int64_t i = 0; i < table.size(0); ++i) {
    const double x = points[2 * i], g = points[2 * i + 1];
    TORCH_CHECK_VALUE(x == x && (i == 0 || x > points[2 * i - 2]), kBalanceName, ": the table's x must increase");
    TORCH_CHECK_VALUE(g >= 0 && g < 1 && (i == 0 || g >= points[2 * i - 1]), kBalanceName,
                      ": the table's g(x) must lie in [0, 1) and not decrease");
  }
  return table.to(device);
}

BalanceDiscount discount_of(const std::string& name, const at::Tensor& capacity) {
  if (name == "exp") return BalanceDiscount::kExp;
  if (name == "survival") return BalanceDiscount::kSurvival;
  if (name == "table") return BalanceDiscount::kTable;
  TORCH_CHECK_VALUE(name == "auto", kBalanceName, ": g must be \"auto\", \"exp\", \"survival\" or a table, got \"",
                    name, "\"");
  const bool large = capacity.numel() > 0 && capacity.min().item<int64_t>() >= 10;
  return large ? BalanceDiscount::kExp : BalanceDiscount::kSurvival;
}

at::Tensor checked_capacity(const std::optional<at::Tensor>& given, int64_t servers, const at::Device& device) {
  if (!given.has_value()) return at::ones({servers}, at::TensorOptions(device).dtype(at::kLong));
  TORCH_CHECK_TYPE(at::isIntegralType(given->scalar_type(), /*includeBool=*/false), kBalanceName,
                   ": capacity must be integers, got ", given->scalar_type());
  TORCH_CHECK_VALUE(given->dim() == 1 && given->size(0) == servers, kBalanceName, ": capacity must be [", servers,
                    "], one number per server; got ", given->sizes());
  TORCH_CHECK_VALUE(!given->is_cpu() || servers == 0 || given->min().item<int64_t>() >= 1, kBalanceName,
                    ": capacities must be at least 1");
  return given->detach().to(device, at::kLong).contiguous();
}

}  // namespace

BalanceArguments balance_arguments(const at::Tensor& probability, const std::optional<at::Tensor>& weight,
                                   const std::optional<at::Tensor>& capacity, const BalanceOptions& options) {
  TORCH_CHECK_TYPE(at::isFloatingType(probability.scalar_type()), kBalanceName,
                   ": probabilities must be floating-point, got ", probability.scalar_type());
  TORCH_CHECK_VALUE(probability.dim() >= 2, kBalanceName, ": probabilities must be [..., arrivals, servers], got ",
                    probability.sizes());
  TORCH_CHECK_VALUE(all_within_one(probability), kBalanceName, ": probabilities must lie in [0, 1]");
  const at::Device device = probability.device();
  const int64_t n = probability.size(-2), m = probability.size(-1);
  BalanceArguments result;
  kernels::BalanceProblem& problem = result.problem;
  problem.arrivals = n;
  problem.servers = m;
  problem.batch = 1;
  for (int64_t d = 0; d < probability.dim() - 2; ++d) problem.batch *= probability.size(d);
  problem.top_k = options.top_k();
  problem.replicates = options.replicates();
  problem.seed = options.seed();
  constexpr int64_t kWord = int64_t{1} << 32;
  TORCH_CHECK_VALUE(problem.top_k >= 1 && problem.top_k <= std::max<int64_t>(m, 1), kBalanceName,
                    ": top_k must be in [1, ", m, "], the number of servers; got ", problem.top_k);
  TORCH_CHECK_VALUE(problem.replicates >= 1 && problem.replicates < kWord, kBalanceName,
                    ": replicates must be in [1, 2^32), got ", problem.replicates);
  TORCH_CHECK_VALUE(n < kWord && m < kWord / 2 && problem.batch < kWord >> 8, kBalanceName,
                    ": at most 2^32 arrivals, 2^31 servers and 2^24 problems");
  TORCH_CHECK_VALUE(options.overflow() == "drop" || options.overflow() == "spill", kBalanceName,
                    ": overflow must be \"drop\" or \"spill\", got \"", options.overflow(), "\"");
  problem.spill = options.overflow() == "spill";
  problem.rule = rule_of(options.rule());
  result.probability = as_double(probability, device);
  result.capacity = checked_capacity(capacity, m, device);
  problem.room.kind = discount_of(options.g(), capacity.has_value() ? *capacity : result.capacity);
  if (problem.room.kind == BalanceDiscount::kTable) result.table = checked_table(options.table(), device);
  if (weight.has_value()) {
    TORCH_CHECK_TYPE(at::isFloatingType(weight->scalar_type()), kBalanceName, ": weights must be floating-point, got ",
                     weight->scalar_type());
    const auto is = [&](at::IntArrayRef shape) { return weight->sizes() == shape; };
    TORCH_CHECK_VALUE(is({m}) || is({n, m}) || is(probability.sizes()), kBalanceName, ": weight must be [", m, "], [",
                      n, ", ", m, "] or like the probabilities, got ", weight->sizes());
    TORCH_CHECK_VALUE(all_finite(*weight), kBalanceName, ": weights must be finite and not negative");
    result.weight = as_double(*weight, device);
    problem.weight_arrival = weight->dim() == 1 ? 0 : m;
    problem.weight_batch = weight->dim() > 2 ? n * m : 0;
  } else {
    result.weight = at::ones({m}, at::TensorOptions(device).dtype(at::kDouble));
    problem.weight_arrival = problem.weight_batch = 0;
  }
  problem.probability = result.probability.const_data_ptr<double>();
  problem.weight = result.weight.const_data_ptr<double>();
  problem.capacity = result.capacity.const_data_ptr<int64_t>();
  problem.room.table = result.table.defined() ? result.table.const_data_ptr<double>() : nullptr;
  problem.room.points = result.table.defined() ? result.table.size(0) : 0;
  return result;
}

}  // namespace torch_ext::moe
