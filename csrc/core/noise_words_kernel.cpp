#include "core/noise_words_kernel.h"

// The same compilers and systems as TX_CLONES: there a loop gets a version for each instruction set, here by hand,
// because compilers miss the 32 x 32 -> 64 bit product and spend more on a gather than on the loads it stands for.
#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(TORCH_EXT_NO_CLONES)
#define TX_X86_NOISE 1
#include <immintrin.h>
// g++ 12 takes the undefined operands inside its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#else
#define TX_X86_NOISE 0
#endif

namespace torch_ext::kernels {
namespace {

using core::GaussianCell;
using core::PhiloxStream;

constexpr core::GaussianTable kTable = core::make_gaussian_table();

void philox_words_plain(uint32_t first, int64_t count, const PhiloxStream& stream, uint32_t* __restrict words) {
  for (int64_t b = 0; b < count; ++b) {
    const core::Philox4 block = stream.block(first + static_cast<uint32_t>(b));
    words[4 * b] = block.x;
    words[4 * b + 1] = block.y;
    words[4 * b + 2] = block.z;
    words[4 * b + 3] = block.w;
  }
}

void gaussian_from_words_plain(const uint32_t* __restrict words, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = core::gaussian_from_word(words[i], kTable.cell);
}

TX_CLONES void binomial64_from_words_plain(const uint32_t* __restrict words, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = core::binomial64_from_words(words[2 * i], words[2 * i + 1]);
}

#if TX_X86_NOISE

// Every word of a counter has a 64-bit lane of its own, whose upper half may hold anything: the product reads the lower
// halves, its own halves are the next round's words. `groups` registers of each word hide the product's latency.
template <int groups>
__attribute__((target("avx512f,avx512dq"))) void philox_words_avx512(uint32_t first, const PhiloxStream& stream,
                                                                     uint32_t* __restrict words) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), high = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  __m512i x[groups], y[groups], z[groups], w[groups];
  for (int g = 0; g < groups; ++g) {
    x[g] = _mm512_add_epi64(_mm512_set1_epi64(first + 8u * static_cast<uint32_t>(g)), lane);
    y[g] = _mm512_set1_epi64(stream.stream);
    z[g] = _mm512_set1_epi64(stream.ordinal_tag);
    w[g] = _mm512_set1_epi64(stream.epoch);
  }
  uint32_t key0 = stream.key0, key1 = stream.key1;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i k0 = _mm512_set1_epi64(key0), k1 = _mm512_set1_epi64(key1);
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      const __m512i a = _mm512_mul_epu32(x[g], m0), b = _mm512_mul_epu32(z[g], m1);
      x[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), y[g], k0, 0x96);  // exclusive or of all three
      y[g] = b;
      z[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), w[g], k1, 0x96);
      w[g] = a;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int g = 0; g < groups; ++g) {
    const __m512i xy = _mm512_mask_blend_epi32(0xaaaa, x[g], _mm512_slli_epi64(y[g], 32));
    const __m512i zw = _mm512_mask_blend_epi32(0xaaaa, z[g], _mm512_slli_epi64(w[g], 32));
    _mm512_storeu_si512(words + 32 * g, _mm512_permutex2var_epi64(xy, low, zw));
    _mm512_storeu_si512(words + 32 * g + 16, _mm512_permutex2var_epi64(xy, high, zw));
  }
}

__attribute__((target("avx2"))) void philox_words_avx2(uint32_t first, const PhiloxStream& stream,
                                                       uint32_t* __restrict words) {
  constexpr int kGroups = 4;
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i lane = _mm256_set_epi64x(3, 2, 1, 0);
  __m256i x[kGroups], y[kGroups], z[kGroups], w[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    x[g] = _mm256_add_epi64(_mm256_set1_epi64x(first + 4u * static_cast<uint32_t>(g)), lane);
    y[g] = _mm256_set1_epi64x(stream.stream);
    z[g] = _mm256_set1_epi64x(stream.ordinal_tag);
    w[g] = _mm256_set1_epi64x(stream.epoch);
  }
  uint32_t key0 = stream.key0, key1 = stream.key1;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const __m256i a = _mm256_mul_epu32(x[g], m0), b = _mm256_mul_epu32(z[g], m1);
      x[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), y[g]), k0);
      y[g] = b;
      z[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), w[g]), k1);
      w[g] = a;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int g = 0; g < kGroups; ++g) {
    const __m256i xy = _mm256_blend_epi32(x[g], _mm256_slli_epi64(y[g], 32), 0xaa);
    const __m256i zw = _mm256_blend_epi32(z[g], _mm256_slli_epi64(w[g], 32), 0xaa);
    const __m256i low = _mm256_unpacklo_epi64(xy, zw), high = _mm256_unpackhi_epi64(xy, zw);
    auto* to = reinterpret_cast<__m256i*>(words + 16 * g);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

// Where the cell of a word lies: a cell is 8 bytes, its number stands in bits 21 to 30.
inline const double* cell_of(uint32_t word) {
  return reinterpret_cast<const double*>(reinterpret_cast<const char*>(kTable.cell) + ((word >> 18) & 0x1ff8u));
}

// Two cells, which are values and slopes in turn.
__attribute__((target("avx2"), always_inline)) inline __m128 two_cells(const uint32_t* words) {
  return _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(cell_of(words[0])), cell_of(words[1])));
}

__attribute__((target("avx2"))) void gaussian_from_words_avx2(const uint32_t* __restrict words, int64_t count,
                                                              float* __restrict out) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MIN));
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i));
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(two_cells(words + i)), two_cells(words + i + 4), 1);
    const __m256 high =
        _mm256_insertf128_ps(_mm256_castps128_ps256(two_cells(words + i + 2)), two_cells(words + i + 6), 1);
    const __m256 value = _mm256_shuffle_ps(low, high, 0x88), slope = _mm256_shuffle_ps(low, high, 0xdd);
    const __m256 fraction = _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(0x1fffff)));
    const __m256 magnitude = _mm256_add_ps(value, _mm256_mul_ps(slope, fraction));
    _mm256_storeu_ps(out + i, _mm256_or_ps(magnitude, _mm256_and_ps(_mm256_castsi256_ps(w), sign)));
  }
}

// Eight cells: those of the words 0 to 3 and 4 to 7.
__attribute__((target("avx512f,avx512dq,avx2"), always_inline)) inline __m512 eight_cells(const uint32_t* words) {
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(two_cells(words)), two_cells(words + 2), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(two_cells(words + 4)), two_cells(words + 6), 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

__attribute__((target("avx512f,avx512dq,avx2"))) void gaussian_from_words_avx512(const uint32_t* __restrict words,
                                                                                 int64_t count, float* __restrict out) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i w = _mm512_loadu_si512(words + i);
    const __m512 low = eight_cells(words + i), high = eight_cells(words + i + 8);
    const __m512 value = _mm512_permutex2var_ps(low, even, high), slope = _mm512_permutex2var_ps(low, odd, high);
    const __m512 fraction = _mm512_cvtepi32_ps(_mm512_and_si512(w, _mm512_set1_epi32(0x1fffff)));
    const __m512i magnitude = _mm512_castps_si512(_mm512_add_ps(value, _mm512_mul_ps(slope, fraction)));
    _mm512_storeu_si512(out + i, _mm512_or_si512(magnitude, _mm512_and_si512(w, sign)));
  }
}

// With an instruction that counts ones.
__attribute__((target("avx512f,avx512vpopcntdq,avx2"))) void binomial64_from_words_popcount(
    const uint32_t* __restrict words, int64_t count, float* __restrict out) {
  const __m256i half = _mm256_set1_epi32(32);
  const __m256 quarter = _mm256_set1_ps(0.25f);
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i ones = _mm512_cvtepi64_epi32(_mm512_popcnt_epi64(_mm512_loadu_si512(words + 2 * i)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(ones, half)), quarter));
  }
}

enum class Level { kPlain, kAvx2, kAvx512 };
Level level() {
  static const Level best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return Level::kAvx512;
    return __builtin_cpu_supports("avx2") ? Level::kAvx2 : Level::kPlain;
  }();
  return best;
}

#endif

}  // namespace

void philox_words(uint32_t first, int64_t count, const PhiloxStream& stream, uint32_t* words) {
#if TX_X86_NOISE
  if (level() != Level::kPlain) {
    for (int64_t b = 0; b < count;) {
      const uint32_t block = first + static_cast<uint32_t>(b);
      if (level() == Level::kAvx2) {
        philox_words_avx2(block, stream, words + 4 * b);
        b += 16;
      } else if (count - b >= 32) {
        philox_words_avx512<4>(block, stream, words + 4 * b);
        b += 32;
      } else {
        philox_words_avx512<2>(block, stream, words + 4 * b);
        b += 16;
      }
    }
    return;
  }
#endif
  philox_words_plain(first, count, stream, words);
}

void gaussian_from_words(const uint32_t* words, int64_t count, float* out) {
#if TX_X86_NOISE
  if (level() == Level::kAvx512) return gaussian_from_words_avx512(words, count, out);
  if (level() == Level::kAvx2) return gaussian_from_words_avx2(words, count, out);
#endif
  gaussian_from_words_plain(words, count, out);
}

void binomial64_from_words(const uint32_t* words, int64_t count, float* out) {
#if TX_X86_NOISE
  static const bool counts = level() == Level::kAvx512 && __builtin_cpu_supports("avx512vpopcntdq");
  if (counts) return binomial64_from_words_popcount(words, count, out);
#endif
  binomial64_from_words_plain(words, count, out);
}

const GaussianCell* gaussian_cells_cpu() { return kTable.cell; }

}  // namespace torch_ext::kernels
