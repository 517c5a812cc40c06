#include "core/multi_tensor_cuda.cuh"
#include "ops/philox4x32/philox4x32_kernel.h"

namespace torch_ext::kernels {
namespace {

__global__ void philox_rows(const int64_t* counter, const int64_t* key, int64_t* out, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) philox4x32_row(counter + 4 * row, key + 2 * row, out + 4 * row);
}

}  // namespace

void philox4x32_cuda(const int64_t* counter, const int64_t* key, int64_t* out, int64_t rows, void* stream) {
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + core::kThreads - 1) / core::kThreads);
  philox_rows<<<blocks, core::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(counter, key, out, rows);
  core::check_launch("philox4x32");
}

}  // namespace torch_ext::kernels
