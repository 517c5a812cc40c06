// One thread block a task: the noise of a pair is made once, into shared memory, for both members and several rows.
#include <cmath>

#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "core/noise_cuda.cuh"
#include "ops/eggroll/eggroll_kernel.h"

namespace torch_ext::kernels {
namespace {

using core::NoiseLaw;
using core::opmath_t;
using core::PhiloxStream;
using core::PhiloxTag;

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr int kSums = 8;         // products with x that one warp adds up at a time
constexpr int64_t kTile = 1024;  // most columns that are made at a time
constexpr int64_t kWeights = 2 * kEggrollCudaRank;
constexpr int64_t kNoise = 32 * kEggrollCudaRank > kTile ? 32 * kEggrollCudaRank : kTile;

// Columns at a time: whole rounds of 32 lanes, so that lanes add the same elements as on the CPU.
TX_HD int64_t tile_columns(int64_t rank) {
  const int64_t columns = kTile / rank / 32 * 32;
  return columns < 32 ? 32 : columns;
}
// Rows of each member that one thread block works on, so that their weights fit.
TX_HD int64_t tile_rows(int64_t rank, int64_t rows) {
  const int64_t most = kEggrollCudaRank / rank < 32 ? kEggrollCudaRank / rank : 32;
  return most < rows ? most : rows;
}

// The rows of a pair's members that a thread block has, numbered member by member.
struct Task {
  int64_t pair, member, members, row, rows;

  __device__ Task(const EggrollMembers& of, int64_t all_rows, int64_t step, int64_t number) {
    const int64_t blocks = (all_rows + step - 1) / step;
    pair = of.first_pair() + number / blocks;
    member = of.first(pair);
    members = of.last(pair) - member;
    row = number % blocks * step;
    rows = row + step < all_rows ? step : all_rows - row;
  }
  __device__ int64_t count() const { return members * rows; }
  __device__ int64_t member_of(int64_t n) const { return member + n / rows; }
  __device__ int64_t row_of(int64_t n) const { return row + n % rows; }
};

// Rows [from, to) of a factor, rounded, row-major.
template <typename S, NoiseLaw law>
__device__ void make_noise(const PhiloxStream& stream, int64_t from, int64_t to, int64_t rank,
                           const core::GaussianCell* cells, opmath_t<S>* z) {
  core::for_each_noise<law>(stream, from * rank, to * rank, cells,
                            [&](int64_t q, float value) { z[q - from * rank] = core::noise_as<S>(value); });
}

// weight[n * rank + k] = s scale (x_n . in_k).
template <typename S, NoiseLaw law>
__device__ void project(const EggrollLayer& a, const Task& task, opmath_t<S> scale, const core::GaussianCell* cells,
                        opmath_t<S>* z, opmath_t<S>* weight) {
  using T = opmath_t<S>;
  const PhiloxStream stream = a.members.stream(task.pair, a.ordinal, a.in_tag);
  const int64_t step = tile_columns(a.rank), sums = task.count() * a.rank;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t first = 0; first < sums; first += kWarps * kSums) {
    T sum[kSums] = {};
    for (int64_t from = 0; from < a.in; from += step) {
      const int64_t to = from + step < a.in ? from + step : a.in;
      make_noise<S, law>(stream, from, to, a.rank, cells, z);
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const int64_t number = first + warp + kWarps * s;
        if (number >= sums) break;
        const int64_t n = number / a.rank, k = number % a.rank;
        const S* x = static_cast<const S*>(a.x) + (task.member_of(n) * a.rows + task.row_of(n)) * a.in;
        for (int64_t c = from + lane; c < to; c += 32) sum[s] += core::load(x[c]) * z[(c - from) * a.rank + k];
      }
      __syncthreads();
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      for (int offset = 16; offset > 0; offset /= 2) sum[s] += __shfl_down_sync(0xffffffffu, sum[s], offset);
      const int64_t number = first + warp + kWarps * s;
      if (lane == 0 && number < sums) {
        weight[number] = static_cast<T>(a.members.sign(task.member_of(number / a.rank))) * scale * sum[s];
      }
    }
  }
  __syncthreads();
}

template <typename S, NoiseLaw law>
__global__ void __launch_bounds__(kBlock) layer(const EggrollLayer a, opmath_t<S> scale, int64_t rows) {
  using T = opmath_t<S>;
  __shared__ T z[kNoise], eps[kTile], weight[kWeights];
  const auto* cells = core::load_cells<law>();
  const Task task(a.members, a.rows, rows, blockIdx.x);
  const bool low_rank = a.ordinal >= 0, noisy_bias = a.bias_ordinal >= 0;
  if (low_rank) project<S, law>(a, task, scale, cells, z, weight);
  const PhiloxStream out_stream = a.members.stream(task.pair, a.ordinal, a.out_tag);
  const PhiloxStream bias_stream = a.members.stream(task.pair, a.bias_ordinal, PhiloxTag::kEsVector);
  const int64_t step = low_rank ? tile_columns(a.rank) : kTile;
  for (int64_t from = 0; from < a.out; from += step) {
    const int64_t to = from + step < a.out ? from + step : a.out;
    if (low_rank) make_noise<S, law>(out_stream, from, to, a.rank, cells, z);
    if (noisy_bias) make_noise<S, law>(bias_stream, from, to, 1, cells, eps);
    __syncthreads();
    for (int64_t j = from + threadIdx.x; j < to; j += kBlock) {
      const T bias = a.bias == nullptr ? T(0) : core::load(static_cast<const S*>(a.bias)[j]);
      for (int64_t n = 0; n < task.count(); ++n) {
        const int64_t i = task.member_of(n);
        T value = bias;
        if (noisy_bias) {
          value = perturbed(value, static_cast<T>(a.members.sign(i)) * static_cast<T>(a.sigma), eps[j - from]);
        }
        for (int64_t k = 0; low_rank && k < a.rank; ++k) {
          value = perturbed(value, weight[n * a.rank + k], z[(j - from) * a.rank + k]);
        }
        core::store(static_cast<S*>(a.y)[(i * a.rows + task.row_of(n)) * a.out + j], value);
      }
    }
    __syncthreads();
  }
}

template <typename S, NoiseLaw law>
__global__ void __launch_bounds__(kBlock) rows_of(const EggrollRowsOf a, opmath_t<S> scale, int64_t rows) {
  using T = opmath_t<S>;
  __shared__ T z[kNoise], weight[kWeights];
  const auto* cells = core::load_cells<law>();
  const Task task(a.members, a.rows, rows, blockIdx.x);
  const auto id_of = [&](int64_t n) {
    const int64_t row = task.row_of(n);
    return a.ids == nullptr ? row : a.ids[task.member_of(n) * a.rows + row];
  };
  const PhiloxStream row_stream = a.members.stream(task.pair, a.ordinal, PhiloxTag::kEsFactorA);
  for (int64_t number = threadIdx.x; number < task.count() * a.rank; number += kBlock) {
    const int64_t n = number / a.rank, id = id_of(n);
    if (id < 0 || id >= a.entries) __trap();
    const float noise = core::noise_at<law>(row_stream, id * a.rank + number % a.rank, cells);
    weight[number] = static_cast<T>(a.members.sign(task.member_of(n))) * scale * core::noise_as<S>(noise);
  }
  const PhiloxStream stream = a.members.stream(task.pair, a.ordinal, PhiloxTag::kEsFactorB);
  const int64_t step = tile_columns(a.rank);
  for (int64_t from = 0; from < a.n; from += step) {
    const int64_t to = from + step < a.n ? from + step : a.n;
    make_noise<S, law>(stream, from, to, a.rank, cells, z);
    __syncthreads();
    for (int64_t j = from + threadIdx.x; j < to; j += kBlock) {
      for (int64_t n = 0; n < task.count(); ++n) {
        T value = core::load(static_cast<const S*>(a.weight)[id_of(n) * a.n + j]);
        for (int64_t k = 0; k < a.rank; ++k) {
          value = perturbed(value, weight[n * a.rank + k], z[(j - from) * a.rank + k]);
        }
        core::store(static_cast<S*>(a.out)[(task.member_of(n) * a.rows + task.row_of(n)) * a.n + j], value);
      }
    }
    __syncthreads();
  }
}

template <typename S, NoiseLaw law>
__global__ void __launch_bounds__(kBlock) vector(const EggrollVector a) {
  using T = opmath_t<S>;
  const auto* cells = core::load_cells<law>();
  const int64_t pair = a.members.first_pair() + blockIdx.x / a.blocks();
  const int64_t from = blockIdx.x % a.blocks() * kEggrollColumns;
  const int64_t to = from + kEggrollColumns < a.numel ? from + kEggrollColumns : a.numel;
  const PhiloxStream stream = a.members.stream(pair, a.ordinal, PhiloxTag::kEsVector);
  core::for_each_noise<law>(stream, from, to, cells, [&](int64_t q, float noise) {
    const T theta = core::load(static_cast<const S*>(a.theta)[q]);
    for (int64_t i = a.members.first(pair); i < a.members.last(pair); ++i) {
      const T weight = static_cast<T>(a.members.sign(i)) * static_cast<T>(a.sigma);
      core::store(static_cast<S*>(a.out)[i * a.numel + q], perturbed(theta, weight, core::noise_as<S>(noise)));
    }
  });
}

template <typename S, NoiseLaw law>
__global__ void __launch_bounds__(kBlock) factors(const EggrollFactors a, int64_t chunks) {
  using T = opmath_t<S>;
  const auto* cells = core::load_cells<law>();
  const int64_t pair = blockIdx.x / chunks, elements = a.rows * a.rank, origin = a.row_begin * a.rank;
  const int64_t from = blockIdx.x % chunks * kEggrollColumns;
  const int64_t to = from + kEggrollColumns < elements ? from + kEggrollColumns : elements;
  const T scale = a.coeff == nullptr ? T(1) : static_cast<const T*>(a.coeff)[pair];
  PhiloxStream stream = a.stream;
  stream.stream += static_cast<uint32_t>(pair);
  core::for_each_noise<law>(stream, origin + from, origin + to, cells, [&](int64_t q, float noise) {
    const int64_t row = (q - origin) / a.rank, column = (q - origin) % a.rank;
    static_cast<T*>(a.out)[(pair * a.rank + column) * a.rows + row] = scale * core::noise_as<S>(noise);
  });
}

// launch(storage type, law, number of blocks as unsigned).
template <typename Launch>
void launch(core::DType type, NoiseLaw law, int64_t blocks, const char* what, const Launch& run) {
  if (blocks == 0) return;
  core::dispatch_dtype(type, [&](auto storage) {
    core::dispatch_noise(law, [&](auto constant) { run(storage, constant, static_cast<unsigned>(blocks)); });
  });
  core::check_launch(what);
}

int64_t tasks(const EggrollMembers& members, int64_t rows, int64_t step) {
  return rows == 0 ? 0 : members.pairs() * ((rows + step - 1) / step);
}

double factor_scale(double sigma, int64_t rank) { return sigma / std::sqrt(static_cast<double>(rank)); }

}  // namespace

void eggroll_layer_cuda(const EggrollLayer& a, core::DType type, void* stream) {
  const int64_t rows = tile_rows(a.rank, a.rows);
  launch(type, a.law, tasks(a.members, a.rows, rows), "eggroll_linear", [&](auto storage, auto law, unsigned blocks) {
    using S = decltype(storage);
    const auto scale = static_cast<opmath_t<S>>(factor_scale(a.sigma, a.rank));
    layer<S, law()><<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(a, scale, rows);
  });
}

void eggroll_rows_cuda(const EggrollRowsOf& a, core::DType type, void* stream) {
  const int64_t rows = tile_rows(a.rank, a.rows);
  launch(type, a.law, tasks(a.members, a.rows, rows), "eggroll_embedding",
         [&](auto storage, auto law, unsigned blocks) {
           using S = decltype(storage);
           const auto scale = static_cast<opmath_t<S>>(factor_scale(a.sigma, a.rank));
           rows_of<S, law()><<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(a, scale, rows);
         });
}

void eggroll_vector_cuda(const EggrollVector& a, core::DType type, void* stream) {
  launch(type, a.law, a.tasks(), "eggroll_vector", [&](auto storage, auto law, unsigned blocks) {
    vector<decltype(storage), law()><<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
}

void eggroll_factors_cuda(const EggrollFactors& a, core::DType type, void* stream) {
  const int64_t chunks = (a.rows * a.rank + kEggrollColumns - 1) / kEggrollColumns;
  launch(type, a.law, a.pairs * chunks, "eggroll_update", [&](auto storage, auto law, unsigned blocks) {
    factors<decltype(storage), law()><<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(a, chunks);
  });
}

}  // namespace torch_ext::kernels
