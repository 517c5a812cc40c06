// What the loads of a layer say: violations, entropy, dead experts, and the imbalance that sampling alone leaves.
#include <ATen/core/Tensor.h>
#include <torch_ext/optim/alflb.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "optim/alflb/alflb_op.h"

namespace torch_ext::optim {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Moments {
  double mean, square;
};

// E[z] and E[z^2] of the largest of n independent standard normal numbers z, by the midpoint rule on
// [-10, 10] over d(Phi^n), which is smooth: 4000 steps leave 1e-9.
Moments largest_normal(int64_t n) {
  constexpr int kSteps = 4000;
  constexpr double kRange = 10, kStep = 2 * kRange / kSteps;
  const auto power = static_cast<double>(n);
  Moments sum{0, 0};
  double before = 0;
  for (int i = 0; i < kSteps; ++i) {
    const double x = -kRange + (i + 0.5) * kStep;
    const double after = std::pow(0.5 * std::erfc(-(x + 0.5 * kStep) / std::sqrt(2.0)), power);
    sum.mean += x * (after - before);
    sum.square += x * x * (after - before);
    before = after;
  }
  return sum;
}

}  // namespace

double ALFLB::sampling_floor(double tokens, int64_t num_experts, int64_t top_k) {
  TORCH_CHECK_VALUE(num_experts >= 1 && top_k >= 1 && top_k <= num_experts, "sampling_floor: ", top_k,
                    " experts per token of ", num_experts);
  if (!(tokens > 0)) return kNan;
  if (top_k == num_experts) return 0;
  const auto experts = static_cast<double>(num_experts);
  const double q = static_cast<double>(top_k) / experts, mean = tokens * q, deviation = std::sqrt(mean * (1 - q));
  // The loads sum to a constant, which correlates them by -1/(E-1): their largest exceeds the mean as that of
  // independent ones of variance E/(E-1) would. The second term is the skewness of a binomial number (Cornish-Fisher).
  const Moments z = largest_normal(num_experts);
  const double skewness = (1 - 2 * q) / deviation;
  return (z.mean + skewness * (z.square - 1) / 6) * deviation * std::sqrt(experts / (experts - 1)) / mean;
}

LoadReport load_report(const at::Tensor& load, const at::Tensor& bias, int64_t top_k) {
  const at::Tensor counts = load.detach().to(at::kCPU, at::kLong).contiguous();
  const at::Tensor values = bias.detach().to(at::kCPU, at::kDouble).contiguous();
  const int64_t* a = counts.const_data_ptr<int64_t>();
  const double* p = values.const_data_ptr<double>();
  const int64_t experts = counts.numel();
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) total += a[e];
  const auto [low, high] = std::minmax_element(p, p + values.numel());
  LoadReport report{kNan, kNan, kNan, kNan, std::count(a, a + experts, int64_t{0}), *high - *low, kNan};
  if (total == 0) return report;
  const double target = static_cast<double>(total) / static_cast<double>(experts);
  const auto [least, most] = std::minmax_element(a, a + experts);
  report.max_vio = static_cast<double>(*most) / target - 1;
  report.min_vio = static_cast<double>(*least) / target - 1;
  double sum = 0, entropy = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const double share = static_cast<double>(a[e]) / static_cast<double>(total);
    sum += std::abs(static_cast<double>(a[e]) / target - 1);
    if (a[e] > 0) entropy -= share * std::log(share);
  }
  report.avg_vio = sum / static_cast<double>(experts);
  report.entropy = experts > 1 ? entropy / std::log(static_cast<double>(experts)) : 1.0;
  if (top_k != kUnknownTopK) {
    report.floor = ALFLB::sampling_floor(static_cast<double>(total) / static_cast<double>(top_k), experts, top_k);
  }
  return report;
}

}  // namespace torch_ext::optim
