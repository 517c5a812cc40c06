// Second pass over the window on the CPU: G^T coefficients, a tile at a time. Rows are taken four at a time to touch
// the sums less often; the order of additions is that of one row after the other.
#include <algorithm>

#include "curvature/fisher_window/fisher_window_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr int64_t kTogether = 4;

template <typename S, typename T>
struct Rows {
  const S* row[kTogether];
  T coefficient[kTogether];
};

template <typename S, typename T>
TX_CLONES void add_four(Rows<S, T> r, int64_t size, T* __restrict sum) {
  const S *a = r.row[0], *b = r.row[1], *c = r.row[2], *d = r.row[3];
  const T x = r.coefficient[0], y = r.coefficient[1], z = r.coefficient[2], w = r.coefficient[3];
  for (int64_t i = 0; i < size; ++i) {
    T total = sum[i];
    total += x * static_cast<T>(decoded(a[i]));
    total += y * static_cast<T>(decoded(b[i]));
    total += z * static_cast<T>(decoded(c[i]));
    total += w * static_cast<T>(decoded(d[i]));
    sum[i] = total;
  }
}

template <typename S, typename T>
TX_CLONES void add_one(const S* __restrict row, T coefficient, int64_t size, T* __restrict sum) {
  for (int64_t i = 0; i < size; ++i) sum[i] += coefficient * static_cast<T>(decoded(row[i]));
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

// Live rows [begin, end), `size` columns from `column` of the tile; factor(slot) multiplies a row's coefficient.
template <typename S, typename T, typename Factor>
void add_rows(const S* rows, const std::vector<LiveRow>& live, int64_t begin, int64_t end, int64_t column, int64_t size,
              const Factor& factor, T* sum) {
  const auto row = [&](int64_t k) { return rows + live[static_cast<size_t>(k)].slot * kTile + column; };
  const auto coefficient = [&](int64_t k) {
    const LiveRow& at = live[static_cast<size_t>(k)];
    return static_cast<T>(at.coefficient * factor(at.slot));
  };
  int64_t k = begin;
  for (; k + kTogether <= end; k += kTogether) {
    Rows<S, T> four;
    for (int64_t j = 0; j < kTogether; ++j) {
      four.row[j] = row(k + j);
      four.coefficient[j] = coefficient(k + j);
    }
    add_four(four, size, sum + column);
  }
  for (; k < end; ++k) add_one(row(k), coefficient(k), size, sum + column);
}

constexpr auto kNoFactor = [](int64_t) { return 1.0; };

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

template <typename T>
void add_int8(const WindowView& w, const std::vector<LiveRow>& live, int64_t begin, int64_t end, int64_t tile, T* sum) {
  const auto* rows = static_cast<const int8_t*>(w.rows) + tile * w.slots * kTile;
  const float* scales = w.scales + tile * w.slots * kScales;
  for (int64_t b = 0; b < kScales; ++b) {
    const auto scale = [&](int64_t slot) { return static_cast<double>(scales[slot * kScales + b]); };
    add_rows(rows, live, begin, end, b * kScaleBlock, kScaleBlock, scale, sum);
  }
}

// bfloat16 and int8: runs of kRun rows in float, runs in double.
void combine_narrow(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, double* sum) {
  alignas(64) float run[kTile] = {};
  const auto count = static_cast<int64_t>(live.size());
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = std::min(count, begin + kRun);
    if (w.format == WindowFormat::kInt8) {
      add_int8(w, live, begin, end, tile, run);
    } else {
      const auto* rows = static_cast<const core::BFloat16*>(w.rows) + tile * w.slots * kTile;
      add_rows(rows, live, begin, end, 0, kTile, kNoFactor, run);
    }
    flush(run, sum);
  }
}

// All in double.
void combine_wide(const WindowView& w, const std::vector<LiveRow>& live, int64_t tile, double* sum) {
  const auto count = static_cast<int64_t>(live.size());
  const auto all = [&](auto type) {
    const auto* rows = static_cast<const decltype(type)*>(w.rows) + tile * w.slots * kTile;
    add_rows(rows, live, 0, count, 0, kTile, kNoFactor, sum);
  };
  switch (w.format) {
    case WindowFormat::kFloat:
      return all(float{});
    case WindowFormat::kDouble:
      return all(double{});
    case WindowFormat::kBFloat16:
      return all(core::BFloat16{});
    case WindowFormat::kInt8:
      return add_int8(w, live, 0, count, tile, sum);
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
