// Storage types and their arithmetic type. No torch include: c10's types are layout-compatible and cast at the op
// layer.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace torch_ext::core {

enum class DType : uint8_t { kFloat, kDouble, kBFloat16, kHalf };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename S>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
// The type in which values stored as S are computed: double for double, float for everything narrower.
template <typename S>
using opmath_t = typename OpMath<S>::type;

TX_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
TX_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

TX_HD float load(float x) { return x; }
TX_HD double load(double x) { return x; }
TX_HD float load(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
TX_HD float load(Half x) {
  // Shifted into float position the exponent is short by 112; one exact product rebases normal and subnormal numbers.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return bits_float((magnitude >= 0x0f800000u ? special : finite) | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

TX_HD void store(float& to, float x) { to = x; }
TX_HD void store(double& to, double x) { to = x; }
TX_HD void store(BFloat16& to, float x) {  // round to nearest even; NaN becomes the quiet NaN that torch writes
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
TX_HD void store(Half& to, float x) {  // round to nearest even, overflow to infinity, subnormals kept
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rebased = magnitude - 0x38000000u;
  const uint32_t normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  // 0.5f has the ulp of a half's subnormal (2^-24), so this addition rounds to the right multiple of it.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | ((bits >> 16) & 0x8000u));
}

}  // namespace torch_ext::core
