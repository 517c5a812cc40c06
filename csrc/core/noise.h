// Noise that is a function of its position: symmetric laws of mean 0 and variance 1 from Philox blocks, without any
// call of libm, so that every instruction set and device gives the same bits. Element q of a stream is
//
//   law           elements of a block   value
//   kGaussian     4                     word q % 4: sign = bit 31; c = bits 21-30 picks a cell of the table of
//   quantiles,
//                                       bits 0-20 interpolate in it. |z| < 3.798, E z^4 = 2.99662, E z^6 = 14.864
//   kBinomial16   8                     (ones among 16 bits - 8) / 2, low half of word q / 2 % 4 first; E z^4 = 2.875
//   kBinomial64   2                     (ones among 64 bits - 32) / 4; E z^4 = 2.96875
//   kRademacher   128                   +1 for a set bit, -1 for a clear one, low bit of word 0 first; E z^4 = 1
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/noise_table.h"
#include "core/philox.h"

namespace torch_ext::core {

enum class NoiseLaw : uint8_t { kGaussian, kBinomial16, kBinomial64, kRademacher };

// One interval of the interpolated quantile function: |z| = value + slope * fraction, fraction in [0, 2^21). The slope
// is the difference of two knots times 2^-21, which is exact.
struct GaussianCell {
  float value, slope;
};
constexpr int kGaussianCells = 1024;

struct GaussianTable {
  GaussianCell cell[kGaussianCells];
};
constexpr GaussianTable make_gaussian_table() {
  GaussianTable table{};
  for (int c = 0; c < kGaussianCells; ++c) {
    table.cell[c] = {kGaussianKnots[c], (kGaussianKnots[c + 1] - kGaussianKnots[c]) * 0x1p-21f};
  }
  return table;
}

TX_HD float gaussian_from_word(uint32_t word, const GaussianCell* cells) {
  const GaussianCell cell = cells[(word >> 21) & (kGaussianCells - 1)];
  const float magnitude = cell.value + cell.slope * static_cast<float>(static_cast<int32_t>(word & 0x1fffffu));
  return bits_float(float_bits(magnitude) | (word & 0x80000000u));
}

// Ones in each half of a word, as two 16-bit numbers.
TX_HD uint32_t count_halves(uint32_t w) {
  w -= (w >> 1) & 0x55555555u;
  w = (w & 0x33333333u) + ((w >> 2) & 0x33333333u);
  w = (w + (w >> 4)) & 0x0f0f0f0fu;
  return (w + (w >> 8)) & 0x00ff00ffu;
}

TX_HD float binomial16_from_count(uint32_t ones) { return static_cast<float>(static_cast<int32_t>(ones) - 8) * 0.5f; }

TX_HD float binomial64_from_words(uint32_t low, uint32_t high) {
  const uint32_t halves = count_halves(low) + count_halves(high);
  return static_cast<float>(static_cast<int32_t>((halves & 0xffffu) + (halves >> 16)) - 32) * 0.25f;
}

// +1 or -1 from the lowest bit.
TX_HD float rademacher_from_bit(uint32_t bit) { return bits_float(0x3f800000u | ((~bit & 1u) << 31)); }

TX_HD uint32_t noise_word(const Philox4& block, int64_t index) {
  return index == 0 ? block.x : index == 1 ? block.y : index == 2 ? block.z : block.w;
}

// Elements that one Philox block gives.
template <NoiseLaw law>
constexpr int64_t kNoisePerBlock = law == NoiseLaw::kGaussian     ? 4
                                   : law == NoiseLaw::kBinomial16 ? 8
                                   : law == NoiseLaw::kBinomial64 ? 2
                                                                  : 128;

// What makes an element of the law an integer: 2, 4 and 1; 0 for the gaussian law, which has no such factor.
template <NoiseLaw law>
constexpr int kNoiseUnits = law == NoiseLaw::kGaussian     ? 0
                            : law == NoiseLaw::kBinomial16 ? 2
                            : law == NoiseLaw::kBinomial64 ? 4
                                                           : 1;

// Element `index` of a block.
template <NoiseLaw law>
TX_HD float noise_of_block(const Philox4& block, int64_t index, const GaussianCell* cells) {
  if constexpr (law == NoiseLaw::kGaussian) {
    return gaussian_from_word(noise_word(block, index), cells);
  } else if constexpr (law == NoiseLaw::kBinomial16) {
    return binomial16_from_count((count_halves(noise_word(block, index >> 1)) >> ((index & 1) * 16)) & 0xffu);
  } else if constexpr (law == NoiseLaw::kBinomial64) {
    return index == 0 ? binomial64_from_words(block.x, block.y) : binomial64_from_words(block.z, block.w);
  } else {
    return rademacher_from_bit(noise_word(block, index >> 5) >> (index & 31));
  }
}

// Element q of a stream: what every faster form must equal.
template <NoiseLaw law>
TX_HD float noise_at(const PhiloxStream& stream, int64_t q, const GaussianCell* cells) {
  return noise_of_block<law>(stream.block(static_cast<uint32_t>(q / kNoisePerBlock<law>)), q % kNoisePerBlock<law>,
                             cells);
}

// Rounded as a value of storage type S is: what a layer with weights of that type multiplies with.
template <typename S>
TX_HD opmath_t<S> noise_as(float z) {
  S stored;
  store(stored, static_cast<opmath_t<S>>(z));
  return load(stored);
}

template <NoiseLaw law>
using NoiseLawConstant = std::integral_constant<NoiseLaw, law>;

template <typename Body>
auto dispatch_noise(NoiseLaw law, const Body& body) {
  switch (law) {
    case NoiseLaw::kBinomial16:
      return body(NoiseLawConstant<NoiseLaw::kBinomial16>{});
    case NoiseLaw::kBinomial64:
      return body(NoiseLawConstant<NoiseLaw::kBinomial64>{});
    case NoiseLaw::kRademacher:
      return body(NoiseLawConstant<NoiseLaw::kRademacher>{});
    default:
      return body(NoiseLawConstant<NoiseLaw::kGaussian>{});
  }
}

}  // namespace torch_ext::core
