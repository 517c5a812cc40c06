#include "optim/alflb/alflb_kernel.h"

#include <algorithm>

#include "core/block_reduce.h"

namespace torch_ext::kernels {
namespace {

double mean_of(int64_t size, const float* values) {
  return core::sum_block(size, [values](int64_t e) { return static_cast<double>(values[e]); }) /
         static_cast<double>(size);
}

void move_biases(const AlflbLayer& t, const AlflbArgs& args, const AlflbStep& f) {
  const int64_t experts = t.numel;
  const auto move = [&](int64_t e, double by) { t.bias[e] = static_cast<float>(static_cast<double>(t.bias[e]) + by); };
  if (args.rule == AlflbRule::kSign) {
    for (int64_t e = 0; e < experts; ++e) move(e, f.sign(t.load[e]));
  } else if (args.rule == AlflbRule::kProportional) {
    for (int64_t e = 0; e < experts; ++e) move(e, f.proportional(t.load[e]));
  } else if (args.rule == AlflbRule::kMomentum) {
    const double mean =
        core::sum_block(experts, [&](int64_t e) { return f.bounded(t.load[e]); }) / static_cast<double>(experts);
    for (int64_t e = 0; e < experts; ++e) {
      t.momentum[e] = static_cast<float>(f.averaged(t.momentum[e], f.bounded(t.load[e]) - mean));
      move(e, t.momentum[e]);
    }
  } else {
    for (int64_t e = 0; e < experts; ++e) {
      t.bias[e] = static_cast<float>(f.quantile(t.histogram + e * t.bins, t.bins, t.bounds[0], t.bounds[1], t.bias[e]));
    }
  }
  if (!args.center) return;
  const double mean = mean_of(experts, t.bias);
  for (int64_t e = 0; e < experts; ++e) move(e, -mean);
}

void clear(const AlflbLayer& t) {
  std::fill(t.load, t.load + t.numel, int64_t{0});
  if (t.histogram != nullptr) std::fill(t.histogram, t.histogram + t.numel * t.bins, int64_t{0});
}

}  // namespace

void alflb_update_cpu(const AlflbLayer& t, const AlflbArgs& args) {
  if (*args.nonfinite != 0) return clear(t);
  int64_t total = 0;
  for (int64_t e = 0; e < t.numel; ++e) total += t.load[e];
  if (total == 0) return;
  *t.updates += 1;
  *t.step += 1;
  const AlflbStep f(args, *t.updates, total, t.numel, t.top_k);
  if (args.rule == AlflbRule::kQuantile || f.rate != 0) move_biases(t, args, f);  // a rate of 0 freezes the biases
  std::copy(t.load, t.load + t.numel, t.last_load);
  if (t.bounds != nullptr) {
    const auto [low, high] = std::minmax_element(t.bias, t.bias + t.numel);
    t.bounds[0] = *low - 1;
    t.bounds[1] = *high + 1;
  }
  clear(t);
}

}  // namespace torch_ext::kernels
