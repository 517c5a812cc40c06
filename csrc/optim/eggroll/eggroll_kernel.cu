#include <cmath>

#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "optim/eggroll/eggroll_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// A warp's sum in the shape of core/block_reduce.h; every lane gets the total.
struct WarpSum {
  template <typename Value>
  __device__ double operator()(int64_t n, const Value& value) const {
    const int lane = static_cast<int>(threadIdx.x % core::kLanes);
    double total = 0;
    if (n < core::kLanes) return core::sum_short(n, value);
    for (int64_t segment = 0; segment < n; segment += core::kSegment) {
      const int64_t end = segment + core::kSegment < n ? segment + core::kSegment : n;
      double sum = 0;
      for (int64_t i = segment + lane; i < end; i += core::kLanes) sum += value(i);
      for (int half = core::kLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAll, sum, half);
      total += sum;
    }
    return __shfl_sync(kAll, total, 0);
  }
};

__global__ void range_kernel(EggrollShapeArgs a, const double* values, EggrollStats* stats) {
  const int lane = static_cast<int>(threadIdx.x);
  double worst = HUGE_VAL, best = -HUGE_VAL, nonfinite = 0;
  for (int64_t i = lane; i < a.population; i += core::kLanes) {
    const double f = a.sign * values[i];
    if (!eggroll_finite(f)) {
      nonfinite += 1;
      continue;
    }
    worst = f < worst ? f : worst;
    best = f > best ? f : best;
  }
  for (int half = core::kLanes / 2; half > 0; half /= 2) {
    const double other_worst = __shfl_down_sync(kAll, worst, half), other_best = __shfl_down_sync(kAll, best, half);
    nonfinite += __shfl_down_sync(kAll, nonfinite, half);
    worst = other_worst < worst ? other_worst : worst;
    best = other_best > best ? other_best : best;
  }
  const double total = WarpSum()(a.population, [&](int64_t i) { return values[i]; });
  if (lane != 0) return;
  stats->worst = worst;
  stats->best = best;
  stats->nonfinite = nonfinite;
  stats->total = total;
}

// One warp a group, and one more for what all have in common; every lane computes and writes the same numbers.
__global__ void stats_kernel(EggrollShapeArgs a, EggrollShapeData d, int64_t groups) {
  if (blockIdx.x < groups) {
    eggroll_group_stats(a, d, blockIdx.x, WarpSum());
  } else {
    eggroll_overall_stats(a, d, WarpSum());
  }
}

__global__ void coefficient_kernel(EggrollShapeArgs a, EggrollShapeData d) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p < d.coefficients_n) d.coefficients[p] = eggroll_coefficient(a, *d.stats, d.values, d.group, d.sorted, p);
}

template <typename S>
struct StepChunk {
  using T = core::opmath_t<S>;
  EggrollStepArgs args;
  __device__ int64_t chunk(const EggrollTensor&) const { return core::kChunk; }
  __device__ void operator()(const EggrollTensor& t, int64_t begin, int64_t end) const {
    if (*args.nonfinite != 0) return;
    const EggrollStep<T> f{static_cast<T>(args.lr), static_cast<T>(args.momentum), static_cast<T>(args.weight_decay)};
    auto* param = static_cast<S*>(t.param);
    const auto* grad = static_cast<const T*>(t.grad);
    auto* buffer = static_cast<T*>(t.buffer);
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const T p = core::load(param[i]);
      T b;
      if (buffer != nullptr) {
        b = f.buffer(buffer[i], grad[i], p);
        buffer[i] = b;
      } else {
        b = f.decayed(grad[i], p);
      }
      core::store(param[i], f.parameter(p, b));
    }
  }
};

struct CountStep {
  const float* nonfinite;
  __device__ int64_t chunk(const EggrollTensor& t) const { return t.numel; }
  __device__ void operator()(const EggrollTensor& t, int64_t, int64_t) const {
    if (threadIdx.x == 0 && *nonfinite == 0) *t.step += 1;
  }
};

}  // namespace

void eggroll_range_cuda(const EggrollShapeArgs& args, const double* values, EggrollStats* stats, void* stream) {
  range_kernel<<<1, core::kLanes, 0, static_cast<cudaStream_t>(stream)>>>(args, values, stats);
  core::check_launch("eggroll_shape");
}

void eggroll_shape_cuda(const EggrollShapeArgs& args, const EggrollShapeData& data, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t groups = eggroll_has_groups(args) ? args.population / args.group : 0;
  stats_kernel<<<static_cast<unsigned>(groups + 1), core::kLanes, 0, cuda_stream>>>(args, data, groups);
  core::check_launch("eggroll_shape");
  const auto blocks = static_cast<unsigned>((data.coefficients_n + core::kThreads - 1) / core::kThreads);
  coefficient_kernel<<<blocks, core::kThreads, 0, cuda_stream>>>(args, data);
  core::check_launch("eggroll_shape");
}

void eggroll_step_cuda(const std::vector<EggrollTensor>& tensors, const EggrollStepArgs& args, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  std::vector<core::Split> splits, whole;
  for (const EggrollTensor& t : tensors) {
    splits.push_back(core::Split::of(t.numel, 1));
    whole.push_back({1, t.numel, 1});
  }
  core::launch_chunks(tensors, whole, CountStep{args.nonfinite}, cuda_stream, "eggroll_step counters");
  core::dispatch_dtype(args.type, [&](auto storage) {
    core::launch_chunks(tensors, splits, StepChunk<decltype(storage)>{args}, cuda_stream, "eggroll_step");
  });
}

}  // namespace torch_ext::kernels
