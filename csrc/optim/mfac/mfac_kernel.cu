#include <algorithm>

#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "curvature/fisher_window/fisher_window_device.cuh"
#include "optim/mfac/mfac_kernel.h"

namespace torch_ext::kernels {
namespace {

// Element i of a parameter of storage type S takes its share of u.
template <typename S>
__device__ void write_element(const MfacTensor& t, const MfacStep<core::opmath_t<S>>& f, int64_t i,
                              core::opmath_t<S> u) {
  using T = core::opmath_t<S>;
  if (t.buffer != nullptr) {
    auto* buffer = static_cast<T*>(t.buffer);
    u = f.buffer(buffer[i], u);
    buffer[i] = u;
  }
  S& param = static_cast<S*>(t.param)[i];
  core::store(param, f.parameter(core::load(param), u));
}

template <typename S, typename U>
struct FlatChunk {
  using T = core::opmath_t<S>;
  const U* update;
  const int64_t* ring;
  __device__ int64_t chunk(const MfacTensor&) const { return core::kChunk; }
  __device__ void operator()(const MfacTensor& t, int64_t begin, int64_t end) const {
    if (ring[kRingAccepted] == 0) return;
    const auto f = mfac_scalars<T>(t);
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      write_element<S>(t, f, i, static_cast<T>(update[t.begin + i]));
    }
  }
};

template <typename S, WindowFormat F>
struct FusedChunk {
  using T = core::opmath_t<S>;
  WindowView window;
  const double* coefficients;
  __device__ int64_t chunk(const MfacTensor&) const { return core::kThreads; }
  __device__ void operator()(const MfacTensor& t, int64_t begin, int64_t end) const {
    const int64_t i = begin + threadIdx.x;
    if (window.ring[kRingAccepted] == 0 || i >= end) return;
    using Out = typename Stored<F>::out_type;
    const double u = combined_column<F, typename Stored<F>::run_type>(window, coefficients, t.begin + i);
    write_element<S>(t, mfac_scalars<T>(t), i, static_cast<T>(static_cast<Out>(u)));
  }
};

struct CountStep {
  const int64_t* ring;
  __device__ int64_t chunk(const MfacTensor& t) const { return t.numel; }
  __device__ void operator()(const MfacTensor& t, int64_t, int64_t) const {
    if (threadIdx.x == 0 && ring[kRingAccepted] != 0) *t.step += 1;
  }
};

std::vector<core::Split> splits_of(const std::vector<MfacTensor>& tensors, int64_t chunk) {
  std::vector<core::Split> splits;
  for (const MfacTensor& t : tensors) splits.push_back({1, chunk, (t.numel + chunk - 1) / chunk});
  return splits;
}

// body(storage, tensors of that storage type) for each type that occurs.
template <typename Body>
void by_type(const std::vector<MfacTensor>& tensors, const Body& body) {
  for (const core::DType type :
       {core::DType::kFloat, core::DType::kDouble, core::DType::kBFloat16, core::DType::kHalf}) {
    std::vector<MfacTensor> some;
    std::copy_if(tensors.begin(), tensors.end(), std::back_inserter(some),
                 [type](const MfacTensor& t) { return t.type == type; });
    if (some.empty()) continue;
    core::dispatch_dtype(type, [&](auto storage) { body(storage, some); });
  }
}

void count_steps(const std::vector<MfacTensor>& tensors, const int64_t* ring, cudaStream_t stream) {
  std::vector<core::Split> whole;
  for (const MfacTensor& t : tensors) whole.push_back({1, std::max<int64_t>(1, t.numel), 1});
  core::launch_chunks(tensors, whole, CountStep{ring}, stream, "mfac_update counters");
}

}  // namespace

void mfac_update_cuda(const std::vector<MfacTensor>& tensors, const void* update, bool wide, const int64_t* ring,
                      void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  by_type(tensors, [&](auto storage, const std::vector<MfacTensor>& some) {
    using S = decltype(storage);
    const auto splits = splits_of(some, core::kChunk);
    if (wide) {
      core::launch_chunks(some, splits, FlatChunk<S, double>{static_cast<const double*>(update), ring}, cuda_stream,
                          "mfac_update");
    } else {
      core::launch_chunks(some, splits, FlatChunk<S, float>{static_cast<const float*>(update), ring}, cuda_stream,
                          "mfac_update");
    }
  });
  count_steps(tensors, ring, cuda_stream);
}

void mfac_fused_cuda(const std::vector<MfacTensor>& tensors, const WindowView& window, const double* coefficients,
                     void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  by_type(tensors, [&](auto storage, const std::vector<MfacTensor>& some) {
    using S = decltype(storage);
    dispatch_dense(window.format, [&](auto format) {
      core::launch_chunks(some, splits_of(some, core::kThreads),
                          FusedChunk<S, decltype(format)::value>{window, coefficients}, cuda_stream, "mfac_update");
    });
  });
  count_steps(tensors, window.ring, cuda_stream);
}

}  // namespace torch_ext::kernels
