#include "core/dtype_dispatch.h"
#include "core/list_kernel.h"
#include "core/multi_tensor_cuda.cuh"

namespace torch_ext::kernels {
namespace {

template <typename S>
struct NonfiniteChunk {
  float* flag;
  __device__ int64_t chunk(const ConstTensor&) const { return core::kChunk; }
  __device__ void operator()(const ConstTensor& t, int64_t begin, int64_t end) const {
    const auto* x = static_cast<const S*>(t.data);
    bool found = false;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) found = found || is_nonfinite(x[i]);
    if (found) *flag = 1;  // every writer stores the same value
  }
};

template <typename S>
struct AccumulateChunk {
  using T = core::opmath_t<S>;
  T weight;
  __device__ int64_t chunk(const AccumulateTensor&) const { return core::kChunk; }
  __device__ void operator()(const AccumulateTensor& t, int64_t begin, int64_t end) const {
    auto* sum = static_cast<T*>(t.sum);
    const auto* x = static_cast<const S*>(t.x);
    const auto* sign = static_cast<const S*>(t.sign);
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      sum[i] = accumulated(sum[i], x[i], sign == nullptr ? T(1) : core::load(sign[i]), weight);
    }
  }
};

template <typename Tensor>
std::vector<core::Split> elementwise_splits(const std::vector<Tensor>& tensors) {
  std::vector<core::Split> splits;
  for (const Tensor& t : tensors) splits.push_back(core::Split::of(t.numel, 1));
  return splits;
}

}  // namespace

void has_nonfinite_cuda(const std::vector<ConstTensor>& tensors, core::DType type, float* flag, void* stream) {
  core::dispatch_dtype(type, [&](auto storage) {
    core::launch_chunks(tensors, elementwise_splits(tensors), NonfiniteChunk<decltype(storage)>{flag},
                        static_cast<cudaStream_t>(stream), "has_nonfinite");
  });
}

void accumulate_cuda(const std::vector<AccumulateTensor>& tensors, core::DType type, double weight, void* stream) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    core::launch_chunks(tensors, elementwise_splits(tensors),
                        AccumulateChunk<S>{static_cast<core::opmath_t<S>>(weight)}, static_cast<cudaStream_t>(stream),
                        "accumulate");
  });
}

}  // namespace torch_ext::kernels
