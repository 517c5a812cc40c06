#include <algorithm>

#include "core/multi_tensor_cuda.cuh"
#include "ops/snell/snell_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;
constexpr int kCoordinates = 8;  // of a piece that one pass over the columns accumulates
constexpr int kBlocks = 1024;    // of kernels that stride over all entries

template <typename T>
struct Entry {
  T d0, d1, w;
};

template <typename T>
__device__ Entry<T> entry_at(const SnellWeights& weights, int64_t i, int64_t j) {
  T s[2] = {0, 0};
  for (int p = 0; p < 2; ++p) {
    const T* a = static_cast<const T*>(weights.a) + (p * weights.rows + i) * weights.q;
    const T* b = static_cast<const T*>(weights.b) + p * weights.q * weights.columns + j;
    for (int64_t k = 0; k < weights.q; ++k) s[p] = snell_square(s[p], a[k], b[k * weights.columns]);
  }
  const T d0 = core::square_root(s[0]), d1 = core::square_root(s[1]);
  return {d0, d1, snell_weight(d0, d1, static_cast<T>(weights.scale))};
}

template <typename T, SnellRule R>
__global__ void tile_kernel(const SnellWeights weights, const T* threshold, const SnellBlock block, T* out,
                            int64_t stride) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kRowsPerBlock + threadIdx.y;
  if (i >= block.rows || j >= block.columns) return;
  out[i * stride + j] = snell_phi<R>(entry_at<T>(weights, block.row + i, block.column + j).w, *threshold);
}

// --- threshold: low bits of the interval, rank inside it, least bits above it, then the counts -----------------------
using Word = unsigned long long;

__global__ void start_selection(Word* state, int64_t rank) {
  for (int64_t i = threadIdx.x; i < kSnellBuckets; i += blockDim.x) state[3 + i] = 0;
  if (threadIdx.x == 0) state[0] = 0, state[1] = static_cast<Word>(rank), state[2] = ~Word{0};
}

// visit(bits of |w|) for all entries, in no order.
template <typename T, typename Visit>
__device__ void for_each_entry(const SnellWeights& weights, const Visit& visit) {
  const int64_t count = weights.rows * weights.columns, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += step) {
    visit(static_cast<uint64_t>(snell_bits(entry_at<T>(weights, e / weights.columns, e % weights.columns).w)));
  }
}

template <typename T>
__global__ void histogram_kernel(const SnellWeights weights, Word* state, int shift) {
  __shared__ Word counts[kSnellBuckets];
  for (int64_t i = threadIdx.x; i < kSnellBuckets; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  const uint64_t low = state[0];
  for_each_entry<T>(weights, [&](uint64_t bits) {
    const uint64_t bucket = (bits - low) >> shift;
    if (bits >= low && bucket < kSnellBuckets) atomicAdd(&counts[bucket], Word{1});
  });
  __syncthreads();
  for (int64_t i = threadIdx.x; i < kSnellBuckets; i += blockDim.x) {
    if (counts[i] > 0) atomicAdd(&state[3 + i], counts[i]);  // integers: the order does not matter
  }
}

__global__ void pick_bucket(Word* state, int shift) {
  Word bucket = 0;
  while (bucket < kSnellBuckets - 1 && state[3 + bucket] <= state[1]) state[1] -= state[3 + bucket++];
  state[0] += bucket << shift;
  if (shift == 0 && state[1] + 1 < state[3 + bucket]) state[2] = state[0];  // the next one is equal
  if (shift > 0) {
    for (int64_t i = 0; i < kSnellBuckets; ++i) state[3 + i] = 0;
  }
}

template <typename T>
__global__ void least_above(const SnellWeights weights, Word* state) {
  const uint64_t value = state[0];
  if (state[2] == value) return;
  Word least = ~Word{0};
  for_each_entry<T>(weights, [&](uint64_t bits) { least = bits > value && bits < least ? bits : least; });
  if (least != ~Word{0}) atomicMin(&state[2], least);
}

template <typename T>
__global__ void finish_selection(const Word* state, double fraction, T* threshold) {
  T low, high;
  snell_from_bits(state[0], low);
  snell_from_bits(state[2] == ~Word{0} ? state[0] : state[2], high);
  *threshold = fraction > 0 ? snell_interpolate(low, high, static_cast<T>(fraction)) : low;
}

// --- gradients -------------------------------------------------------------------------------------------------------
template <typename T>
struct Chained {
  T q[2];
};

template <typename T, SnellRule R>
__device__ Chained<T> chained_at(const SnellWeights& weights, T t, bool exact, int64_t i, int64_t j, T g) {
  const Entry<T> e = entry_at<T>(weights, i, j);
  const T slope = exact ? snell_slope<R, true>(e.w, t) : snell_slope<R, false>(e.w, t);
  const T m = static_cast<T>(weights.scale) * (g * slope);
  return {{snell_over_distance(m, e.d0), snell_over_distance(-m, e.d1)}};
}

template <typename T>
__device__ T difference_at(const SnellWeights& weights, int p, int64_t k, int64_t i, int64_t j) {
  return static_cast<const T*>(weights.a)[(p * weights.rows + i) * weights.q + k] -
         static_cast<const T*>(weights.b)[(p * weights.q + k) * weights.columns + j];
}

// A warp per row of the tile.
template <typename T, SnellRule R>
__global__ void rows_gradient(const SnellWeights weights, const T* threshold, bool exact, const SnellBlock block,
                              const T* g, int64_t stride, T* grad_a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (i >= block.rows) return;
  for (int64_t first = 0; first < weights.q; first += kCoordinates) {
    T sum[2][kCoordinates] = {};
    for (int64_t j = threadIdx.x; j < block.columns; j += kWarp) {
      const auto c = chained_at<T, R>(weights, *threshold, exact, block.row + i, block.column + j, g[i * stride + j]);
      for (int p = 0; p < 2; ++p) {
        for (int k = 0; k < kCoordinates && first + k < weights.q; ++k) {
          sum[p][k] += c.q[p] * difference_at<T>(weights, p, first + k, block.row + i, block.column + j);
        }
      }
    }
    for (int p = 0; p < 2; ++p) {
      for (int k = 0; k < kCoordinates && first + k < weights.q; ++k) {
        T total = sum[p][k];
        for (int half = kWarp / 2; half > 0; half /= 2) total += __shfl_down_sync(0xffffffffu, total, half);
        if (threadIdx.x == 0) grad_a[(p * weights.rows + block.row + i) * weights.q + first + k] += total;
      }
    }
  }
}

// 32 columns a block; the rows are dealt to threadIdx.y and folded in a tree.
template <typename T, SnellRule R>
__global__ void columns_gradient(const SnellWeights weights, const T* threshold, bool exact, const SnellBlock block,
                                 const T* g, int64_t stride, T* grad_b) {
  __shared__ T folded[kRowsPerBlock][kWarp];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const bool inside = j < block.columns;
  for (int64_t first = 0; first < weights.q; first += kCoordinates) {
    T sum[2][kCoordinates] = {};
    for (int64_t i = threadIdx.y; inside && i < block.rows; i += kRowsPerBlock) {
      const auto c = chained_at<T, R>(weights, *threshold, exact, block.row + i, block.column + j, g[i * stride + j]);
      for (int p = 0; p < 2; ++p) {
        for (int k = 0; k < kCoordinates && first + k < weights.q; ++k) {
          sum[p][k] += c.q[p] * difference_at<T>(weights, p, first + k, block.row + i, block.column + j);
        }
      }
    }
    for (int p = 0; p < 2; ++p) {
      for (int k = 0; k < kCoordinates && first + k < weights.q; ++k) {
        folded[threadIdx.y][threadIdx.x] = sum[p][k];
        __syncthreads();
        for (int half = kRowsPerBlock / 2; half > 0; half /= 2) {
          if (threadIdx.y < half) folded[threadIdx.y][threadIdx.x] += folded[threadIdx.y + half][threadIdx.x];
          __syncthreads();
        }
        if (threadIdx.y == 0 && inside) {
          grad_b[(p * weights.columns + block.column + j) * weights.q + first + k] -= folded[0][threadIdx.x];
        }
        __syncthreads();
      }
    }
  }
}

struct Pull {
  double sum;
  Word holder;
};

// One block: the sum has one order.
template <typename T, SnellRule R>
__global__ void pull_kernel(const SnellWeights weights, const T* threshold, const SnellBlock block, const T* g,
                            int64_t stride, Pull* pull) {
  __shared__ double sums[core::kThreads];
  double sum = 0;
  for (int64_t e = threadIdx.x; e < block.rows * block.columns; e += blockDim.x) {
    const int64_t i = e / block.columns, j = e % block.columns;
    const T w = entry_at<T>(weights, block.row + i, block.column + j).w;
    sum += static_cast<double>(g[i * stride + j]) * static_cast<double>(snell_pull<R>(w, *threshold));
    const auto index = static_cast<Word>((block.row + i) * weights.columns + block.column + j);
    if (core::absolute(w) == *threshold) atomicMin(&pull->holder, index);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = core::kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) pull->sum += sums[0];
}

template <typename T>
__global__ void threshold_gradient(const SnellWeights weights, const Pull* pull, T* grad_a, T* grad_b) {
  if (pull->holder >= static_cast<Word>(weights.rows * weights.columns)) return;
  snell_threshold_gradient(weights, static_cast<T>(pull->sum), static_cast<int64_t>(pull->holder), grad_a, grad_b);
}

unsigned groups(int64_t count, int size) { return static_cast<unsigned>((count + size - 1) / size); }

}  // namespace

void snell_tile_cuda(const SnellWeights& weights, core::DType type, const void* threshold, const SnellBlock& block,
                     void* out, int64_t stride, void* stream) {
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_snell_rule(weights.rule, [&](auto rule) {
      // Grids have at most 65535 rows of blocks.
      constexpr int64_t kRows = int64_t{65535} * kRowsPerBlock;
      for (int64_t row = 0; row < block.rows; row += kRows) {
        const SnellBlock part{block.row + row, std::min(kRows, block.rows - row), block.column, block.columns};
        const dim3 grid(groups(part.columns, kWarp), groups(part.rows, kRowsPerBlock));
        tile_kernel<T, decltype(rule)::value>
            <<<grid, dim3(kWarp, kRowsPerBlock), 0, static_cast<cudaStream_t>(stream)>>>(
                weights, static_cast<const T*>(threshold), part, static_cast<T*>(out) + row * stride, stride);
      }
    });
  });
  core::check_launch("snell_tile");
}

void snell_threshold_cuda(const SnellWeights& weights, core::DType type, int64_t rank, double fraction, void* scratch,
                          void* threshold, void* stream) {
  auto* state = static_cast<Word*>(scratch);
  auto* on = static_cast<cudaStream_t>(stream);
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    start_selection<<<1, core::kThreads, 0, on>>>(state, rank);
    for (int shift = sizeof(T) * 8 - 1; shift > 0;) {
      shift = std::max(0, shift - kSnellDigit);
      histogram_kernel<T><<<kBlocks, core::kThreads, 0, on>>>(weights, state, shift);
      pick_bucket<<<1, 1, 0, on>>>(state, shift);
    }
    if (fraction > 0) least_above<T><<<kBlocks, core::kThreads, 0, on>>>(weights, state);
    finish_selection<<<1, 1, 0, on>>>(state, fraction, static_cast<T*>(threshold));
  });
  core::check_launch("snell_threshold");
}

void snell_gradient_cuda(const SnellWeights& weights, core::DType type, const void* threshold, bool exact,
                         const SnellBlock& block, const void* g, int64_t stride, void* grad_a, void* grad_b, void* pull,
                         void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_snell_rule(weights.rule, [&](auto rule) {
      constexpr SnellRule kRule = decltype(rule)::value;
      const auto* t = static_cast<const T*>(threshold);
      const auto* from = static_cast<const T*>(g);
      const dim3 threads(kWarp, kRowsPerBlock);
      rows_gradient<T, kRule><<<groups(block.rows, kRowsPerBlock), threads, 0, on>>>(weights, t, exact, block, from,
                                                                                     stride, static_cast<T*>(grad_a));
      columns_gradient<T, kRule><<<groups(block.columns, kWarp), threads, 0, on>>>(weights, t, exact, block, from,
                                                                                   stride, static_cast<T*>(grad_b));
      if (pull != nullptr) {
        pull_kernel<T, kRule><<<1, core::kThreads, 0, on>>>(weights, t, block, from, stride, static_cast<Pull*>(pull));
      }
    });
  });
  core::check_launch("snell_gradient");
}

void snell_threshold_gradient_cuda(const SnellWeights& weights, core::DType type, const void* pull, void* grad_a,
                                   void* grad_b, void* stream) {
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    threshold_gradient<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(
        weights, static_cast<const Pull*>(pull), static_cast<T*>(grad_a), static_cast<T*>(grad_b));
  });
  core::check_launch("snell_threshold_gradient");
}

}  // namespace torch_ext::kernels
