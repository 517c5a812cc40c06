// Both passes over the window on CUDA; sums have the shapes of the CPU kernels.
#include <type_traits>

#include "core/multi_tensor_cuda.cuh"
#include "curvature/fisher_window/fisher_window_device.cuh"

namespace torch_ext::kernels {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kDotWarps = 8;
constexpr int kSlotsPerWarp = 4;
constexpr int kSlotsPerBlock = kDotWarps * kSlotsPerWarp;
constexpr int kDotThreads = kDotWarps * kWarp;

__device__ double fold_warp(double sum) {  // lane 0 has the total
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
  return sum;
}

// What every row of a tile is multiplied with: the row in the spare slot, or any x.
struct Query {
  const void* x;  // null: the stored row
  bool wide;
  int64_t numel;
};

__device__ double query_element(const Query& q, int64_t column) {
  if (column >= q.numel) return 0;
  return q.wide ? static_cast<const double*>(q.x)[column] : static_cast<double>(static_cast<const float*>(q.x)[column]);
}

template <WindowFormat F, bool kStored>
__device__ double tile_product(const WindowView& w, const void* shared, const float* query_scales, int64_t place) {
  using S = typename Stored<F>::type;
  const S* row = static_cast<const S*>(w.rows) + place * kTile;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if constexpr (F == WindowFormat::kInt8) {
    double total = 0;
    for (int64_t b = 0; b < kScales; ++b) {
      const double scale = static_cast<double>(w.scales[place * kScales + b]);
      if constexpr (kStored) {
        // Sums of integers are exact, so the lanes may share them out as the loads like it: eight codes each.
        const int2 x = reinterpret_cast<const int2*>(static_cast<const int8_t*>(shared) + b * kScaleBlock)[lane];
        const int2 y = reinterpret_cast<const int2*>(row + b * kScaleBlock)[lane];
        int sum = __dp4a(x.x, y.x, __dp4a(x.y, y.y, 0));
        for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
        total += scale * static_cast<double>(query_scales[b]) * static_cast<double>(sum);
      } else {
        const auto* x = static_cast<const double*>(shared);
        double sum = 0;
        for (int64_t i = b * kScaleBlock + lane; i < (b + 1) * kScaleBlock; i += kWarp) {
          sum += static_cast<double>(row[i]) * x[i];
        }
        total += scale * fold_warp(sum);
      }
    }
    return total;
  } else {
    using Q = std::conditional_t<kStored && F == WindowFormat::kBFloat16, float, double>;
    const auto* query = static_cast<const Q*>(shared);
    Q sum = 0;
#pragma unroll 8
    for (int64_t i = lane; i < kTile; i += kWarp) sum += static_cast<Q>(decoded(row[i])) * query[i];
    return fold_warp(static_cast<double>(sum));
  }
}

// Puts a tile of the query into shared memory; the caller's barriers stand around it.
template <WindowFormat F, bool kStored>
__device__ void load_query(const WindowView& w, const Query& q, int64_t tile, void* shared, float* scales) {
  using S = typename Stored<F>::type;
  const int64_t place = tile * w.slots + w.ring[kRingNext];
  for (int64_t i = threadIdx.x; i < kTile; i += blockDim.x) {
    if constexpr (!kStored) {
      static_cast<double*>(shared)[i] = query_element(q, tile * kTile + i);
    } else {
      const S value = static_cast<const S*>(w.rows)[place * kTile + i];
      if constexpr (F == WindowFormat::kInt8) {
        static_cast<int8_t*>(shared)[i] = value;
      } else if constexpr (F == WindowFormat::kBFloat16) {
        static_cast<float*>(shared)[i] = decoded(value);
      } else {
        static_cast<double*>(shared)[i] = static_cast<double>(decoded(value));
      }
    }
  }
  if (F == WindowFormat::kInt8 && kStored && threadIdx.x < kScales) {
    scales[threadIdx.x] = w.scales[place * kScales + threadIdx.x];
  }
}

// blockIdx.x: group of tiles; blockIdx.y: kSlotsPerBlock slots, four per warp, each summed over the group's tiles.
template <WindowFormat F, bool kStored>
__global__ void __launch_bounds__(kDotThreads) dots_dense(WindowView w, Query q, double* partial) {
  __shared__ double shared[kTile];
  __shared__ float scales[kScales];
  const int64_t count = w.ring[kRingCount], next = w.ring[kRingNext], each = tiles_per_group(w.tiles);
  const int64_t first = blockIdx.y * int64_t{kSlotsPerBlock} + threadIdx.x / kWarp;
  const auto wanted = [&](int64_t slot) {
    if (slot >= w.slots) return false;
    return slot == next ? kStored : count == w.slots - 1 || slot < count;
  };
  double sum[kSlotsPerWarp] = {};
  const int64_t end = (blockIdx.x + int64_t{1}) * each < w.tiles ? (blockIdx.x + int64_t{1}) * each : w.tiles;
  for (int64_t tile = blockIdx.x * each; tile < end; ++tile) {
    __syncthreads();
    load_query<F, kStored>(w, q, tile, shared, scales);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlotsPerWarp; ++k) {
      const int64_t slot = first + k * kDotWarps;
      if (wanted(slot)) sum[k] += tile_product<F, kStored>(w, shared, scales, tile * w.slots + slot);
    }
  }
  if (threadIdx.x % kWarp != 0) return;
  for (int k = 0; k < kSlotsPerWarp; ++k) {
    const int64_t slot = first + k * kDotWarps;
    if (slot < w.slots) partial[blockIdx.x * w.slots + slot] = sum[k];
  }
}

// topk: the query's tile in shared memory with zeros where nothing is kept.
template <bool kStored>
__global__ void __launch_bounds__(kDotThreads) dots_topk(WindowView w, Query q, double* partial) {
  __shared__ double query[kTile];
  const int64_t count = w.ring[kRingCount], next = w.ring[kRingNext], each = tiles_per_group(w.tiles);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t first = blockIdx.y * int64_t{kSlotsPerBlock} + threadIdx.x / kWarp;
  const auto* values = static_cast<const core::BFloat16*>(w.rows);
  double sum[kSlotsPerWarp] = {};
  const int64_t end = (blockIdx.x + int64_t{1}) * each < w.tiles ? (blockIdx.x + int64_t{1}) * each : w.tiles;
  for (int64_t tile = blockIdx.x * each; tile < end; ++tile) {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < kTile; i += blockDim.x) {
      query[i] = kStored ? 0.0 : query_element(q, tile * kTile + i);
    }
    __syncthreads();
    if (kStored) {
      const int64_t mine = (tile * w.slots + next) * w.kept;
      for (int64_t i = threadIdx.x; i < w.kept; i += blockDim.x) {
        query[w.indices[mine + i]] = static_cast<double>(core::load(values[mine + i]));
      }
      __syncthreads();
    }
    for (int k = 0; k < kSlotsPerWarp; ++k) {
      const int64_t slot = first + k * kDotWarps;
      if (slot >= w.slots || !(slot == next ? kStored : count == w.slots - 1 || slot < count)) continue;
      const int64_t at = (tile * w.slots + slot) * w.kept;
      const auto value = [&](int64_t i) {
        return static_cast<double>(core::load(values[at + i])) * query[w.indices[at + i]];
      };
      if (w.kept < core::kLanes) {
        sum[k] += core::sum_short(w.kept, value);
        continue;
      }
      double lanes = 0;
      for (int64_t i = lane; i < w.kept; i += kWarp) lanes += value(i);
      sum[k] += fold_warp(lanes);
    }
  }
  if (lane != 0) return;
  for (int k = 0; k < kSlotsPerWarp; ++k) {
    const int64_t slot = first + k * kDotWarps;
    if (slot < w.slots) partial[blockIdx.x * w.slots + slot] = sum[k];
  }
}

__global__ void fold(const double* partial, int64_t groups, int64_t slots, double* dots) {
  const int64_t s = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (s >= slots) return;
  double total = 0;
  for (int64_t g = 0; g < groups; ++g) total += partial[g * slots + s];
  dots[s] = total;
}

template <bool kStored>
void dots(const WindowView& w, const Query& q, double* partial, double* out, cudaStream_t stream) {
  const int64_t each = tiles_per_group(w.tiles), groups = (w.tiles + each - 1) / each;
  const dim3 grid(static_cast<unsigned>(groups),
                  static_cast<unsigned>((w.slots + kSlotsPerBlock - 1) / kSlotsPerBlock));
  if (w.format == WindowFormat::kTopK) {
    dots_topk<kStored><<<grid, kDotThreads, 0, stream>>>(w, q, partial);
  } else {
    dispatch_dense(w.format, [&](auto format) {
      dots_dense<decltype(format)::value, kStored><<<grid, kDotThreads, 0, stream>>>(w, q, partial);
    });
  }
  core::check_launch("fisher_window_dots");
  fold<<<static_cast<unsigned>((w.slots + 255) / 256), 256, 0, stream>>>(partial, groups, w.slots, out);
  core::check_launch("fisher_window_fold");
}

// --- second pass ---

constexpr int kCombineThreads = 256;

template <WindowFormat F>
__global__ void __launch_bounds__(kCombineThreads) combine(WindowView w, const double* coefficients, void* out) {
  using Out = typename Stored<F>::out_type;
  const int64_t column = blockIdx.x * int64_t{kCombineThreads} + threadIdx.x;
  static_cast<Out*>(out)[column] =
      static_cast<Out>(combined_column<F, typename Stored<F>::run_type>(w, coefficients, column));
}

template <typename Out>
__device__ void store_rest(void* out, int64_t column, double x, double sum, double damping) {
  static_cast<Out*>(out)[column] = static_cast<Out>((x - sum) / damping);
}

template <WindowFormat F>
__global__ void __launch_bounds__(kCombineThreads)
    residual(WindowView w, const double* coefficients, const double* x, int64_t numel, double damping, void* out) {
  const int64_t column = blockIdx.x * int64_t{kCombineThreads} + threadIdx.x;
  if (column >= numel) return;
  store_rest<typename Stored<F>::out_type>(out, column, x[column], combined_column<F, double>(w, coefficients, column),
                                           damping);
}

// One block per tile; entries of one row have different columns, rows follow each other.
__global__ void __launch_bounds__(kCombineThreads)
    combine_topk(WindowView w, const double* coefficients, const double* x, int64_t numel, double damping, float* out) {
  __shared__ double sum[kTile];
  for (int64_t i = threadIdx.x; i < kTile; i += blockDim.x) sum[i] = 0;
  __syncthreads();
  const int64_t tile = blockIdx.x, count = w.ring[kRingCount], next = w.ring[kRingNext];
  for (int64_t k = 0; k < count; ++k) {
    const int64_t slot = slot_of_position(k, next), at = (tile * w.slots + slot) * w.kept;
    for (int64_t i = threadIdx.x; i < w.kept; i += blockDim.x) {
      const auto value = static_cast<double>(core::load(static_cast<const core::BFloat16*>(w.rows)[at + i]));
      sum[w.indices[at + i]] += coefficients[slot] * value;
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < kTile; i += blockDim.x) {
    const int64_t column = tile * kTile + i;
    if (x == nullptr) {
      out[column] = static_cast<float>(sum[i]);
    } else if (column < numel) {
      store_rest<float>(out, column, x[column], sum[i], damping);
    }
  }
}

}  // namespace

void window_dots_cuda(const WindowView& w, const void* row, double* partial, double* out, void* stream) {
  window_encode_cuda(w, row, stream);
  dots<true>(w, Query{nullptr, false, 0}, partial, out, static_cast<cudaStream_t>(stream));
}

void window_project_cuda(const WindowView& w, const void* x, bool wide, int64_t numel, double* partial, double* out,
                         void* stream) {
  dots<false>(w, Query{x, wide, numel}, partial, out, static_cast<cudaStream_t>(stream));
}

void window_combine_cuda(const WindowView& w, const double* coefficients, void* out, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(w.tiles * kTile / kCombineThreads);
  if (w.format == WindowFormat::kTopK) {
    combine_topk<<<static_cast<unsigned>(w.tiles), kCombineThreads, 0, cuda_stream>>>(w, coefficients, nullptr, 0, 1.0,
                                                                                      static_cast<float*>(out));
  } else {
    dispatch_dense(w.format, [&](auto format) {
      combine<decltype(format)::value><<<blocks, kCombineThreads, 0, cuda_stream>>>(w, coefficients, out);
    });
  }
  core::check_launch("fisher_window_combine");
}

void window_residual_cuda(const WindowView& w, const double* coefficients, const double* x, int64_t numel,
                          double damping, void* out, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  if (numel == 0) return;
  if (w.format == WindowFormat::kTopK) {
    combine_topk<<<static_cast<unsigned>(w.tiles), kCombineThreads, 0, cuda_stream>>>(
        w, coefficients, x, numel, damping, static_cast<float*>(out));
  } else {
    const auto blocks = static_cast<unsigned>((numel + kCombineThreads - 1) / kCombineThreads);
    dispatch_dense(w.format, [&](auto format) {
      residual<decltype(format)::value>
          <<<blocks, kCombineThreads, 0, cuda_stream>>>(w, coefficients, x, numel, damping, out);
    });
  }
  core::check_launch("fisher_window_residual");
}

}  // namespace torch_ext::kernels
