#include "core/block_reduce.h"
#include "core/multi_tensor_cuda.cuh"
#include "ops/sinkhorn_newton/sinkhorn_newton_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kRowsPerBlock = core::kThreads / static_cast<int>(core::kLanes);

__device__ double warp_sum(double value) {  // lane 0 has the tree of core/block_reduce.h; every lane gets it
  for (int half = core::kLanes / 2; half > 0; half /= 2) value += __shfl_down_sync(kAll, value, half);
  return __shfl_sync(kAll, value, 0);
}
__device__ double warp_max(double value) {
  for (int half = core::kLanes / 2; half > 0; half /= 2) {
    const double other = __shfl_xor_sync(kAll, value, half);
    value = other > value ? other : value;
  }
  return value;
}
__device__ int lane_of_thread() { return static_cast<int>(threadIdx.x % core::kLanes); }
__device__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / core::kLanes;
}

// A warp per row.
template <typename Cost>
__global__ void rows_kernel(const Cost cost, int64_t n, int64_t m, const double* g, double inv_eps, double* out) {
  const int64_t i = row_of_warp();
  if (i >= n) return;
  const int lane = lane_of_thread();
  LogSum total{-HUGE_VAL, 0};
  for (int64_t begin = 0; begin < m; begin += kRowSegment) {
    const int64_t end = begin + kRowSegment < m ? begin + kRowSegment : m;
    double max = -HUGE_VAL;
    for (int64_t j = begin + lane; j < end; j += core::kLanes) {
      const double x = row_exponent(g[j], cost.at(i, j), inv_eps);
      max = x > max ? x : max;
    }
    max = warp_max(max);
    const double shift = shift_of(max);
    double sum = 0;
    for (int64_t j = begin + lane; j < end; j += core::kLanes) {
      sum += exponential(row_exponent(g[j], cost.at(i, j), inv_eps) - shift, kNegligible);
    }
    const LogSum segment{max, warp_sum(sum)};
    total = begin == 0 ? segment : merged(total, segment);
  }
  if (lane == 0) out[i] = value_of(total);
}

// A thread per column and segment of rows; scratch holds [segments, m] maxima, then as many sums.
template <typename Cost>
__global__ void column_segments_kernel(const Cost cost, int64_t n, int64_t m, const double* f, double inv_eps,
                                       double* scratch) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= m) return;
  const int64_t segments = (n + kColumnSegment - 1) / kColumnSegment;
  for (int64_t segment = blockIdx.y; segment < segments; segment += gridDim.y) {
    const int64_t begin = segment * kColumnSegment;
    const int64_t end = begin + kColumnSegment < n ? begin + kColumnSegment : n;
    double max = -HUGE_VAL;
    for (int64_t i = begin; i < end; ++i) {
      const double x = row_exponent(f[i], cost.at(i, j), inv_eps);
      max = x > max ? x : max;
    }
    const double shift = shift_of(max);
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      sum += exponential(row_exponent(f[i], cost.at(i, j), inv_eps) - shift, kNegligible);
    }
    scratch[segment * m + j] = max;
    scratch[(segments + segment) * m + j] = sum;
  }
}

__global__ void column_merge_kernel(int64_t segments, int64_t m, const double* scratch, double* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= m) return;
  LogSum total{scratch[j], scratch[segments * m + j]};
  for (int64_t segment = 1; segment < segments; ++segment) {
    total = merged(total, {scratch[segment * m + j], scratch[(segments + segment) * m + j]});
  }
  out[j] = value_of(total);
}

template <typename Cost>
__global__ void apply_rows_kernel(const Cost cost, int64_t n, int64_t m, const SinkhornPoint at, const double* w,
                                  double* out) {
  const int64_t i = row_of_warp();
  if (i >= n) return;
  double total = 0;
  for (int64_t begin = 0; begin < m; begin += kRowSegment) {
    const int64_t end = begin + kRowSegment < m ? begin + kRowSegment : m;
    double sum = 0;
    for (int64_t j = begin + lane_of_thread(); j < end; j += core::kLanes) {
      sum += exponential(plan_exponent(at.f[i], at.g[j], cost.at(i, j), at.inv_eps), kUnderflow) * w[j];
    }
    total += warp_sum(sum);
  }
  if (lane_of_thread() == 0) out[i] = total;
}

template <typename Cost>
__global__ void apply_column_segments_kernel(const Cost cost, int64_t n, int64_t m, const SinkhornPoint at,
                                             const double* w, double* scratch) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= m) return;
  const int64_t segments = (n + kColumnSegment - 1) / kColumnSegment;
  for (int64_t segment = blockIdx.y; segment < segments; segment += gridDim.y) {
    const int64_t begin = segment * kColumnSegment;
    const int64_t end = begin + kColumnSegment < n ? begin + kColumnSegment : n;
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      sum += exponential(plan_exponent(at.f[i], at.g[j], cost.at(i, j), at.inv_eps), kUnderflow) * w[i];
    }
    scratch[segment * m + j] = sum;
  }
}

__global__ void add_segments_kernel(int64_t segments, int64_t m, const double* scratch, double* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= m) return;
  double total = 0;
  for (int64_t segment = 0; segment < segments; ++segment) total += scratch[segment * m + j];
  out[j] = total;
}

template <typename Cost>
__global__ void range_kernel(const Cost cost, int64_t n, int64_t m, double* out) {
  const int64_t i = row_of_warp();
  if (i >= n) return;
  double min = HUGE_VAL, max = -HUGE_VAL;
  bool invalid = false;
  for (int64_t j = lane_of_thread(); j < m; j += core::kLanes) {
    const double c = cost.at(i, j);
    min = c < min ? c : min;
    max = c > max && c < HUGE_VAL ? c : max;
    invalid = invalid || !(c > -HUGE_VAL);
  }
  min = -warp_max(-min);
  max = warp_max(max);
  invalid = __any_sync(kAll, invalid) != 0;
  if (lane_of_thread() == 0) {
    out[3 * i] = min;
    out[3 * i + 1] = max;
    out[3 * i + 2] = invalid ? 1 : 0;
  }
}

// Entries that the sparse plan keeps; a warp per row. With start: they are stored, columns ascending; without: counted.
template <typename Cost>
__global__ void compact_kernel(const Cost cost, int64_t n, int64_t m, const SinkhornPoint at, const double* log_row,
                               const double* log_column, const int64_t* start, int64_t* count, int32_t* column,
                               double* value) {
  const int64_t i = row_of_warp();
  if (i >= n) return;
  const int lane = lane_of_thread();
  int64_t kept = start != nullptr ? start[i] : 0;
  for (int64_t begin = 0; begin < m; begin += core::kLanes) {
    const int64_t j = begin + lane;
    const double x = j < m ? plan_exponent(at.f[i], at.g[j], cost.at(i, j), at.inv_eps) : -HUGE_VAL;
    const double bound = j < m && log_column[j] < log_row[i] ? log_column[j] : log_row[i];
    const bool keep = j < m && x > bound;
    const unsigned mask = __ballot_sync(kAll, keep);
    if (keep && start != nullptr) {
      const int64_t to = kept + __popc(mask & ((1u << lane) - 1));
      column[to] = static_cast<int32_t>(j);
      value[to] = exponential(x, kUnderflow);
    }
    kept += __popc(mask);
  }
  if (lane == 0 && start == nullptr) count[i] = kept;
}

template <typename Cost, typename Out>
__global__ void plan_kernel(const Cost cost, int64_t n, int64_t m, const SinkhornPoint at, double mass, Out* out) {
  const int64_t i = row_of_warp();
  if (i >= n) return;
  for (int64_t j = lane_of_thread(); j < m; j += core::kLanes) {
    const double x = plan_exponent(at.f[i], at.g[j], cost.at(i, j), at.inv_eps);
    out[i * m + j] = static_cast<Out>(mass * exponential(x, kUnderflow));
  }
}

__global__ void displacement_kernel(const PointCost cost, int64_t n, int64_t m, const SinkhornPoint at, double* out) {
  const int64_t i = row_of_warp();
  if (i >= n) return;
  for (int64_t axis = 0; axis < cost.d; ++axis) {
    const double xi = cost.x[i * cost.d + axis];
    double total = 0;
    for (int64_t begin = 0; begin < m; begin += kRowSegment) {
      const int64_t end = begin + kRowSegment < m ? begin + kRowSegment : m;
      double sum = 0;
      for (int64_t j = begin + lane_of_thread(); j < end; j += core::kLanes) {
        const double x = plan_exponent(at.f[i], at.g[j], cost.at(i, j), at.inv_eps);
        sum += exponential(x, kUnderflow) * (xi - cost.y_t[axis * m + j]);
      }
      total += warp_sum(sum);
    }
    if (lane_of_thread() == 0) out[i * cost.d + axis] = total;
  }
}

unsigned blocks_of(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}
constexpr int kColumnThreads = 128;
dim3 segment_grid(const SinkhornCost& cost) {
  const int64_t segments = (cost.n + kColumnSegment - 1) / kColumnSegment;
  return {blocks_of(cost.m, kColumnThreads), static_cast<unsigned>(segments < 65535 ? segments : 65535)};
}
unsigned row_blocks(const SinkhornCost& cost) { return blocks_of(cost.n, kRowsPerBlock); }
cudaStream_t on(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

void sinkhorn_rows_cuda(const SinkhornCost& cost, const double* g, double inv_eps, double* out, void* stream) {
  with_cost(cost, [&](const auto& entries) {
    rows_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(entries, cost.n, cost.m, g, inv_eps, out);
  });
  core::check_launch("sinkhorn_rows");
}

void sinkhorn_columns_cuda(const SinkhornCost& cost, const double* f, double inv_eps, double* scratch, double* out,
                           void* stream) {
  const dim3 grid = segment_grid(cost);
  with_cost(cost, [&](const auto& entries) {
    column_segments_kernel<<<grid, kColumnThreads, 0, on(stream)>>>(entries, cost.n, cost.m, f, inv_eps, scratch);
  });
  core::check_launch("sinkhorn_columns");
  const int64_t segments = (cost.n + kColumnSegment - 1) / kColumnSegment;
  column_merge_kernel<<<grid.x, kColumnThreads, 0, on(stream)>>>(segments, cost.m, scratch, out);
  core::check_launch("sinkhorn_columns");
}

void sinkhorn_apply_rows_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* out,
                              void* stream) {
  with_cost(cost, [&](const auto& entries) {
    apply_rows_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(entries, cost.n, cost.m, at, w, out);
  });
  core::check_launch("sinkhorn_apply_rows");
}

void sinkhorn_apply_columns_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* scratch,
                                 double* out, void* stream) {
  const dim3 grid = segment_grid(cost);
  with_cost(cost, [&](const auto& entries) {
    apply_column_segments_kernel<<<grid, kColumnThreads, 0, on(stream)>>>(entries, cost.n, cost.m, at, w, scratch);
  });
  core::check_launch("sinkhorn_apply_columns");
  const int64_t segments = (cost.n + kColumnSegment - 1) / kColumnSegment;
  add_segments_kernel<<<grid.x, kColumnThreads, 0, on(stream)>>>(segments, cost.m, scratch, out);
  core::check_launch("sinkhorn_apply_columns");
}

void sinkhorn_range_cuda(const SinkhornCost& cost, double* per_row, void* stream) {
  with_cost(cost, [&](const auto& entries) {
    range_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(entries, cost.n, cost.m, per_row);
  });
  core::check_launch("sinkhorn_range");
}

void sinkhorn_count_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* log_row,
                         const double* log_column, int64_t* count, void* stream) {
  with_cost(cost, [&](const auto& entries) {
    compact_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(entries, cost.n, cost.m, at, log_row,
                                                                        log_column, nullptr, count, nullptr, nullptr);
  });
  core::check_launch("sinkhorn_count");
}

void sinkhorn_fill_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* log_row,
                        const double* log_column, const int64_t* start, int32_t* column, double* value, void* stream) {
  with_cost(cost, [&](const auto& entries) {
    compact_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(entries, cost.n, cost.m, at, log_row,
                                                                        log_column, start, nullptr, column, value);
  });
  core::check_launch("sinkhorn_fill");
}

void sinkhorn_plan_cuda(const SinkhornCost& cost, const SinkhornPoint& at, double mass, void* out, core::DType type,
                        void* stream) {
  with_cost(cost, [&](const auto& entries) {
    if (type == core::DType::kDouble) {
      plan_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(entries, cost.n, cost.m, at, mass,
                                                                       static_cast<double*>(out));
    } else {
      plan_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(entries, cost.n, cost.m, at, mass,
                                                                       static_cast<float*>(out));
    }
  });
  core::check_launch("sinkhorn_plan");
}

void sinkhorn_displacement_cuda(const SinkhornCost& cost, const SinkhornPoint& at, double* out, void* stream) {
  displacement_kernel<<<row_blocks(cost), core::kThreads, 0, on(stream)>>>(PointCost{cost.x, cost.y_t, cost.m, cost.d},
                                                                           cost.n, cost.m, at, out);
  core::check_launch("sinkhorn_displacement");
}

}  // namespace torch_ext::kernels
