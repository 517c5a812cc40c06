#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "ops/rademacher/rademacher_kernel.h"

namespace torch_ext::kernels {
namespace {

// Four neighbouring elements a thread; the threads of a warp share their block's counter, so Philox costs 1/4 per
// element.
template <typename S>
struct RademacherChunk {
  __device__ int64_t chunk(const RademacherTensor&) const { return core::kChunk; }
  __device__ void operator()(const RademacherTensor& t, int64_t begin, int64_t end) const {
    auto* out = static_cast<S*>(t.out);
    constexpr int64_t kPerThread = 4;
    for (int64_t i = begin + kPerThread * threadIdx.x; i < end; i += kPerThread * blockDim.x) {
      const core::Philox4 block = t.stream.block(static_cast<uint32_t>(i / kSignsPerBlock));
      const uint32_t word = word_of(block, i % kSignsPerBlock / 32);
      for (int64_t k = 0; k < kPerThread && i + k < end; ++k) store_sign(out[i + k], word >> ((i + k) % 32));
    }
  }
};

}  // namespace

void rademacher_cuda(const std::vector<RademacherTensor>& tensors, core::DType type, void* stream) {
  std::vector<core::Split> splits;
  for (const RademacherTensor& t : tensors) splits.push_back(core::Split::of(t.numel, 1));
  core::dispatch_dtype(type, [&](auto storage) {
    core::launch_chunks(tensors, splits, RademacherChunk<decltype(storage)>{}, static_cast<cudaStream_t>(stream),
                        "rademacher");
  });
}

}  // namespace torch_ext::kernels
