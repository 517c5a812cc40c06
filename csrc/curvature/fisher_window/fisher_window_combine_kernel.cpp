// Second pass over the window on the CPU: G^T coefficients, a tile at a time. Rows are taken four at a time to touch
// the sums less often; the order of additions is that of one row after the other.
#include <algorithm>

#include "curvature/fisher_window/fisher_window_kernel.h"

namespace torch_ext::kernels {
namespace {

template <typename S, typename T>
TX_CLONES void add_row(const S* __restrict row, T coefficient, T* __restrict sum) {
  for (int64_t i = 0; i < kTile; ++i) sum[i] += coefficient * static_cast<T>(decoded(row[i]));
}

template <typename T>
TX_CLONES void add_int8(const int8_t* __restrict row, const float* __restrict scales, double coefficient,
                        T* __restrict sum) {
  for (int64_t b = 0; b < kScales; ++b) {
    const T factor = static_cast<T>(coefficient * static_cast<double>(scales[b]));
    for (int64_t i = b * kScaleBlock; i < (b + 1) * kScaleBlock; ++i) sum[i] += factor * static_cast<T>(row[i]);
  }
}

TX_CLONES void flush(float* __restrict run, double* __restrict sum) {
  for (int64_t i = 0; i < kTile; ++i) {
    sum[i] += static_cast<double>(run[i]);
    run[i] = 0;
  }
}

template <typename R>
TX_CLONES void divide_rest(const double* __restrict x, const double* __restrict sum, int64_t size, double damping,
                           R* __restrict out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<R>((x[i] - sum[i]) / damping);
}

// Live rows [begin, end) of a tile.
template <typename S, typename T>
void add_rows(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, int64_t begin, int64_t end, T* sum) {
  for (int64_t k = begin; k < end; ++k) {
    const LiveRow& at = live[static_cast<size_t>(k)];
    const int64_t place = tile * w.slots + at.slot;
    const S* row = static_cast<const S*>(w.rows) + place * kTile;
    if constexpr (std::is_same_v<S, int8_t>) {
      add_int8(row, w.scales + place * kScales, at.coefficient, sum);
    } else {
      add_row(row, static_cast<T>(at.coefficient), sum);
    }
  }
}

void combine_topk(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, double* sum) {
  for (const LiveRow& at : live) {
    const int64_t place = (tile * w.slots + at.slot) * w.kept;
    const auto* values = static_cast<const core::BFloat16*>(w.rows) + place;
    const int16_t* indices = w.indices + place;
    for (int64_t i = 0; i < w.kept; ++i) {
      sum[indices[i]] += at.coefficient * static_cast<double>(core::load(values[i]));
    }
  }
}

// bfloat16 and int8: runs of kRun rows in float, runs in double.
void combine_narrow(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, double* sum) {
  alignas(64) float run[kTile] = {};
  const auto count = static_cast<int64_t>(live.size());
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = std::min(count, begin + kRun);
    if (w.format == WindowFormat::kInt8) {
      add_rows<int8_t>(w, live, tile, begin, end, run);
    } else {
      add_rows<core::BFloat16>(w, live, tile, begin, end, run);
    }
    flush(run, sum);
  }
}

// All in double.
void combine_wide(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, double* sum) {
  const auto count = static_cast<int64_t>(live.size());
  switch (w.format) {
    case WindowFormat::kFloat:
      return add_rows<float>(w, live, tile, 0, count, sum);
    case WindowFormat::kDouble:
      return add_rows<double>(w, live, tile, 0, count, sum);
    case WindowFormat::kBFloat16:
      return add_rows<core::BFloat16>(w, live, tile, 0, count, sum);
    case WindowFormat::kInt8:
      return add_rows<int8_t>(w, live, tile, 0, count, sum);
    case WindowFormat::kTopK:
      return combine_topk(w, live, tile, sum);
  }
}

TX_CLONES void round_tile(const double* __restrict from, float* __restrict to) {
  for (int64_t i = 0; i < kTile; ++i) to[i] = static_cast<float>(from[i]);
}

}  // namespace

std::vector<LiveRow> window_live(const int64_t* ring, const double* coefficients) {
  std::vector<LiveRow> live(static_cast<size_t>(ring[kRingCount]));
  for (size_t k = 0; k < live.size(); ++k) {
    const int64_t slot = slot_of_position(static_cast<int64_t>(k), ring[kRingNext]);
    live[k] = {slot, coefficients[slot]};
  }
  return live;
}

void window_combine_cpu(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, void* out) {
  alignas(64) double sum[kTile] = {};
  if (w.format == WindowFormat::kBFloat16 || w.format == WindowFormat::kInt8) {
    combine_narrow(w, live, tile, sum);
  } else {
    combine_wide(w, live, tile, sum);
  }
  if (w.format == WindowFormat::kDouble) {
    std::copy(sum, sum + kTile, static_cast<double*>(out));
  } else {
    round_tile(sum, static_cast<float*>(out));
  }
}

void window_residual_cpu(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, const double* x,
                         int64_t size, double damping, void* out) {
  alignas(64) double sum[kTile] = {};
  combine_wide(w, live, tile, sum);
  if (w.format == WindowFormat::kDouble) {
    divide_rest(x, sum, size, damping, static_cast<double*>(out));
  } else {
    divide_rest(x, sum, size, damping, static_cast<float*>(out));
  }
}

}  // namespace torch_ext::kernels
