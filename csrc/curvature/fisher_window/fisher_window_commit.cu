// The m x m part on CUDA: one cooperative launch, so that the decision to make the inverse anew never leaves the
// device.
#include <cooperative_groups.h>

#include <algorithm>

#include "core/multi_tensor_cuda.cuh"
#include "curvature/fisher_window/fisher_window_inverse.h"

namespace torch_ext::kernels {
namespace {

constexpr int kGridThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// A worker is a warp; see fisher_window_inverse.h.
struct GridExec {
  int64_t warp, warps;
  int lane;

  __device__ GridExec()
      : warp((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / core::kLanes),
        warps(static_cast<int64_t>(gridDim.x) * blockDim.x / core::kLanes),
        lane(static_cast<int>(threadIdx.x % core::kLanes)) {}

  template <typename Body>
  __device__ void rows(int64_t n, const Body& body) const {
    for (int64_t i = warp; i < n; i += warps) body(i);
  }
  template <typename Body>
  __device__ void columns(int64_t n, const Body& body) const {
    for (int64_t j = lane; j < n; j += core::kLanes) body(j);
  }
  template <typename Value>
  __device__ double dot(int64_t n, const Value& value) const {
    if (n < core::kLanes) return core::sum_short(n, value);
    double total = 0;
    for (int64_t segment = 0; segment < n; segment += core::kSegment) {
      const int64_t end = segment + core::kSegment < n ? segment + core::kSegment : n;
      double sum = 0;
      for (int64_t i = segment + lane; i < end; i += core::kLanes) sum += value(i);
      for (int half = core::kLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
      total += sum;
    }
    return __shfl_sync(kAllLanes, total, 0);
  }
  template <typename Test>
  __device__ bool any(int64_t n, const Test& test) const {
    bool found = false;
    for (int64_t i = lane; i < n; i += core::kLanes) found = found || test(i);
    return __any_sync(kAllLanes, found) != 0;
  }
  template <typename Value>
  __device__ double most(int64_t n, const Value& value) const {
    double largest = 0;
    for (int64_t i = lane; i < n; i += core::kLanes) {
      const double x = value(i);
      largest = x <= largest ? largest : x >= 0 ? x : HUGE_VAL;
    }
    for (int half = core::kLanes / 2; half > 0; half /= 2) {
      largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, half));
    }
    return largest;
  }
  __device__ bool lead() const { return lane == 0; }
  __device__ bool first() const { return warp == 0 && lane == 0; }
  __device__ void sync() const { cooperative_groups::this_grid().sync(); }
};

__global__ void __launch_bounds__(kGridThreads) commit(CommitTensors t, CommitArgs args, double* scratch) {
  InverseWindow<GridExec>(GridExec(), t, args, scratch).commit();
}

__global__ void __launch_bounds__(kGridThreads)
    solve(CommitTensors t, CommitArgs args, const double* right_side, double* solution, double* scratch) {
  InverseWindow<GridExec>(GridExec(), t, args, scratch).solve_any(right_side, solution);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// As many blocks as there are rows for their warps, but no more than run at once: they wait for each other.
template <typename Kernel>
void launch_together(Kernel* kernel, int64_t rows, void** arguments, void* stream, const char* what) {
  int device = 0, processors = 0, per_processor = 0;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kGridThreads, 0), what);
  constexpr int64_t kWarps = kGridThreads / core::kLanes;
  const int64_t blocks = std::min<int64_t>((rows + kWarps - 1) / kWarps, int64_t{processors} * per_processor);
  check(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(std::max<int64_t>(1, blocks))),
                                    dim3(kGridThreads), arguments, 0, static_cast<cudaStream_t>(stream)),
        what);
}

}  // namespace

void window_commit_cuda(const CommitTensors& tensors, const CommitArgs& arguments, double* scratch, void* stream) {
  CommitTensors t = tensors;
  CommitArgs args = arguments;
  void* list[] = {&t, &args, &scratch};
  launch_together(commit, args.slots, list, stream, "fisher_window_commit");
}

void window_solve_cuda(const CommitTensors& tensors, const CommitArgs& arguments, const double* right_side,
                       double* solution, double* scratch, void* stream) {
  CommitTensors t = tensors;
  CommitArgs args = arguments;
  void* list[] = {&t, &args, &right_side, &solution, &scratch};
  launch_together(solve, args.slots, list, stream, "fisher_window_solve");
}

}  // namespace torch_ext::kernels
