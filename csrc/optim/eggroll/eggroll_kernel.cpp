#include "optim/eggroll/eggroll_kernel.h"

#include <algorithm>
#include <limits>

#include "core/dtype_dispatch.h"

namespace torch_ext::kernels {
namespace {

struct SumBlock {
  template <typename Value>
  double operator()(int64_t n, const Value& value) const {
    return core::sum_block(n, value);
  }
};

template <typename S, bool kMomentum>
TX_CLONES void step_elements(S* __restrict param, const core::opmath_t<S>* __restrict grad,
                             core::opmath_t<S>* __restrict buffer, int64_t size, EggrollStep<core::opmath_t<S>> f) {
  using T = core::opmath_t<S>;
  for (int64_t i = 0; i < size; ++i) {
    const T p = core::load(param[i]);
    T b;
    if constexpr (kMomentum) {
      b = f.buffer(buffer[i], grad[i], p);
      buffer[i] = b;
    } else {
      b = f.decayed(grad[i], p);
    }
    core::store(param[i], f.parameter(p, b));
  }
}

}  // namespace

void eggroll_range_cpu(const EggrollShapeArgs& a, const double* values, EggrollStats* stats) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  double worst = kInf, best = -kInf;
  int64_t nonfinite = 0;
  for (int64_t i = 0; i < a.population; ++i) {
    const double f = a.sign * values[i];
    if (!eggroll_finite(f)) {
      ++nonfinite;
      continue;
    }
    worst = std::min(worst, f);
    best = std::max(best, f);
  }
  stats->worst = worst;
  stats->best = best;
  stats->nonfinite = static_cast<double>(nonfinite);
  stats->total = core::sum_block(a.population, [&](int64_t i) { return values[i]; });
}

void eggroll_shape_cpu(const EggrollShapeArgs& a, const EggrollShapeData& d) {
  if (eggroll_has_groups(a)) {
    for (int64_t g = 0; g * a.group < a.population; ++g) eggroll_group_stats(a, d, g, SumBlock());
  }
  eggroll_overall_stats(a, d, SumBlock());
  const EggrollStats stats = *d.stats;
  for (int64_t p = 0; p < d.coefficients_n; ++p) {
    d.coefficients[p] = eggroll_coefficient(a, stats, d.values, d.group, d.sorted, p);
  }
}

void eggroll_step_cpu(const EggrollTensor& t, const EggrollStepArgs& a, int64_t begin, int64_t end) {
  if (*a.nonfinite != 0) return;
  core::dispatch_dtype(a.type, [&](auto storage) {
    using S = decltype(storage);
    using T = core::opmath_t<S>;
    const EggrollStep<T> f{static_cast<T>(a.lr), static_cast<T>(a.momentum), static_cast<T>(a.weight_decay)};
    auto* const step = t.buffer == nullptr ? step_elements<S, false> : step_elements<S, true>;
    step(static_cast<S*>(t.param) + begin, static_cast<const T*>(t.grad) + begin,
         t.buffer == nullptr ? nullptr : static_cast<T*>(t.buffer) + begin, end - begin, f);
  });
}

}  // namespace torch_ext::kernels
