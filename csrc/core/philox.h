// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter-based generator
// behind every random number of the pack. Nothing is stored; every run, device and thread count replays the same bits.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace torch_ext::core {

struct Philox4 {
  uint32_t x, y, z, w;
};

// What a counter word's low byte says about who draws; see csrc/README.md for the whole layout.
enum class PhiloxTag : uint32_t {
  kEsFactorA = 0,
  kEsFactorB = 1,
  kEsVector = 2,
  kProbe = 3,
  kTransport = 4,
  kEnvironment = 5,
  kRounding = 6,
  kInitial = 7,
  kOutcome = 8
};

TX_HD Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * counter.x;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * counter.z;
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// One stream of blocks: key = seed, counter = (block, stream, ordinal << 8 | tag, epoch).
struct PhiloxStream {
  uint32_t key0, key1, stream, ordinal_tag, epoch;

  TX_HD Philox4 block(uint32_t index) const { return philox4x32({index, stream, ordinal_tag, epoch}, key0, key1); }
};

inline PhiloxStream philox_stream(int64_t seed, int64_t stream, int64_t ordinal, PhiloxTag tag, int64_t epoch) {
  const auto bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(stream),
          (static_cast<uint32_t>(ordinal) << 8) | static_cast<uint32_t>(tag), static_cast<uint32_t>(epoch)};
}

}  // namespace torch_ext::core
