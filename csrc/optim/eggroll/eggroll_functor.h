// The arithmetic of EGGROLL around its noise (Sarkar et al., "Evolution Strategies at the Hyperscale",
// arXiv:2511.16652): what values become before they weight the noise, and the update of a parameter.
#pragma once

#include <cstdint>

#include "core/block_reduce.h"
#include "core/macros.h"
#include "core/math.h"

namespace torch_ext::kernels {

// How the values of a population become weights; see EggrollOptions::shaping.
enum class Shaping { kZScore, kGrouped, kCenteredRank, kSign, kRaw, kSoftmax, kBaseline };

struct EggrollShapeArgs {
  Shaping shaping;
  int64_t population;
  int64_t group;  // members of one group; the population where there are none
  double temperature;
  double sign;  // f = sign * value: -1 minimises the value
  bool antithetic;
  bool replace;  // what is not finite counts as the worst finite value
};

// What all values have in common; kept on the device.
struct EggrollStats {
  double total;      // of the raw values
  double worst;      // smallest finite f
  double best;       // largest finite f
  double mean;       // of f
  double scale;      // what f - mean is divided by, or the sum of the softmax
  double nonfinite;  // how many values are not finite
};

template <typename T>
struct EggrollStep {
  T lr, momentum, weight_decay;

  // b <- momentum b + (G + weight_decay p), as torch's SGD.
  TX_HD T buffer(T b, T g, T p) const { return momentum * b + decayed(g, p); }
  TX_HD T decayed(T g, T p) const { return g + weight_decay * p; }
  // p <- p - lr b.
  TX_HD T parameter(T p, T b) const { return p - lr * b; }
};

TX_HD bool eggroll_finite(double x) { return x - x == 0; }

// e^x for x <= 0.
TX_HD double eggroll_exp(double x) { return x < -700 ? 0.0 : core::power(2.718281828459045, x); }

// f of one member: larger is better.
TX_HD double eggroll_fitness(const EggrollShapeArgs& a, const EggrollStats& s, double value) {
  return a.replace && !eggroll_finite(value) ? s.worst : a.sign * value;
}

// Average rank of f among all, 0 ... population - 1, from the sorted f.
TX_HD double eggroll_rank(const double* sorted, int64_t n, double f) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < f) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  int64_t above = low;
  high = n;
  while (above < high) {
    const int64_t middle = (above + high) / 2;
    if (sorted[middle] <= f) {
      above = middle + 1;
    } else {
      high = middle;
    }
  }
  return 0.5 * static_cast<double>(low + above - 1);
}

// The weight z of member i. `values` are all values; `group` is that of its group (mean, or baseline and spread),
// `sorted` the sorted f (centered_rank only).
TX_HD double eggroll_weight(const EggrollShapeArgs& a, const EggrollStats& s, const double* values, const double* group,
                            const double* sorted, int64_t i) {
  if (!(s.worst < s.best)) return 0;  // no difference, no direction: exactly, not to rounding
  const double f = eggroll_fitness(a, s, values[i]);
  switch (a.shaping) {
    case Shaping::kZScore:
      return (f - s.mean) / s.scale;
    case Shaping::kGrouped:
      return (f - group[2 * (i / a.group)]) / s.scale;
    case Shaping::kCenteredRank:
      return eggroll_rank(sorted, a.population, f) / static_cast<double>(a.population - 1) - 0.5;
    case Shaping::kSoftmax:
      return eggroll_exp((f - s.best) / a.temperature) / s.scale;
    case Shaping::kBaseline:  // the first pair of a group carries no noise and is what the others are compared with
      return i % a.group < 2 ? 0.0 : (f - group[2 * (i / a.group)]) / group[2 * (i / a.group) + 1];
    default:
      return f;
  }
}

// The coefficient of the noise of pair p: the difference of its members' weights.
TX_HD double eggroll_coefficient(const EggrollShapeArgs& a, const EggrollStats& s, const double* values,
                                 const double* group, const double* sorted, int64_t p) {
  if (!a.antithetic) return eggroll_weight(a, s, values, group, sorted, p);
  if (a.shaping == Shaping::kSign) {
    const double plus = eggroll_fitness(a, s, values[2 * p]), minus = eggroll_fitness(a, s, values[2 * p + 1]);
    return static_cast<double>(plus > minus) - static_cast<double>(plus < minus);
  }
  return eggroll_weight(a, s, values, group, sorted, 2 * p) - eggroll_weight(a, s, values, group, sorted, 2 * p + 1);
}

}  // namespace torch_ext::kernels
