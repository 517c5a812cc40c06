// The one shape in which a contiguous block of values is summed. It does not depend on threads, instruction set or
// device: segments of 1024 elements; in a segment 32 lanes add every 32nd element in double, then fold as a tree
// (16, 8, 4, 2, 1); segments are added in order. Blocks shorter than 32 (convolution kernels) are added one by one.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace torch_ext::core {

constexpr int64_t kLanes = 32;
constexpr int64_t kSegment = 1024;

// Sum of value(0) ... value(size - 1), sequential; `value` returns double.
template <typename Value>
TX_HD double sum_short(int64_t size, const Value& value) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += value(i);
  return total;
}

// Tree over the lanes. Written out, because a compiler keeps a loop over `half` and with it the lanes in memory.
template <typename T>
TX_HD T fold_lanes(T* lane) {
  static_assert(kLanes == 32, "one line for each halving");
  for (int64_t l = 0; l < 16; ++l) lane[l] += lane[l + 16];
  for (int64_t l = 0; l < 8; ++l) lane[l] += lane[l + 8];
  for (int64_t l = 0; l < 4; ++l) lane[l] += lane[l + 4];
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// The same shape as one warp of CUDA computes, on one CPU thread.
template <typename Value>
TX_HD double sum_segment(int64_t size, const Value& value) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += value(i + l);
  }
  for (int64_t l = 0; i + l < size; ++l) lane[l] += value(i + l);
  return fold_lanes(lane);
}

template <typename Value>
TX_HD double sum_block(int64_t size, const Value& value) {
  if (size < kLanes) return sum_short(size, value);
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kSegment) {
    const int64_t count = size - begin < kSegment ? size - begin : kSegment;
    total += sum_segment(count, [&](int64_t i) { return value(begin + i); });
  }
  return total;
}

}  // namespace torch_ext::core
