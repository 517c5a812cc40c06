// Entry points of EGGROLL's own kernels over raw pointers: shaping of the values, update of the parameters.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "optim/eggroll/eggroll_functor.h"

namespace torch_ext::kernels {

// Everything a shaping reads and writes, on one device. All double.
struct EggrollShapeData {
  const double* values;    // [population]
  const double* sorted;    // [population], f in ascending order; null but for centered_rank
  double* group;           // [groups, 2]
  EggrollStats* stats;     // first filled by eggroll_range
  double* coefficients;    // [pairs], or [population] without antithetic pairs
  float* nonfinite;        // 1 if nothing can be made of the values
  double* mean;            // of the raw values
  int64_t coefficients_n;  // elements of coefficients
};

// Smallest and largest finite f, number of the others, sum of the values; before `sorted` is made.
void eggroll_range_cpu(const EggrollShapeArgs& args, const double* values, EggrollStats* stats);
void eggroll_range_cuda(const EggrollShapeArgs& args, const double* values, EggrollStats* stats, void* stream);
// The rest.
void eggroll_shape_cpu(const EggrollShapeArgs& args, const EggrollShapeData& data);
void eggroll_shape_cuda(const EggrollShapeArgs& args, const EggrollShapeData& data, void* stream);

// One parameter of an update. Gradient and buffer are float for float/bfloat16/half parameters and double for double
// ones; the buffer is null without momentum.
struct EggrollTensor {
  void* param;
  const void* grad;
  void* buffer;
  float* step;  // accepted steps
  int64_t numel;
};
struct EggrollStepArgs {
  double lr, momentum, weight_decay;
  core::DType type;
  const float* nonfinite;  // on the tensors' device: nonzero leaves everything as it is
};

// Elements [begin, end) of one parameter; its step counter is not touched.
void eggroll_step_cpu(const EggrollTensor& tensor, const EggrollStepArgs& args, int64_t begin, int64_t end);
// All parameters, counters included, on `stream` of the current device.
void eggroll_step_cuda(const std::vector<EggrollTensor>& tensors, const EggrollStepArgs& args, void* stream);

// --- the passes, for CPU (one lane) and CUDA (a warp) alike: `Sum` adds value(0) ... value(n - 1) in the one shape of
// core/block_reduce.h.

template <typename Sum>
TX_HD void eggroll_group_stats(const EggrollShapeArgs& a, const EggrollShapeData& d, int64_t g, const Sum& sum) {
  const double* values = d.values + g * a.group;
  const EggrollStats& s = *d.stats;
  const auto n = static_cast<double>(a.group);
  const double mean = sum(a.group, [&](int64_t i) { return eggroll_fitness(a, s, values[i]); }) / n;
  double spread = 0;
  if (a.shaping == Shaping::kBaseline) {
    const double square = sum(a.group, [&](int64_t i) {
      const double x = eggroll_fitness(a, s, values[i]) - mean;
      return x * x;
    });
    spread = core::square_root(square / n) + 1e-8;
  }
  d.group[2 * g] = a.shaping == Shaping::kBaseline
                       ? 0.5 * (eggroll_fitness(a, s, values[0]) + eggroll_fitness(a, s, values[1]))
                       : mean;
  d.group[2 * g + 1] = spread;
}

template <typename Sum>
TX_HD void eggroll_overall_stats(const EggrollShapeArgs& a, const EggrollShapeData& d, const Sum& sum) {
  EggrollStats& s = *d.stats;
  const int64_t n = a.population;
  const double count = static_cast<double>(n);
  const double mean = sum(n, [&](int64_t i) { return eggroll_fitness(a, s, d.values[i]); }) / count;
  double scale = 1;
  if (a.shaping == Shaping::kZScore || a.shaping == Shaping::kGrouped) {
    const double square = sum(n, [&](int64_t i) {
      const double x = eggroll_fitness(a, s, d.values[i]) - mean;
      return x * x;
    });
    scale = core::square_root(square / count + 1e-5);
  }
  if (a.shaping == Shaping::kSoftmax) {
    scale =
        sum(n, [&](int64_t i) { return eggroll_exp((eggroll_fitness(a, s, d.values[i]) - s.best) / a.temperature); });
  }
  s.mean = mean;
  s.scale = scale;
  *d.mean = s.total / count;
  *d.nonfinite = a.replace ? static_cast<float>(s.nonfinite >= count) : static_cast<float>(s.nonfinite > 0);
}

TX_HD bool eggroll_has_groups(const EggrollShapeArgs& a) {
  return a.shaping == Shaping::kGrouped || a.shaping == Shaping::kBaseline;
}

}  // namespace torch_ext::kernels
