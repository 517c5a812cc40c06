#include <algorithm>
#include <cstring>

#include "core/dtype_dispatch.h"
#include "curvature/fisher_window/fisher_window_encode.h"

namespace torch_ext::kernels {
namespace {

// --- the row from gradients and parameters ---

template <typename T, typename S>
TX_CLONES void add_decay(T* __restrict row, const S* __restrict param, int64_t size, T weight_decay) {
  for (int64_t i = 0; i < size; ++i) row[i] = row[i] + weight_decay * static_cast<T>(core::load(param[i]));
}

template <typename T, typename S>
TX_CLONES void take_grad(T* __restrict row, const S* __restrict grad, int64_t size, T factor) {
  for (int64_t i = 0; i < size; ++i) row[i] = row_element(static_cast<T>(core::load(grad[i])), factor);
}

template <typename R, typename T>
TX_CLONES void convert(R* __restrict to, const T* __restrict from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<R>(from[i]);
}

// Elements [from, from + size) of a segment, at most a tile, computed in T.
template <typename T>
void segment_elements(const RowSegment& s, double factor, int64_t from, int64_t size, T* row) {
  core::dispatch_dtype(s.grad_type, [&](auto storage) {
    using S = decltype(storage);
    take_grad<T, S>(row, static_cast<const S*>(s.grad) + from, size, static_cast<T>(factor));
  });
  if (s.weight_decay == 0) return;
  core::dispatch_dtype(s.param_type, [&](auto storage) {
    using S = decltype(storage);
    add_decay<T, S>(row, static_cast<const S*>(s.param) + from, size, static_cast<T>(s.weight_decay));
  });
}

template <typename R>
void gather(const std::vector<RowSegment>& segments, double factor, int64_t begin, int64_t end, R* row) {
  std::fill(row, row + (end - begin), R(0));
  auto segment = std::upper_bound(segments.begin(), segments.end(), begin,
                                  [](int64_t column, const RowSegment& s) { return column < s.begin + s.numel; });
  for (; segment != segments.end() && segment->begin < end; ++segment) {
    const RowSegment& s = *segment;
    if (s.grad == nullptr) continue;
    const bool wide = s.grad_type == core::DType::kDouble || s.param_type == core::DType::kDouble;
    const int64_t last = std::min(end, s.begin + s.numel);
    for (int64_t at = std::max(begin, s.begin); at < last; at += kTile) {
      const int64_t size = std::min(kTile, last - at);
      alignas(64) double doubles[kTile];
      alignas(64) float floats[kTile];
      if (wide) {
        segment_elements(s, factor, at - s.begin, size, doubles);
        convert<R>(row + (at - begin), doubles, size);
      } else {
        segment_elements(s, factor, at - s.begin, size, floats);
        convert<R>(row + (at - begin), floats, size);
      }
    }
  }
}

// --- the formats ---

TX_CLONES void add_error(float* __restrict row, const float* __restrict error) {
  for (int64_t i = 0; i < kTile; ++i) row[i] = error[i] + row[i];
}
TX_CLONES void keep_error(float* __restrict error, const float* __restrict row, const float* __restrict stored) {
  for (int64_t i = 0; i < kTile; ++i) error[i] = row[i] - stored[i];
}

TX_CLONES void encode_bfloat16(const float* __restrict row, core::BFloat16* __restrict to, float* __restrict stored) {
  for (int64_t i = 0; i < kTile; ++i) {
    core::store(to[i], row[i]);
    stored[i] = core::load(to[i]);
  }
}

TX_CLONES void encode_int8(const float* __restrict row, int8_t* __restrict to, float* __restrict scales,
                           int16_t* __restrict codes, float* __restrict stored) {
  for (int64_t b = 0; b < kScales; ++b) {
    uint32_t largest = 0;
    for (int64_t i = b * kScaleBlock; i < (b + 1) * kScaleBlock; ++i) {
      const uint32_t bits = magnitude_bits(row[i]);
      largest = bits > largest ? bits : largest;
    }
    const float scale = int8_scale(largest);
    scales[b] = scale;
    for (int64_t i = b * kScaleBlock; i < (b + 1) * kScaleBlock; ++i) {
      const int32_t code = int8_code(row[i], scale);
      to[i] = static_cast<int8_t>(code);
      codes[i] = static_cast<int16_t>(code);
      stored[i] = static_cast<float>(code) * scale;
    }
  }
}

TX_CLONES int32_t count_at_least(const uint32_t* __restrict bits, uint32_t bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < kTile; ++i) count += static_cast<int32_t>(bits[i] >= bound);
  return count;
}

TX_CLONES void fill_magnitudes(const float* __restrict row, uint32_t* __restrict bits) {
  for (int64_t i = 0; i < kTile; ++i) bits[i] = magnitude_bits(row[i]);
}

// The `kept` entries of largest magnitude, of equal ones the first, in ascending order. NaN counts as largest, so that
// it is stored and the row rejected.
void encode_topk(const float* row, int64_t kept, core::BFloat16* values, int16_t* indices, float* stored) {
  alignas(64) uint32_t bits[kTile];
  fill_magnitudes(row, bits);
  uint32_t bound = 0;  // the largest with at least `kept` entries reaching it
  for (uint32_t bit = uint32_t{1} << 30; bit != 0; bit >>= 1) {
    if (count_at_least(bits, bound | bit) >= kept) bound |= bit;
  }
  int64_t ties = kept - (bound == kMagnitudeMask ? 0 : count_at_least(bits, bound + 1));
  std::fill(stored, stored + kTile, 0.0f);
  int64_t k = 0;
  for (int64_t i = 0; i < kTile && k < kept; ++i) {
    if (bits[i] < bound || (bits[i] == bound && ties-- <= 0)) continue;
    core::store(values[k], row[i]);
    indices[k++] = static_cast<int16_t>(i);
    stored[i] = core::load(values[k - 1]);
  }
}

}  // namespace

void window_gather_cpu(const std::vector<RowSegment>& segments, double factor, bool wide, int64_t begin, int64_t end,
                       void* row) {
  if (wide) return gather(segments, factor, begin, end, static_cast<double*>(row));
  gather(segments, factor, begin, end, static_cast<float*>(row));
}

void window_encode_tile(const WindowView& w, int64_t tile, void* raw, TileQuery* query) {
  const int64_t place = tile * w.slots + w.ring[kRingNext];
  if (w.format == WindowFormat::kDouble) {
    const auto* row = static_cast<double*>(raw);
    std::memcpy(static_cast<double*>(w.rows) + place * kTile, row, kTile * sizeof(double));
    std::memcpy(query->wide, row, kTile * sizeof(double));
    return;
  }
  auto* row = static_cast<float*>(raw);
  const int64_t half = w.tiles * kTile, now = w.ring[kRingTotal] % 2;
  if (w.error != nullptr) add_error(row, w.error + now * half + tile * kTile);
  switch (w.format) {
    case WindowFormat::kFloat:
      std::memcpy(static_cast<float*>(w.rows) + place * kTile, row, kTile * sizeof(float));
      convert(query->wide, row, kTile);
      return;
    case WindowFormat::kBFloat16:
      encode_bfloat16(row, static_cast<core::BFloat16*>(w.rows) + place * kTile, query->narrow);
      break;
    case WindowFormat::kInt8:
      encode_int8(row, static_cast<int8_t*>(w.rows) + place * kTile, query->scales, query->codes, query->narrow);
      std::memcpy(w.scales + place * kScales, query->scales, sizeof(query->scales));
      break;
    default:
      encode_topk(row, w.kept, static_cast<core::BFloat16*>(w.rows) + place * w.kept, w.indices + place * w.kept,
                  query->narrow);
  }
  if (w.error != nullptr) keep_error(w.error + (1 - now) * half + tile * kTile, row, query->narrow);
}

}  // namespace torch_ext::kernels
