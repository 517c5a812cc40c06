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

}  // namespace torch_ext::core
