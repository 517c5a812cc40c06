// What the second pass shares between its own kernels and M-FAC's fused update: one column of G^T coefficients.
#pragma once

#include "curvature/fisher_window/fisher_window_kernel.h"

namespace torch_ext::kernels {

// How a format is stored; T is the type in which runs of kRun rows are added (double: no runs needed).
template <WindowFormat F>
struct Stored;
template <>
struct Stored<WindowFormat::kFloat> {
  using type = float;
  using run_type = double;
  using out_type = float;
};
template <>
struct Stored<WindowFormat::kDouble> {
  using type = double;
  using run_type = double;
  using out_type = double;
};
template <>
struct Stored<WindowFormat::kBFloat16> {
  using type = core::BFloat16;
  using run_type = float;
  using out_type = float;
};
template <>
struct Stored<WindowFormat::kInt8> {
  using type = int8_t;
  using run_type = float;
  using out_type = float;
};

// (G^T coefficients)[column], in the order of additions of window_combine_cpu; T = double for all products in double.
template <WindowFormat F, typename T>
__device__ double combined_column(const WindowView& w, const double* coefficients, int64_t column) {
  using S = typename Stored<F>::type;
  const int64_t tile = column / kTile, inside = column % kTile, count = w.ring[kRingCount], next = w.ring[kRingNext];
  const S* rows = static_cast<const S*>(w.rows) + tile * w.slots * kTile + inside;
  const float* scales = F == WindowFormat::kInt8 ? w.scales + tile * w.slots * kScales + inside / kScaleBlock : nullptr;
  double total = 0;
  T run = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = begin + kRun < count ? begin + kRun : count;
#pragma unroll 8
    for (int64_t k = begin; k < end; ++k) {
      const int64_t slot = slot_of_position(k, next);
      double coefficient = coefficients[slot];
      if constexpr (F == WindowFormat::kInt8) coefficient *= static_cast<double>(scales[slot * kScales]);
      run += static_cast<T>(coefficient) * static_cast<T>(decoded(rows[slot * kTile]));
    }
    if constexpr (sizeof(T) < sizeof(double)) {
      total += static_cast<double>(run);
      run = 0;
    }
  }
  if constexpr (sizeof(T) < sizeof(double)) return total;
  return static_cast<double>(run);
}

template <WindowFormat F>
struct FormatTag {
  static constexpr WindowFormat value = F;
};

// body(FormatTag) for a format that stores every column; topk has its own kernels.
template <typename Body>
void dispatch_dense(WindowFormat format, const Body& body) {
  switch (format) {
    case WindowFormat::kFloat:
      return body(FormatTag<WindowFormat::kFloat>{});
    case WindowFormat::kDouble:
      return body(FormatTag<WindowFormat::kDouble>{});
    case WindowFormat::kBFloat16:
      return body(FormatTag<WindowFormat::kBFloat16>{});
    case WindowFormat::kInt8:
      return body(FormatTag<WindowFormat::kInt8>{});
    case WindowFormat::kTopK:
      return;
  }
}

}  // namespace torch_ext::kernels
