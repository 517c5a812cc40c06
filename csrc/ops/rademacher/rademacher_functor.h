// Rademacher signs from Philox bits: element e is bit e mod 128 of block e / 128, least significant bit first; a set
// bit is +1.
#pragma once

#include "core/dtype.h"
#include "core/philox.h"

namespace torch_ext::kernels {

constexpr int64_t kSignsPerBlock = 128;

TX_HD uint32_t word_of(const core::Philox4& block, int64_t index) {
  return index == 0 ? block.x : index == 1 ? block.y : index == 2 ? block.z : block.w;
}

// +1 or -1 from the lowest bit, as the bits of a float.
TX_HD float sign_from_bit(uint32_t bit) { return core::bits_float(0x3f800000u | ((~bit & 1u) << 31)); }

template <typename S>
TX_HD void store_sign(S& to, uint32_t bit) {
  core::store(to, static_cast<core::opmath_t<S>>(sign_from_bit(bit)));
}

}  // namespace torch_ext::kernels
