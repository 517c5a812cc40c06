#include "optim/mezo/mezo_kernel.h"

#include <algorithm>

#include "core/dtype_dispatch.h"
#include "core/multi_tensor.h"
#include "core/noise_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr int64_t kStretch = 1024;  // elements whose noise is made at a time

// body(first element, elements, their noise) for [begin, end).
template <typename Body>
void with_noise(const core::PhiloxStream& noise, int64_t begin, int64_t end, const Body& body) {
  float z[kStretch];
  for (int64_t at = begin; at < end; at += kStretch) {
    const int64_t size = std::min(kStretch, end - at);
    noise_range_cpu(core::NoiseLaw::kGaussian, noise, at, at + size, z);
    body(at, size, z);
  }
}

template <typename S>
TX_CLONES void find_lost(const S* __restrict p, const float* __restrict z, int64_t size, core::opmath_t<S> scale,
                         uint8_t* __restrict lost) {
  using T = core::opmath_t<S>;
  for (int64_t i = 0; i < size; ++i) {
    const S q = MezoStep<S>::shifted(p[i], scale, static_cast<T>(z[i]));
    lost[i] = static_cast<uint8_t>(MezoStep<S>::lost(p[i], q, scale, static_cast<T>(z[i])));
  }
}

template <typename S>
TX_CLONES void shift(S* __restrict p, const float* __restrict z, int64_t size, core::opmath_t<S> scale) {
  for (int64_t i = 0; i < size; ++i) p[i] = MezoStep<S>::shifted(p[i], scale, static_cast<core::opmath_t<S>>(z[i]));
}

template <typename S>
TX_CLONES void update(S* __restrict p, const float* __restrict z, int64_t size, core::opmath_t<S> slope,
                      core::opmath_t<S> lr, core::opmath_t<S> weight_decay) {
  for (int64_t i = 0; i < size; ++i) {
    p[i] = MezoStep<S>::updated(p[i], slope, static_cast<core::opmath_t<S>>(z[i]), lr, weight_decay);
  }
}

// body(element, number among the kept ones of the chunk) for the kept elements of [begin, end).
template <typename Body>
void for_each_kept(const uint32_t* mask, int64_t begin, int64_t end, const Body& body) {
  int64_t number = 0;
  for (int64_t word = begin / 32; word * 32 < end; ++word) {
    for (uint32_t left = mask[word]; left != 0; left &= left - 1) body(word * 32 + __builtin_ctz(left), number++);
  }
}

}  // namespace

void mezo_mark_cpu(const MezoTensor& t, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    const auto* param = static_cast<const S*>(t.param);
    int32_t count = 0;
    with_noise(t.noise, begin, end, [&](int64_t at, int64_t size, const float* z) {
      uint8_t lost[kStretch];
      find_lost<S>(param + at, z, size, static_cast<core::opmath_t<S>>(t.scale), lost);
      for (int64_t word = 0; word * 32 < size; ++word) {
        uint32_t bits = 0;
        for (int64_t i = word * 32; i < std::min(size, word * 32 + 32); ++i) {
          bits |= static_cast<uint32_t>(lost[i]) << (i % 32);
        }
        t.mask[at / 32 + word] = bits;
        count += __builtin_popcount(bits);
      }
    });
    t.counts[begin / core::kChunk] = count;
  });
}

void mezo_shift_cpu(const MezoTensor& t, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    auto* param = static_cast<S*>(t.param);
    S* kept = static_cast<S*>(t.kept) + t.offsets[begin / core::kChunk];
    for_each_kept(t.mask, begin, end, [&](int64_t element, int64_t number) { kept[number] = param[element]; });
    with_noise(t.noise, begin, end, [&](int64_t at, int64_t size, const float* z) {
      shift<S>(param + at, z, size, static_cast<core::opmath_t<S>>(t.scale));
    });
  });
}

void mezo_restore_cpu(const MezoTensor& t, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    auto* param = static_cast<S*>(t.param);
    with_noise(t.noise, begin, end, [&](int64_t at, int64_t size, const float* z) {
      shift<S>(param + at, z, size, static_cast<core::opmath_t<S>>(-t.scale));
    });
    const S* kept = static_cast<const S*>(t.kept) + t.offsets[begin / core::kChunk];
    for_each_kept(t.mask, begin, end, [&](int64_t element, int64_t number) { param[element] = kept[number]; });
  });
}

void mezo_update_cpu(const MezoUpdate& t, core::DType type, int64_t begin, int64_t end) {
  if (!(*t.slope - *t.slope == 0)) return;
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    using T = core::opmath_t<S>;
    with_noise(t.noise, begin, end, [&](int64_t at, int64_t size, const float* z) {
      update<S>(static_cast<S*>(t.param) + at, z, size, static_cast<T>(*t.slope), static_cast<T>(t.lr),
                static_cast<T>(t.weight_decay));
    });
  });
}

}  // namespace torch_ext::kernels
