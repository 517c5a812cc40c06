// Elementary functions whose bits are the same on every compiler, instruction set and device: plain + - * / only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace torch_ext::core {

TX_HD float square_root(float x) { return sqrtf(x); }
TX_HD double square_root(double x) { return sqrt(x); }
TX_HD float absolute(float x) { return fabsf(x); }
TX_HD double absolute(double x) { return fabs(x); }

// x^y for x >= 0 and |y log x| within double range; relative error below 1e-14. Infinity and NaN propagate.
TX_HD double power(double x, double y) {
  if (y == 0) return 1;
  if (!(x > 0) || x > 1.7976931348623157e308) return x != x ? x : (x > 0) == (y > 0) ? HUGE_VAL : 0.0;
  double scale = 0;
  if (x < 2.2250738585072014e-308) {  // subnormal: rescale exactly
    x *= 0x1p54;
    scale = -54;
  }
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const int64_t shift = (bits - 0x3fe6a09e667f3bcdLL) >> 52;  // mantissa in [sqrt(1/2), sqrt(2))
  bits -= shift * (1LL << 52);
  double m;
  memcpy(&m, &bits, sizeof(m));
  const double s = (m - 1) / (m + 1), s2 = s * s;  // log m = 2 atanh s
  double series = 0;
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * s2;
  const double log_m = 2 * s + 2 * s * series;
  const double exponent = static_cast<double>(shift) + scale;
  // y log2 x = integer part + fraction; the integer part goes into the exponent bits, the fraction through Taylor.
  const double t = y * (exponent + log_m * 1.4426950408889634);
  if (t > 1023.99) return HUGE_VAL;
  if (t < -1021.0) return 0;
  const double whole = floor(t + 0.5);
  const double split = y * 134217729.0;  // y = high + low of 26 bits each: their products with the exponent are exact
  const double high = split - (split - y), low = y - high;
  const double r = ((high * exponent - whole) + low * exponent) * 0.6931471805599453 + y * log_m;
  double e = 1;
  for (int k = 14; k >= 1; --k) e = 1 + e * r / k;
  const int64_t scale_bits = (static_cast<int64_t>(whole) + 1023) << 52;
  double factor;
  memcpy(&factor, &scale_bits, sizeof(factor));
  return e * factor;
}

// exp(x); 0 for x < floor, infinity for x > 709. floor >= -708. Relative error below 4e-16.
TX_HD double exponential(double x, double floor) {
  constexpr double kMagic = 0x1.8p52;  // adding it rounds to an integer, which then stands in the low bits
  double y = x < floor ? floor : x;
  y = y > 709.0 ? 709.0 : y;
  const double shifted = y * 1.4426950408889634 + kMagic;
  const double whole = shifted - kMagic;
  const double r = (y - whole * 0x1.62e42feep-1) - whole * 0x1.a39ef35793c76p-33;  // log 2 in two parts
  double e = 1.0 / 6227020800.0;
  e = e * r + 1.0 / 479001600.0;
  e = e * r + 1.0 / 39916800.0;
  e = e * r + 1.0 / 3628800.0;
  e = e * r + 1.0 / 362880.0;
  e = e * r + 1.0 / 40320.0;
  e = e * r + 1.0 / 5040.0;
  e = e * r + 1.0 / 720.0;
  e = e * r + 1.0 / 120.0;
  e = e * r + 1.0 / 24.0;
  e = e * r + 1.0 / 6.0;
  e = e * r + 0.5;
  e = e * r + 1.0;
  e = e * r + 1.0;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023u) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof(scale));
  e = e * scale;
  e = x > 709.0 ? HUGE_VAL : e;
  return x < floor ? 0.0 : e;
}

// exp(x) of x <= 0 in float; 0 for x < floor, floor >= -87. Relative error below 2e-7.
TX_HD float exponential_below(float x, float floor) {
  constexpr float kMagic = 0x1.8p23f;
  const float y = x < floor ? floor : x;
  const float shifted = y * 1.44269504f + kMagic;
  const float whole = shifted - kMagic;
  const float r = (y - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f;
  float e = 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return x < floor ? 0.0f : e * scale;
}
TX_HD double exponential_below(double x, double floor) { return exponential(x, floor); }

}  // namespace torch_ext::core
