// Who perturbs what in an EGGROLL population (arXiv:2511.16652), and the two terms that noise adds to an element.
#pragma once

#include "core/noise.h"

namespace torch_ext::kernels {

// The members of a call, by their index in it. Members 2p and 2p + 1 share the noise of pair p with opposite signs.
struct EggrollMembers {
  int64_t seed, epoch;
  int64_t begin;  // number of the first member
  int64_t count;
  bool antithetic;

  TX_HD int64_t pair(int64_t i) const { return antithetic ? (begin + i) >> 1 : begin + i; }
  TX_HD int sign(int64_t i) const { return antithetic && ((begin + i) & 1) != 0 ? -1 : 1; }
  // Pairs that the call touches, and their members [first, last).
  TX_HD int64_t first_pair() const { return pair(0); }
  TX_HD int64_t pairs() const { return count == 0 ? 0 : pair(count - 1) - pair(0) + 1; }
  TX_HD int64_t first(int64_t pair) const {
    const int64_t i = antithetic ? 2 * pair - begin : pair - begin;
    return i < 0 ? 0 : i;
  }
  TX_HD int64_t last(int64_t pair) const {
    const int64_t i = antithetic ? 2 * pair + 2 - begin : pair + 1 - begin;
    return i > count ? count : i;
  }
  TX_HD core::PhiloxStream stream(int64_t pair, int64_t ordinal, core::PhiloxTag tag) const {
    return {static_cast<uint32_t>(static_cast<uint64_t>(seed)),
            static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), static_cast<uint32_t>(pair),
            (static_cast<uint32_t>(ordinal) << 8) | static_cast<uint32_t>(tag), static_cast<uint32_t>(epoch)};
  }
};

// theta + s sigma eps, and one term of theta + (s sigma / sqrt(rank)) (A B^T) or of x (...): `weight` holds the sign,
// the scale and one side's number.
template <typename T>
TX_HD T perturbed(T value, T weight, T noise) {
  return value + weight * noise;
}

}  // namespace torch_ext::kernels
