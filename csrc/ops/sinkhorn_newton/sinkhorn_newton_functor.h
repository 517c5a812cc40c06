// Arithmetic of one entry and of one log-sum-exp of entropic transport, the same on host and device.
//
// exp and log are made of + - * / only, so that CPU (every instruction set) and CUDA compute the same bits, and free of
// branches, so that the loops around them run in vector registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/math.h"

namespace torch_ext::kernels {

// Below this an addend of a log-sum-exp is taken as 0: exp(-60) = 9e-27 of the largest addend, so 10^10 of them stay
// below the rounding of the sum.
constexpr double kNegligible = -60.0;
constexpr double kUnderflow = -708.0;  // exp() of less is 0 in a plan

using core::exponential;

// log(x) for x > 0; -infinity for 0. Absolute error below 4e-16 (1 + |log x|).
TX_HD double logarithm(double x) {
  const bool tiny = x < 2.2250738585072014e-308;
  const double y = tiny ? x * 0x1p54 : x;
  int64_t bits;
  memcpy(&bits, &y, sizeof(bits));
  const int64_t shift = (bits - 0x3fe6a09e667f3bcdLL) >> 52;  // mantissa in [sqrt(1/2), sqrt(2))
  bits -= shift * (int64_t{1} << 52);
  double m;
  memcpy(&m, &bits, sizeof(m));
  const double s = (m - 1) / (m + 1), s2 = s * s;  // log m = 2 atanh s
  double series = 0;
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * s2;
  const double exponent = static_cast<double>(shift) - (tiny ? 54.0 : 0.0);
  const double log_m = 2 * s + 2 * s * series;
  const double result = exponent * 0x1.62e42feep-1 + (exponent * 0x1.a39ef35793c76p-33 + log_m);
  return x > 0 ? (x < HUGE_VAL ? result : x) : (x == 0 ? -HUGE_VAL : NAN);
}

// sum exp(v) = sum * exp(max); empty: max = -infinity, sum = 0.
struct LogSum {
  double max, sum;
};
TX_HD double shift_of(double max) { return max > -HUGE_VAL ? max : 0.0; }  // so that -inf - shift is -inf, not NaN

TX_HD LogSum merged(LogSum a, LogSum b) {
  const double max = a.max > b.max ? a.max : b.max, shift = shift_of(max);
  return {max, a.sum * exponential(a.max - shift, kNegligible) + b.sum * exponential(b.max - shift, kNegligible)};
}
TX_HD double value_of(LogSum total) { return shift_of(total.max) + logarithm(total.sum); }

// Exponents of the plan (f_i + g_j - C_ij) / eps, in double whatever the storage of C: at C / eps = 1200 a float
// difference would put 1e-4 into the marginals.
TX_HD double row_exponent(double g, double cost, double inv_eps) { return (g - cost) * inv_eps; }
// -infinity wherever a marginal is 0, whatever the cost says there.
TX_HD double plan_exponent(double f, double g, double cost, double inv_eps) {
  const double sum = f + g;
  return sum > -HUGE_VAL ? (sum - cost) * inv_eps : sum;
}

// Entry (i, j) of a dense cost [n, m].
template <typename S>
struct DenseCost {
  const S* entries;
  double offset;
  int64_t m;
  TX_HD double at(int64_t i, int64_t j) const { return static_cast<double>(core::load(entries[i * m + j])) - offset; }
};

// |x_i - y_j|^2 / 2 of points x [n, d] and y_t [d, m].
struct PointCost {
  const double* x;
  const double* y_t;
  int64_t m, d;
  TX_HD static double squared(double x, double y) { return (x - y) * (x - y); }
  TX_HD double at(int64_t i, int64_t j) const {
    double total = 0;
    for (int64_t axis = 0; axis < d; ++axis) total += squared(x[i * d + axis], y_t[axis * m + j]);
    return 0.5 * total;
  }
};

}  // namespace torch_ext::kernels
