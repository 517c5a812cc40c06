// The rules by which the bias of one expert follows its load, the same on host and device.
//
// A_e tokens selected expert e, sum A over all E experts, K per token, so T = sum A / K tokens and a target of
// L = sum A / E each. All differences L - A_e are taken in integers: E L - E A_e = sum A - E A_e. (Counts rounded to
// bfloat16 flip the sign of a quarter of the experts near balance, float32 sums that of 7 % at 2e6 tokens each.)
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/math.h"

namespace torch_ext::kernels {

enum class AlflbRule : int32_t { kSign, kProportional, kQuantile, kMomentum };

struct AlflbArgs {
  double lr, lr_power, ema, momentum, kappa;
  AlflbRule rule;
  bool per_token, center;
  const float* nonfinite;  // nonzero: loads are dropped and nothing else changes
};

// tanh(x) from + - * /; absolute error below 1e-15.
TX_HD double hyperbolic_tangent(double x) { return 1 - 2 / (core::exponential(2 * x, -708.0) + 1); }

// One layer at one step. arXiv:2408.15664 (sign), arXiv:2512.03915 (steps eps_e (L - A_e) on the dual).
struct AlflbStep {
  double rate;  // u_n = lr / n^lr_power
  int64_t total, experts, top_k;
  double kappa, momentum, ema;
  bool per_token;

  TX_HD AlflbStep(const AlflbArgs& args, int64_t n, int64_t total, int64_t experts, int64_t top_k)
      : rate(args.lr / core::power(static_cast<double>(n), args.lr_power)),
        total(total),
        experts(experts),
        top_k(top_k),
        kappa(args.kappa),
        momentum(args.momentum),
        ema(args.ema),
        per_token(args.per_token) {}

  // E (L - A_e), exactly.
  TX_HD int64_t shortage(int64_t load) const { return total - experts * load; }
  // v_e = (L - A_e) / L
  TX_HD double violation(int64_t load) const {
    return static_cast<double>(shortage(load)) / static_cast<double>(total);
  }

  TX_HD double sign(int64_t load) const {
    const int64_t difference = shortage(load);
    return difference > 0 ? rate : difference < 0 ? -rate : 0.0;
  }
  // u (L - A_e) / T, or u v_e.
  TX_HD double proportional(int64_t load) const {
    const double share = per_token ? static_cast<double>(top_k) / static_cast<double>(experts) : 1.0;
    return rate * (share * violation(load));
  }
  // What the average of the momentum rule takes in, before its mean over the experts is removed.
  TX_HD double bounded(int64_t load) const { return rate * hyperbolic_tangent(kappa * violation(load)); }
  TX_HD double averaged(double before, double centred) const { return momentum * before + (1 - momentum) * centred; }

  // The K/E quantile of cutoff - score from a histogram of `bins` equal bins on [low, high], linear inside its bin, and
  // with ema the average with the bias before. A row without counts keeps the bias.
  TX_HD double quantile(const int64_t* histogram, int64_t bins, double low, double high, double before) const {
    int64_t rows = 0;
    for (int64_t b = 0; b < bins; ++b) rows += histogram[b];
    if (rows == 0) return before;
    int64_t below = 0, bin = 0;  // the first bin in which the count below reaches K/E of all, compared in integers
    while (bin + 1 < bins && (below + histogram[bin]) * experts < top_k * rows) below += histogram[bin++];
    const int64_t inside = histogram[bin];
    const double part = inside == 0 ? 0.0
                                    : static_cast<double>(top_k * rows - below * experts) /
                                          (static_cast<double>(experts) * static_cast<double>(inside));
    const double value = low + (static_cast<double>(bin) + part) * ((high - low) / static_cast<double>(bins));
    return ema * before + (1 - ema) * value;
  }
};

}  // namespace torch_ext::kernels
