#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "core/noise.h"
#include "optim/mezo/mezo_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = core::kThreads / 32;

__device__ constexpr core::GaussianTable kCells = core::make_gaussian_table();

__device__ float noise_of(const core::PhiloxStream& stream, int64_t element) {
  return core::noise_at<core::NoiseLaw::kGaussian>(stream, element, kCells.cell);
}

// Number of this thread's flag among the flags that are set in the block, in the order of the threads, behind `base`;
// advances `base` by their sum. All threads of the block call it.
__device__ int64_t rank_in_block(bool flag, int64_t& base) {
  __shared__ int before[kWarps + 1];
  const unsigned ballot = __ballot_sync(kAll, flag);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  __syncthreads();
  if (lane == 0) before[warp + 1] = __popc(ballot);
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0;
    for (int w = 0; w < kWarps; ++w) before[w + 1] += before[w];
  }
  __syncthreads();
  const int64_t rank = base + before[warp] + __popc(ballot & ((1u << lane) - 1));
  base += before[kWarps];
  return rank;
}

template <typename S>
struct Mark {
  using T = core::opmath_t<S>;
  __device__ int64_t chunk(const MezoTensor&) const { return core::kChunk; }
  __device__ void operator()(const MezoTensor& t, int64_t begin, int64_t end) const {
    const auto* param = static_cast<const S*>(t.param);
    const T scale = static_cast<T>(t.scale);
    int count = 0;
    for (int64_t first = begin; first < end; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      bool lost = false;
      if (i < end) {
        const T z = static_cast<T>(noise_of(t.noise, i));
        lost = MezoStep<S>::lost(param[i], MezoStep<S>::shifted(param[i], scale, z), scale, z);
      }
      const unsigned word = __ballot_sync(kAll, lost);
      if (threadIdx.x % 32 == 0 && i < end) t.mask[i / 32] = word;
      count += __syncthreads_count(lost);
    }
    if (threadIdx.x == 0) t.counts[begin / core::kChunk] = count;
  }
};

template <typename S, bool kRestore>
struct Shift {
  using T = core::opmath_t<S>;
  __device__ int64_t chunk(const MezoTensor&) const { return core::kChunk; }
  __device__ void operator()(const MezoTensor& t, int64_t begin, int64_t end) const {
    auto* param = static_cast<S*>(t.param);
    auto* kept = static_cast<S*>(t.kept);
    const T scale = static_cast<T>(kRestore ? -t.scale : t.scale);
    int64_t base = t.offsets[begin / core::kChunk];
    for (int64_t first = begin; first < end; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const bool held = i < end && (t.mask[i / 32] >> (i % 32) & 1u) != 0;
      const int64_t number = rank_in_block(held, base);
      if (i >= end) continue;
      if (kRestore && held) {
        param[i] = kept[number];
        continue;
      }
      if (held) kept[number] = param[i];
      param[i] = MezoStep<S>::shifted(param[i], scale, static_cast<T>(noise_of(t.noise, i)));
    }
  }
};

template <typename S>
struct Update {
  using T = core::opmath_t<S>;
  __device__ int64_t chunk(const MezoUpdate&) const { return core::kChunk; }
  __device__ void operator()(const MezoUpdate& t, int64_t begin, int64_t end) const {
    const double slope = *t.slope;
    if (!(slope - slope == 0)) return;
    auto* param = static_cast<S*>(t.param);
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      param[i] = MezoStep<S>::updated(param[i], static_cast<T>(slope), static_cast<T>(noise_of(t.noise, i)),
                                      static_cast<T>(t.lr), static_cast<T>(t.weight_decay));
    }
    if (begin == 0 && threadIdx.x == 0) *t.step += 1;
  }
};

template <template <typename> class Body, typename Descriptor>
void launch(const std::vector<Descriptor>& tensors, core::DType type, void* stream, const char* what) {
  std::vector<core::Split> splits;
  for (const Descriptor& t : tensors) splits.push_back(core::Split::of(t.numel, 1));
  core::dispatch_dtype(type, [&](auto storage) {
    core::launch_chunks(tensors, splits, Body<decltype(storage)>{}, static_cast<cudaStream_t>(stream), what);
  });
}

template <typename S>
using Perturb = Shift<S, false>;
template <typename S>
using Restore = Shift<S, true>;

}  // namespace

void mezo_mark_cuda(const std::vector<MezoTensor>& tensors, core::DType type, void* stream) {
  launch<Mark>(tensors, type, stream, "mezo_mark");
}
void mezo_shift_cuda(const std::vector<MezoTensor>& tensors, core::DType type, void* stream) {
  launch<Perturb>(tensors, type, stream, "mezo_shift");
}
void mezo_restore_cuda(const std::vector<MezoTensor>& tensors, core::DType type, void* stream) {
  launch<Restore>(tensors, type, stream, "mezo_restore");
}
void mezo_update_cuda(const std::vector<MezoUpdate>& tensors, core::DType type, void* stream) {
  launch<Update>(tensors, type, stream, "mezo_update");
}

}  // namespace torch_ext::kernels
