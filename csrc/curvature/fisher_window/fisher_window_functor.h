// The arithmetic of the Fisher window (M-FAC, Frantar et al., arXiv:2107.03356) that CPU and CUDA share.
#pragma once

#include <cstdint>

#include "core/block_reduce.h"
#include "core/dtype.h"
#include "core/math.h"

namespace torch_ext::kernels {

constexpr int64_t kTile = 1024;       // columns of a tile
constexpr int64_t kScaleBlock = 256;  // columns that share a scale (int8)
constexpr int64_t kScales = kTile / kScaleBlock;
constexpr int64_t kRun = 32;  // rows that the second pass adds in float before it goes on in double (narrow formats)

// One element of a row, from a gradient and coupled weight decay.
template <typename T>
TX_HD T row_element(T grad, T factor) {
  return factor * grad;
}
template <typename T>
TX_HD T row_element(T grad, T factor, T param, T weight_decay) {
  return factor * grad + weight_decay * param;
}

constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
TX_HD uint32_t magnitude_bits(float x) { return core::float_bits(x) & kMagnitudeMask; }
constexpr uint32_t kInfinityBits = 0x7f800000u;  // what is not finite has magnitude bits of at least this

// int8: value = scale * code. A block that is not finite gets a scale that is not, and with it all its products.
TX_HD float int8_scale(uint32_t largest_bits) { return core::bits_float(largest_bits) / 127.0f; }
TX_HD int32_t int8_code(float x, float scale) {
  if (!(scale > 0) || magnitude_bits(scale) >= kInfinityBits) return 0;
  const float ratio = x / scale;
  const float rounded = (ratio + 12582912.0f) - 12582912.0f;  // to the nearest integer, ties to even; |ratio| < 2^22
  return static_cast<int32_t>(rounded > 127 ? 127.0f : rounded < -127 ? -127.0f : rounded);
}

TX_HD float decoded(float x) { return x; }
TX_HD double decoded(double x) { return x; }
TX_HD float decoded(core::BFloat16 x) { return core::load(x); }
TX_HD float decoded(int8_t x) { return static_cast<float>(x); }  // without its scale

// Sum of value(0) ... value(kTile - 1) in the shape of core::sum_segment, but with 32 lanes in float: 32 products each,
// which for bfloat16 are exact.
template <typename Value>
TX_HD double sum_tile_narrow(const Value& value) {
  float lane[core::kLanes] = {};
  for (int64_t i = 0; i < kTile; i += core::kLanes) {
    for (int64_t l = 0; l < core::kLanes; ++l) lane[l] += value(i + l);
  }
  double wide[core::kLanes];
  for (int64_t l = 0; l < core::kLanes; ++l) wide[l] = static_cast<double>(lane[l]);
  return core::fold_lanes(wide);
}

// Slots: rows are numbered by age through a ring of `slots` = m + 1 places, of which `next` is the spare.
TX_HD int64_t slot_of_age(int64_t age, int64_t count, int64_t next, int64_t slots) {
  const int64_t slot = next - count + age;
  return slot < 0 ? slot + slots : slot;
}
// The live slots in ascending order: all but the spare one (while the window fills, the spare one stands behind them).
TX_HD int64_t slot_of_position(int64_t position, int64_t next) { return position < next ? position : position + 1; }

// How many tiles one partial sum of the first pass takes, in order. At most 64 partial sums, whatever the size: their
// shape, and with it the result, depends on the window alone.
TX_HD int64_t tiles_per_group(int64_t tiles) { return (tiles + 63) / 64; }

}  // namespace torch_ext::kernels
