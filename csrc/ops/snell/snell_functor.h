// SNELL (arXiv:2411.01800): one entry of the kernelised update, its sparsifier and the slope of that. Rows i belong to
// inputs, columns j to outputs:
//   d_p = ||A[p,i] - B[p,j]||,   w = scale (d_0 - d_1)   (Eq. 4),   phi(w) with threshold t   (Eq. 5).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/math.h"

namespace torch_ext::kernels {

enum class SnellRule : uint8_t { kCode, kPaper, kHard, kSoft, kNone };

template <typename T>
TX_HD T snell_weight(T d0, T d1, T scale) {
  return scale * (d0 - d1);
}

// One more coordinate of a squared distance. Direct differences: ||a||^2 + ||b||^2 - 2ab cancels.
template <typename T>
TX_HD T snell_square(T sum, T a, T b) {
  const T difference = a - b;
  return sum + difference * difference;
}

// phi(w). "Not above t" is written so that a NaN weight stays NaN instead of counting as pruned.
template <SnellRule R, typename T>
TX_HD T snell_phi(T w, T t) {
  const T a = core::absolute(w);
  if (R == SnellRule::kNone) return w;
  const T kept = R == SnellRule::kCode    ? w * a
                 : R == SnellRule::kPaper ? w * (a - t)
                 : R == SnellRule::kHard  ? w
                 : w < 0                  ? t - a
                                          : a - t;
  return a <= t ? T(0) : kept;
}

// d phi / d w at a constant threshold. Detached: the factor next to w counts as a constant, as in the published code.
template <SnellRule R, bool kExact, typename T>
TX_HD T snell_slope(T w, T t) {
  const T a = core::absolute(w);
  if (R == SnellRule::kNone) return T(1);
  const T slope = R == SnellRule::kCode    ? (kExact ? a + a : a)
                  : R == SnellRule::kPaper ? (kExact ? a + a - t : a - t)
                                           : T(1);
  return a <= t ? T(0) : slope;
}

// d phi / d t, zero where phi does not depend on t but for its mask.
template <SnellRule R, typename T>
TX_HD T snell_pull(T w, T t) {
  if (R != SnellRule::kPaper && R != SnellRule::kSoft) return T(0);
  const T sign = w < 0 ? T(-1) : T(1);
  return core::absolute(w) <= t ? T(0) : R == SnellRule::kPaper ? -w : -sign;
}

// Gradient of the distance d: d d / d a = (a - b) / d, and 0 where two rows coincide.
template <typename T>
TX_HD T snell_over_distance(T gradient, T d) {
  return d > 0 ? gradient / d : T(0);
}

// The bits of |w|: an integer of the same order, as long as w is not NaN.
TX_HD uint32_t snell_bits(float w) { return core::float_bits(w) & 0x7fffffffu; }
TX_HD uint64_t snell_bits(double w) {
  uint64_t bits;
  memcpy(&bits, &w, sizeof(bits));
  return bits & 0x7fffffffffffffffULL;
}
TX_HD void snell_from_bits(uint64_t bits, float& w) { w = core::bits_float(static_cast<uint32_t>(bits)); }
TX_HD void snell_from_bits(uint64_t bits, double& w) { memcpy(&w, &bits, sizeof(bits)); }

// The linear-interpolation quantile between two neighbouring order statistics, as torch.lerp rounds it, but kept below
// the upper one, so that the number of weights above it is exact.
template <typename T>
TX_HD T snell_interpolate(T low, T high, T fraction) {
  const T t = fraction < T(0.5) ? low + fraction * (high - low) : high - (high - low) * (T(1) - fraction);
  return t < high ? t : low;
}

}  // namespace torch_ext::kernels
