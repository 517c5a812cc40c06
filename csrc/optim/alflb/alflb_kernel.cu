#include "core/block_reduce.h"
#include "core/multi_tensor_cuda.cuh"
#include "optim/alflb/alflb_kernel.h"

namespace torch_ext::kernels {
namespace {

// The sum of value(0) ... value(size - 1) in the shape of core/block_reduce.h, by the first warp; all threads get it.
template <typename Value>
__device__ double block_sum(int64_t size, double* shared, const Value& value) {
  __syncthreads();  // what `value` reads is written, the last sum is read
  if (threadIdx.x < core::kLanes) {
    double total = 0;
    if (size < core::kLanes) {
      if (threadIdx.x == 0) total = core::sum_short(size, value);
    } else {
      for (int64_t segment = 0; segment < size; segment += core::kSegment) {
        const int64_t end = segment + core::kSegment < size ? segment + core::kSegment : size;
        double sum = 0;
        for (int64_t i = segment + threadIdx.x; i < end; i += core::kLanes) sum += value(i);
        for (int half = core::kLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
        total += sum;
      }
    }
    if (threadIdx.x == 0) *shared = total;
  }
  __syncthreads();
  return *shared;
}

// One thread block updates one layer.
struct AlflbChunk {
  AlflbArgs args;

  __device__ int64_t chunk(const AlflbLayer& t) const { return t.numel; }

  __device__ void operator()(const AlflbLayer& t, int64_t, int64_t) const {
    __shared__ unsigned long long total;
    __shared__ double sum;
    if (*args.nonfinite != 0) return clear(t);
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    unsigned long long part = 0;
    for (int64_t e = threadIdx.x; e < t.numel; e += blockDim.x) part += static_cast<unsigned long long>(t.load[e]);
    atomicAdd(&total, part);  // of integers: any order gives the same
    __syncthreads();
    if (total == 0) return;
    const AlflbStep f(args, *t.updates + 1, static_cast<int64_t>(total), t.numel, t.top_k);
    if (args.rule == AlflbRule::kQuantile || f.rate != 0) move_biases(t, f, &sum);
    __syncthreads();
    if (threadIdx.x == 0) {
      *t.updates += 1;
      *t.step += 1;
      if (t.bounds != nullptr) set_bounds(t);
    }
    for (int64_t e = threadIdx.x; e < t.numel; e += blockDim.x) t.last_load[e] = t.load[e];
    clear(t);
  }

  __device__ void move_biases(const AlflbLayer& t, const AlflbStep& f, double* sum) const {
    const auto move = [&](int64_t e, double by) {
      t.bias[e] = static_cast<float>(static_cast<double>(t.bias[e]) + by);
    };
    const auto each = [&](const auto& body) {
      for (int64_t e = threadIdx.x; e < t.numel; e += blockDim.x) body(e);
    };
    const auto experts = static_cast<double>(t.numel);
    if (args.rule == AlflbRule::kSign) {
      each([&](int64_t e) { move(e, f.sign(t.load[e])); });
    } else if (args.rule == AlflbRule::kProportional) {
      each([&](int64_t e) { move(e, f.proportional(t.load[e])); });
    } else if (args.rule == AlflbRule::kMomentum) {
      const double mean = block_sum(t.numel, sum, [&](int64_t e) { return f.bounded(t.load[e]); }) / experts;
      each([&](int64_t e) {
        t.momentum[e] = static_cast<float>(f.averaged(t.momentum[e], f.bounded(t.load[e]) - mean));
        move(e, t.momentum[e]);
      });
    } else {
      each([&](int64_t e) {
        t.bias[e] =
            static_cast<float>(f.quantile(t.histogram + e * t.bins, t.bins, t.bounds[0], t.bounds[1], t.bias[e]));
      });
    }
    if (!args.center) return;
    const double mean = block_sum(t.numel, sum, [&](int64_t e) { return static_cast<double>(t.bias[e]); }) / experts;
    each([&](int64_t e) { move(e, -mean); });
  }

  __device__ void set_bounds(const AlflbLayer& t) const {
    float low = t.bias[0], high = t.bias[0];
    for (int64_t e = 1; e < t.numel; ++e) {
      low = t.bias[e] < low ? t.bias[e] : low;
      high = t.bias[e] > high ? t.bias[e] : high;
    }
    t.bounds[0] = low - 1;
    t.bounds[1] = high + 1;
  }

  __device__ void clear(const AlflbLayer& t) const {
    for (int64_t e = threadIdx.x; e < t.numel; e += blockDim.x) t.load[e] = 0;
    if (t.histogram == nullptr) return;
    for (int64_t i = threadIdx.x; i < t.numel * t.bins; i += blockDim.x) t.histogram[i] = 0;
  }
};

}  // namespace

void alflb_update_cuda(const std::vector<AlflbLayer>& layers, const AlflbArgs& args, void* stream) {
  std::vector<core::Split> splits;
  for (const AlflbLayer& t : layers) splits.push_back({1, t.numel, 1});
  core::launch_chunks(layers, splits, AlflbChunk{args}, static_cast<cudaStream_t>(stream), "alflb_update_");
}

}  // namespace torch_ext::kernels
