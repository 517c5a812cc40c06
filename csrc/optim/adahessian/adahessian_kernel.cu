#include "core/block_reduce.h"
#include "core/multi_tensor_cuda.cuh"
#include "optim/adahessian/adahessian_kernel.h"

namespace torch_ext::kernels {
namespace {

using core::load;
using core::opmath_t;
using core::store;

// A warp's sum of one block, in the shape of core/block_reduce.h; every lane gets lane 0's total.
template <typename G>
__device__ double warp_block_sum(const G* curvature, int64_t size, bool absolute) {
  const int lane = static_cast<int>(threadIdx.x % core::kLanes);
  double total = 0;
  for (int64_t segment = 0; segment < size; segment += core::kSegment) {
    const int64_t end = segment + core::kSegment < size ? segment + core::kSegment : size;
    double sum = 0;
    for (int64_t i = segment + lane; i < end; i += core::kLanes) {
      const auto x = static_cast<double>(load(curvature[i]));
      sum += absolute ? core::absolute(x) : x;
    }
    for (int half = core::kLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
    total += sum;
  }
  return __shfl_sync(0xffffffffu, total, 0);
}

template <typename S, typename G, Root R>
struct Chunk {
  using T = opmath_t<S>;
  AdaHessianArgs args;

  __device__ int64_t chunk(const AdaHessianTensor& t) const {
    return t.block >= core::kChunk ? t.block : core::kChunk / t.block * t.block;
  }

  __device__ void operator()(const AdaHessianTensor& t, int64_t begin, int64_t end) const {
    if (adahessian_waits(args, t)) return;
    const auto f = adahessian_scalars<T, R>(args, t.bias_products);
    auto* second = static_cast<T*>(t.exp_hessian_diag_sq);
    if (t.block > 1 && args.refresh) {
      refresh_blocks(t, f, second, begin, end);
      __syncthreads();
    }
    auto* param = static_cast<S*>(t.param);
    const auto* grad = static_cast<const G*>(t.grad);
    auto* exp_avg = static_cast<T*>(t.exp_avg);
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      T v;
      if (t.block > 1) {
        v = second[i / t.block];
      } else {
        v = second[i];
        if (args.refresh) {
          v = f.second_moment(v, static_cast<T>(load(static_cast<const G*>(t.curvature)[i])) * f.curvature_scale);
          second[i] = v;
        }
      }
      T p = load(param[i]), m = exp_avg[i];
      f.parameter(p, m, static_cast<T>(load(grad[i])), f.denominator(v));
      exp_avg[i] = m;
      store(param[i], p);
    }
  }

 private:
  // Short blocks take a thread each, longer ones a warp each.
  __device__ void refresh_blocks(const AdaHessianTensor& t, const AdaHessianStep<T, R>& f, T* second, int64_t begin,
                                 int64_t end) const {
    const auto* curvature = static_cast<const G*>(t.curvature);
    const bool per_thread = t.block < core::kLanes;
    const int64_t workers = per_thread ? blockDim.x : blockDim.x / core::kLanes;
    const int64_t worker = per_thread ? threadIdx.x : threadIdx.x / core::kLanes;
    for (int64_t b = begin / t.block + worker; b * t.block < end; b += workers) {
      const G* at = curvature + b * t.block;
      const bool absolute = !args.signed_mean;
      const double sum = per_thread ? core::sum_short(t.block,
                                                      [&](int64_t i) {
                                                        const auto x = static_cast<double>(load(at[i]));
                                                        return absolute ? core::absolute(x) : x;
                                                      })
                                    : warp_block_sum(at, t.block, absolute);
      const T d = static_cast<T>(sum / static_cast<double>(t.block)) * f.curvature_scale;
      if (per_thread || threadIdx.x % core::kLanes == 0) second[b] = f.second_moment(second[b], d);
    }
  }
};

// Counters of all tensors, before their elements read them.
struct Advance {
  AdaHessianArgs args;
  __device__ int64_t chunk(const AdaHessianTensor& t) const { return t.numel; }
  __device__ void operator()(const AdaHessianTensor& t, int64_t, int64_t) const {
    if (threadIdx.x == 0) adahessian_advance(args, t);
  }
};

}  // namespace

void adahessian_step_cuda(const std::vector<AdaHessianTensor>& tensors, const AdaHessianArgs& args, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  std::vector<core::Split> splits, whole;
  for (const AdaHessianTensor& t : tensors) {
    splits.push_back(core::Split::of(t.numel, t.block));
    whole.push_back({1, t.numel, 1});
  }
  core::launch_chunks(tensors, whole, Advance{args}, cuda_stream, "adahessian_step counters");
  adahessian_dispatch(args, [&](auto storage, auto grad, auto root) {
    using Body = Chunk<decltype(storage), decltype(grad), decltype(root)::value>;
    core::launch_chunks(tensors, splits, Body{args}, cuda_stream, "adahessian_step");
  });
}

}  // namespace torch_ext::kernels
