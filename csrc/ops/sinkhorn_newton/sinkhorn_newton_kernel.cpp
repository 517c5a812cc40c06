#include "ops/sinkhorn_newton/sinkhorn_newton_kernel.h"

#include <algorithm>

#include "core/block_reduce.h"

namespace torch_ext::kernels {
namespace {

// Stretches of one row of the cost.
template <typename S>
TX_HD void fill(const DenseCost<S>& cost, int64_t i, int64_t j, int64_t count, double* __restrict c) {
  for (int64_t k = 0; k < count; ++k) c[k] = cost.at(i, j + k);
}

// Coordinate by coordinate, so that the inner loop runs along the points.
TX_HD void fill(const PointCost& cost, int64_t i, int64_t j, int64_t count, double* __restrict c) {
  for (int64_t k = 0; k < count; ++k) c[k] = 0;
  for (int64_t axis = 0; axis < cost.d; ++axis) {
    const double x = cost.x[i * cost.d + axis];
    const double* y = cost.y_t + axis * cost.m + j;
    for (int64_t k = 0; k < count; ++k) c[k] += PointCost::squared(x, y[k]);
  }
  for (int64_t k = 0; k < count; ++k) c[k] *= 0.5;
}

// Fills up to whole groups of lanes with entries that add nothing.
TX_HD int64_t pad(double* x, int64_t count) {
  int64_t end = count;
  for (; end % core::kLanes != 0; ++end) x[end] = -HUGE_VAL;
  return end;
}

TX_HD LogSum segment_log_sum(const double* __restrict x, int64_t count) {
  double lane[core::kLanes];
  for (int64_t l = 0; l < core::kLanes; ++l) lane[l] = x[l];
  for (int64_t i = core::kLanes; i < count; i += core::kLanes) {
    for (int64_t l = 0; l < core::kLanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  }
  double max = lane[0];
  for (int64_t l = 1; l < core::kLanes; ++l) max = lane[l] > max ? lane[l] : max;
  const double shift = shift_of(max);
  return {max, core::sum_segment(count, [&](int64_t i) { return exponential(x[i] - shift, kNegligible); })};
}

template <typename Cost>
TX_CLONES void rows(const Cost& cost, int64_t m, const double* __restrict g, double inv_eps, double* __restrict out,
                    int64_t begin, int64_t end) {
  alignas(64) double x[kRowSegment];
  for (int64_t i = begin; i < end; ++i) {
    LogSum total{-HUGE_VAL, 0};
    for (int64_t j = 0; j < m; j += kRowSegment) {
      const int64_t count = std::min(kRowSegment, m - j);
      fill(cost, i, j, count, x);
      for (int64_t k = 0; k < count; ++k) x[k] = row_exponent(g[j + k], x[k], inv_eps);
      const LogSum segment = segment_log_sum(x, pad(x, count));
      total = j == 0 ? segment : merged(total, segment);
    }
    out[i] = value_of(total);
  }
}

template <typename Cost>
TX_CLONES void columns(const Cost& cost, int64_t n, const double* __restrict f, double inv_eps, double* __restrict out,
                       int64_t j, int64_t width) {
  alignas(64) double x[kColumnSegment][kColumnTile];
  alignas(64) double max[kColumnTile], sum[kColumnTile], top[kColumnTile], shift[kColumnTile], part[kColumnTile];
  for (auto& row : x) {
    for (int64_t k = width; k < kColumnTile; ++k) row[k] = 0;
  }
  for (int64_t begin = 0; begin < n; begin += kColumnSegment) {
    const int64_t count = std::min(kColumnSegment, n - begin);
    for (int64_t k = 0; k < kColumnTile; ++k) top[k] = -HUGE_VAL;
    for (int64_t r = 0; r < count; ++r) {
      fill(cost, begin + r, j, width, x[r]);
      const double fi = f[begin + r];
      for (int64_t k = 0; k < kColumnTile; ++k) {
        x[r][k] = row_exponent(fi, x[r][k], inv_eps);
        top[k] = x[r][k] > top[k] ? x[r][k] : top[k];
      }
    }
    for (int64_t k = 0; k < kColumnTile; ++k) {
      shift[k] = shift_of(top[k]);
      part[k] = 0;
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t k = 0; k < kColumnTile; ++k) part[k] += exponential(x[r][k] - shift[k], kNegligible);
    }
    for (int64_t k = 0; k < kColumnTile; ++k) {
      const LogSum segment{top[k], part[k]};
      const LogSum total = begin == 0 ? segment : merged({max[k], sum[k]}, segment);
      max[k] = total.max;
      sum[k] = total.sum;
    }
  }
  for (int64_t k = 0; k < width; ++k) out[j + k] = value_of({max[k], sum[k]});
}

template <typename Cost>
TX_CLONES void cost_range(const Cost& cost, int64_t m, int64_t begin, int64_t end, CostRange& range) {
  double c[kRowSegment];
  double least = HUGE_VAL, most = -HUGE_VAL;
  bool invalid = false;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < m; j += kRowSegment) {
      const int64_t count = std::min(kRowSegment, m - j);
      fill(cost, i, j, count, c);
      for (int64_t k = 0; k < count; ++k) {
        least = c[k] < least ? c[k] : least;
        most = c[k] > most && c[k] < HUGE_VAL ? c[k] : most;
        invalid = invalid || !(c[k] > -HUGE_VAL);
      }
    }
  }
  range = {least, most, invalid};
}

template <typename Cost>
TX_CLONES void exponents(const Cost& cost, int64_t i, int64_t j, int64_t count, const SinkhornPoint& at,
                         double* __restrict x) {
  fill(cost, i, j, count, x);
  const double fi = at.f[i];
  const double* __restrict g = at.g + j;
  for (int64_t k = 0; k < count; ++k) x[k] = plan_exponent(fi, g[k], x[k], at.inv_eps);
}

TX_CLONES void keep_flags(const double* __restrict x, double log_row, const double* __restrict log_column,
                          int64_t count, uint8_t* __restrict flag) {
  for (int64_t k = 0; k < count; ++k) {
    const double bound = log_column[k] < log_row ? log_column[k] : log_row;
    flag[k] = x[k] > bound ? 1 : 0;
  }
}

TX_CLONES void exponentials(double* __restrict x, int64_t count, double mass) {
  for (int64_t k = 0; k < count; ++k) x[k] = mass * exponential(x[k], kUnderflow);
}

template <typename Cost>
TX_CLONES void apply_columns(const Cost& cost, int64_t n, const SinkhornPoint& at, const double* __restrict w,
                             double* __restrict out, int64_t j, int64_t width) {
  alignas(64) double x[kColumnTile] = {}, g[kColumnTile] = {};
  alignas(64) double part[kColumnTile], total[kColumnTile] = {};
  for (int64_t k = 0; k < width; ++k) g[k] = at.g[j + k];
  for (int64_t begin = 0; begin < n; begin += kColumnSegment) {
    const int64_t end = std::min(n, begin + kColumnSegment);
    for (int64_t k = 0; k < kColumnTile; ++k) part[k] = 0;
    for (int64_t i = begin; i < end; ++i) {
      fill(cost, i, j, width, x);
      const double f = at.f[i], wi = w[i];
      for (int64_t k = 0; k < kColumnTile; ++k) {
        part[k] += exponential(plan_exponent(f, g[k], x[k], at.inv_eps), kUnderflow) * wi;
      }
    }
    for (int64_t k = 0; k < kColumnTile; ++k) total[k] += part[k];
  }
  for (int64_t k = 0; k < width; ++k) out[j + k] = total[k];
}

TX_CLONES double weighted_sum(const double* __restrict p, const double* __restrict w, int64_t count) {
  return core::sum_segment(count, [&](int64_t k) { return p[k] * w[k]; });
}

TX_CLONES double displaced_sum(const double* __restrict p, double x, const double* __restrict y, int64_t count) {
  return core::sum_segment(count, [&](int64_t k) { return p[k] * (x - y[k]); });
}

TX_CLONES void narrow(const double* __restrict x, int64_t count, float* __restrict out) {
  for (int64_t k = 0; k < count; ++k) out[k] = static_cast<float>(x[k]);
}

}  // namespace

void sinkhorn_rows_cpu(const SinkhornCost& cost, const double* g, double inv_eps, double* out, int64_t begin,
                       int64_t end) {
  with_cost(cost, [&](const auto& entries) { rows(entries, cost.m, g, inv_eps, out, begin, end); });
}

void sinkhorn_columns_cpu(const SinkhornCost& cost, const double* f, double inv_eps, double* out, int64_t begin,
                          int64_t end) {
  with_cost(cost, [&](const auto& entries) {
    for (int64_t j = begin; j < end; j += kColumnTile) {
      columns(entries, cost.n, f, inv_eps, out, j, std::min(kColumnTile, end - j));
    }
  });
}

void sinkhorn_apply_rows_cpu(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* out,
                             int64_t begin, int64_t end) {
  alignas(64) double p[kRowSegment];
  with_cost(cost, [&](const auto& entries) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = 0;
      for (int64_t j = 0; j < cost.m; j += kRowSegment) {
        const int64_t count = std::min(kRowSegment, cost.m - j);
        exponents(entries, i, j, count, at, p);
        exponentials(p, count, 1.0);
        out[i] += weighted_sum(p, w + j, count);
      }
    }
  });
}

void sinkhorn_apply_columns_cpu(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* out,
                                int64_t begin, int64_t end) {
  with_cost(cost, [&](const auto& entries) {
    for (int64_t j = begin; j < end; j += kColumnTile) {
      apply_columns(entries, cost.n, at, w, out, j, std::min(kColumnTile, end - j));
    }
  });
}

CostRange sinkhorn_range_cpu(const SinkhornCost& cost, int64_t begin, int64_t end) {
  CostRange range{};
  with_cost(cost, [&](const auto& entries) { cost_range(entries, cost.m, begin, end, range); });
  return range;
}

void sinkhorn_compact_cpu(const SinkhornCost& cost, const SinkhornPoint& at, const double* log_row,
                          const double* log_column, int64_t begin, int64_t end, std::vector<int32_t>& column,
                          std::vector<double>& value, int64_t* count) {
  constexpr int64_t kWord = 8;
  alignas(64) double x[kRowSegment];
  alignas(64) uint8_t flag[kRowSegment + kWord] = {};
  with_cost(cost, [&](const auto& entries) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t before = value.size();
      for (int64_t j = 0; j < cost.m; j += kRowSegment) {
        const int64_t width = std::min(kRowSegment, cost.m - j);
        exponents(entries, i, j, width, at, x);
        keep_flags(x, log_row[i], log_column + j, width, flag);
        for (int64_t k = width; k % kWord != 0; ++k) flag[k] = 0;
        for (int64_t k = 0; k < width; k += kWord) {
          uint64_t word;
          memcpy(&word, flag + k, sizeof(word));
          if (word == 0) continue;
          for (int64_t b = k; b < k + kWord; ++b) {
            if (flag[b] == 0) continue;
            column.push_back(static_cast<int32_t>(j + b));
            value.push_back(x[b]);
          }
        }
      }
      count[i] = static_cast<int64_t>(value.size() - before);
      exponentials(value.data() + before, count[i], 1.0);
    }
  });
}

void sinkhorn_plan_cpu(const SinkhornCost& cost, const SinkhornPoint& at, double mass, void* out, core::DType type,
                       int64_t begin, int64_t end) {
  alignas(64) double x[kRowSegment];
  with_cost(cost, [&](const auto& entries) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < cost.m; j += kRowSegment) {
        const int64_t count = std::min(kRowSegment, cost.m - j);
        exponents(entries, i, j, count, at, x);
        exponentials(x, count, mass);
        if (type == core::DType::kDouble) {
          std::copy(x, x + count, static_cast<double*>(out) + i * cost.m + j);
        } else {
          narrow(x, count, static_cast<float*>(out) + i * cost.m + j);
        }
      }
    }
  });
}

void sinkhorn_displacement_cpu(const SinkhornCost& cost, const SinkhornPoint& at, double* out, int64_t begin,
                               int64_t end) {
  alignas(64) double p[kRowSegment];
  const PointCost points{cost.x, cost.y_t, cost.m, cost.d};
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t axis = 0; axis < cost.d; ++axis) out[i * cost.d + axis] = 0;
    for (int64_t j = 0; j < cost.m; j += kRowSegment) {
      const int64_t count = std::min(kRowSegment, cost.m - j);
      exponents(points, i, j, count, at, p);
      exponentials(p, count, 1.0);
      for (int64_t axis = 0; axis < cost.d; ++axis) {
        const double xi = cost.x[i * cost.d + axis];
        const double* y = cost.y_t + axis * cost.m + j;
        out[i * cost.d + axis] += displaced_sum(p, xi, y, count);
      }
    }
  }
}

}  // namespace torch_ext::kernels
