// Whole ranges of noise (core/noise.h), and the weighted sum of several streams of it.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/noise.h"

namespace torch_ext::kernels {

// Elements [begin, end) of a stream; `begin` may be any.
void noise_range_cpu(core::NoiseLaw law, const core::PhiloxStream& stream, int64_t begin, int64_t end, float* out);

// Rows [row_begin, row_begin + rows) of a factor [.., rank] of a stream, rounded as values of `type`.
struct NoiseFactor {
  core::NoiseLaw law;
  core::DType type;
  core::PhiloxStream stream;
  int64_t row_begin, rows, rank;
};
// out[column * stride + row] = scale * element, in the arithmetic type of `type`.
void noise_factor_cpu(const NoiseFactor& factor, void* out, int64_t stride, double scale);

// Factors of the streams stream, stream + 1, ... as they lie in memory: out[pair][row][column], of `type`, or int8 in
// units (8-bit integers that are kNoiseUnits times the element).
struct NoiseFill {
  core::NoiseLaw law;
  core::DType type;
  bool units;
  core::PhiloxStream stream;
  int64_t begin;     // first element of each stream
  int64_t elements;  // of each stream
  int64_t streams;
  void* out;
};
void noise_fill_cpu(const NoiseFill& fill, int64_t stream, int64_t begin, int64_t end);
void noise_fill_cuda(const NoiseFill& fill, void* stream);

// The seeded sum behind every update with full-rank noise: elements [begin, end) of
//   to[e - origin] (+)= scale * sum_k coeff[k] z_k(e),
// z_k of stream number stream + k, rounded as values of `type`. Sums are taken in the arithmetic type over 32 streams
// at a time, which are then added up, so that many streams cost little accuracy; their order is fixed. With `add`, `to`
// has type `type` and receives the sum, rounded once; else it has the arithmetic type and is overwritten.
struct NoiseSum {
  core::NoiseLaw law;
  core::DType type;
  core::PhiloxStream stream;
  const void* coeff;  // arithmetic type, [count], on the data's device; null: all 1
  int64_t count;
  double scale;
  bool add;
  void* to;
  int64_t origin;  // element that to[0] is
  int64_t numel;   // elements of `to`
};
constexpr int64_t kNoiseSumChunk = 256;  // elements of one unit of work
constexpr int64_t kNoiseSumStreams = 32;
void noise_sum_cpu(const NoiseSum& sum, int64_t begin, int64_t end);
void noise_sum_cuda(const NoiseSum& sum, void* stream);

}  // namespace torch_ext::kernels
