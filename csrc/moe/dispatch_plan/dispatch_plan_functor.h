// Where an entry (t, k) goes, and the arithmetic of moving rows of tokens, the same on host and device.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace torch_ext::kernels {

// Rows that a segment takes with `kept` of them filled.
TX_HD int64_t plan_padded(int64_t kept, int64_t align) { return (kept + align - 1) / align * align; }
// capacity < 0: none.
TX_HD int64_t plan_kept(int64_t count, int64_t capacity) {
  return capacity >= 0 && count > capacity ? capacity : count;
}

// One more addend of a combined element, in the order of k.
template <typename T>
TX_HD T combine_step(T sum, T gate, T z) {
  return sum + gate * z;
}

}  // namespace torch_ext::kernels
