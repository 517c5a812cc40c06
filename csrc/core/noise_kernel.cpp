#include "core/noise_kernel.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/dtype_dispatch.h"
#include "core/noise_words_kernel.h"

namespace torch_ext::kernels {
namespace {

using core::NoiseLaw;
using core::opmath_t;
using core::PhiloxStream;

// Blocks made together.
template <NoiseLaw law>
constexpr int64_t kBatch = core::kNoisePerBlock<law> == 128 ? 16 : 64;

TX_CLONES void expand_binomial16(const uint32_t* __restrict words, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t ones = core::count_halves(words[i]);
    out[2 * i] = core::binomial16_from_count(ones & 0xffffu);
    out[2 * i + 1] = core::binomial16_from_count(ones >> 16);
  }
}

TX_CLONES void expand_rademacher(const uint32_t* __restrict words, int64_t count, float* __restrict out) {
  for (int64_t w = 0; w < count; ++w) {
    const uint32_t word = words[w];
    for (uint32_t bit = 0; bit < 32; ++bit) out[w * 32 + bit] = core::rademacher_from_bit(word >> bit);
  }
}

template <NoiseLaw law>
void expand(const uint32_t* words, int64_t count, float* out) {
  if constexpr (law == NoiseLaw::kGaussian) {
    gaussian_from_words(words, count, out);
  } else if constexpr (law == NoiseLaw::kBinomial16) {
    expand_binomial16(words, count, out);
  } else if constexpr (law == NoiseLaw::kBinomial64) {
    binomial64_from_words(words, count / 2, out);
  } else {
    expand_rademacher(words, count, out);
  }
}

template <NoiseLaw law>
void range(const PhiloxStream& stream, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kPer = core::kNoisePerBlock<law>;
  uint32_t words[4 * kBatch<law>];
  float edge[kPer * kBatch<law>];
  for (int64_t block = begin / kPer; block * kPer < end;) {
    const int64_t first = block * kPer;
    const int64_t needed = ((end - first + kPer - 1) / kPer + kPhiloxStep - 1) / kPhiloxStep * kPhiloxStep;
    const int64_t count = std::min(needed, kBatch<law>);
    philox_words(static_cast<uint32_t>(block), count, stream, words);
    if (first >= begin && first + count * kPer <= end) {
      expand<law>(words, 4 * count, out + (first - begin));
    } else {
      expand<law>(words, 4 * count, edge);
      const int64_t from = std::max(first, begin), to = std::min(first + count * kPer, end);
      std::copy(edge + (from - first), edge + (to - first), out + (from - begin));
    }
    block += count;
  }
}

// to[i] = scale * z[i * stride], rounded as S.
template <typename S>
TX_CLONES void convert(const float* __restrict z, int64_t stride, int64_t count, opmath_t<S> scale,
                       opmath_t<S>* __restrict to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = scale * core::noise_as<S>(z[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = scale * core::noise_as<S>(z[i * stride]);
  }
}

constexpr int64_t kScratch = 2048;  // elements that are converted at a time

template <typename S, NoiseLaw law>
void factor(const NoiseFactor& f, opmath_t<S>* out, int64_t stride, opmath_t<S> scale) {
  if constexpr (std::is_same_v<S, float>) {
    if (f.rank == 1 && scale == 1) return range<law>(f.stream, f.row_begin, f.row_begin + f.rows, out);
  }
  float scratch[kScratch];
  // Whole rows at a time, or parts of one row where the rank is larger than the scratch.
  const int64_t columns = std::min(f.rank, kScratch), rows = std::max<int64_t>(1, kScratch / f.rank);
  for (int64_t row = 0; row < f.rows; row += rows) {
    const int64_t height = std::min(rows, f.rows - row);
    for (int64_t column = 0; column < f.rank; column += columns) {
      const int64_t width = std::min(columns, f.rank - column);
      const int64_t first = (f.row_begin + row) * f.rank + column;
      range<law>(f.stream, first, first + (height - 1) * f.rank + width, scratch);
      for (int64_t k = 0; k < width; ++k) {
        convert<S>(scratch + k, f.rank, height, scale, out + (column + k) * stride + row);
      }
    }
  }
}

template <typename S>
TX_CLONES void round_to(const float* __restrict z, int64_t count, S* __restrict out) {
  for (int64_t i = 0; i < count; ++i) core::store(out[i], static_cast<opmath_t<S>>(z[i]));
}

TX_CLONES void units_to(const float* __restrict z, int64_t count, float units, int8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int8_t>(static_cast<int32_t>(z[i] * units));
}

template <NoiseLaw law>
void fill(const NoiseFill& f, int64_t stream, int64_t begin, int64_t end) {
  core::PhiloxStream source = f.stream;
  source.stream += static_cast<uint32_t>(stream);
  float scratch[kScratch];
  for (int64_t at = begin; at < end; at += kScratch) {
    const int64_t count = std::min(kScratch, end - at), to = stream * f.elements + at;
    range<law>(source, f.begin + at, f.begin + at + count, scratch);
    if (f.units) {
      units_to(scratch, count, core::kNoiseUnits<law>, static_cast<int8_t*>(f.out) + to);
    } else {
      core::dispatch_dtype(f.type, [&](auto storage) {
        using S = decltype(storage);
        round_to(scratch, count, static_cast<S*>(f.out) + to);
      });
    }
  }
}

template <typename S>
TX_CLONES void add_weighted(const float* __restrict z, opmath_t<S> weight, int64_t count, opmath_t<S>* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * core::noise_as<S>(z[i]);
}

template <typename T>
TX_CLONES void add_block(const T* __restrict block, int64_t count, T* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += block[i];
}

template <typename S>
TX_CLONES void add_scaled(const opmath_t<S>* __restrict sum, opmath_t<S> scale, int64_t count, S* __restrict to) {
  for (int64_t i = 0; i < count; ++i) core::store(to[i], core::load(to[i]) + scale * sum[i]);
}

template <typename T>
TX_CLONES void set_scaled(const T* __restrict sum, T scale, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = scale * sum[i];
}

template <typename S, NoiseLaw law>
void sum_chunk(const NoiseSum& s, int64_t begin, int64_t count) {
  using T = opmath_t<S>;
  float z[kNoiseSumChunk];
  T total[kNoiseSumChunk] = {}, block[kNoiseSumChunk];
  const auto* coeff = static_cast<const T*>(s.coeff);
  core::PhiloxStream stream = s.stream;
  for (int64_t first = 0; first < s.count; first += kNoiseSumStreams) {
    std::fill(block, block + count, T(0));
    for (int64_t k = first; k < std::min(s.count, first + kNoiseSumStreams); ++k, ++stream.stream) {
      range<law>(stream, begin, begin + count, z);
      add_weighted<S>(z, coeff == nullptr ? T(1) : coeff[k], count, block);
    }
    add_block(block, count, total);
  }
  const auto scale = static_cast<T>(s.scale);
  if (s.add) {
    add_scaled<S>(total, scale, count, static_cast<S*>(s.to) + (begin - s.origin));
  } else {
    set_scaled(total, scale, count, static_cast<T*>(s.to) + (begin - s.origin));
  }
}

}  // namespace

void noise_range_cpu(NoiseLaw law, const PhiloxStream& stream, int64_t begin, int64_t end, float* out) {
  core::dispatch_noise(law, [&](auto constant) { range<constant()>(stream, begin, end, out); });
}

void noise_factor_cpu(const NoiseFactor& f, void* out, int64_t stride, double scale) {
  core::dispatch_dtype(f.type, [&](auto storage) {
    using S = decltype(storage);
    using T = opmath_t<S>;
    core::dispatch_noise(
        f.law, [&](auto constant) { factor<S, constant()>(f, static_cast<T*>(out), stride, static_cast<T>(scale)); });
  });
}

void noise_fill_cpu(const NoiseFill& f, int64_t stream, int64_t begin, int64_t end) {
  core::dispatch_noise(f.law, [&](auto constant) { fill<constant()>(f, stream, begin, end); });
}

void noise_sum_cpu(const NoiseSum& s, int64_t begin, int64_t end) {
  core::dispatch_dtype(s.type, [&](auto storage) {
    using S = decltype(storage);
    core::dispatch_noise(s.law, [&](auto constant) {
      for (int64_t at = begin; at < end; at += kNoiseSumChunk) {
        sum_chunk<S, constant()>(s, at, std::min(kNoiseSumChunk, end - at));
      }
    });
  });
}

}  // namespace torch_ext::kernels
