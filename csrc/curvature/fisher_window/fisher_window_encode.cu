// Gathering and encoding of a row on CUDA.
#include "core/multi_tensor_cuda.cuh"
#include "curvature/fisher_window/fisher_window_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kTile / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ T element(const void* data, core::DType type, int64_t i) {
  switch (type) {
    case core::DType::kDouble:
      return static_cast<T>(static_cast<const double*>(data)[i]);
    case core::DType::kBFloat16:
      return static_cast<T>(core::load(static_cast<const core::BFloat16*>(data)[i]));
    case core::DType::kHalf:
      return static_cast<T>(core::load(static_cast<const core::Half*>(data)[i]));
    default:
      return static_cast<T>(static_cast<const float*>(data)[i]);
  }
}

template <typename T>
__device__ T row_value(const RowSegment& s, double factor, int64_t i) {
  const T grad = element<T>(s.grad, s.grad_type, i);
  if (s.weight_decay == 0) return row_element(grad, static_cast<T>(factor));
  return row_element(grad, static_cast<T>(factor), element<T>(s.param, s.param_type, i),
                     static_cast<T>(s.weight_decay));
}

template <typename R>
struct GatherChunk {
  R* row;
  const float* grad_scale;
  double sign;
  __device__ int64_t chunk(const RowSegment&) const { return core::kThreads * 4; }
  __device__ void operator()(const RowSegment& s, int64_t begin, int64_t end) const {
    const double factor = grad_scale == nullptr ? sign : sign / static_cast<double>(*grad_scale);
    const bool wide = s.grad_type == core::DType::kDouble || s.param_type == core::DType::kDouble;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      row[s.begin + i] =
          wide ? static_cast<R>(row_value<double>(s, factor, i)) : static_cast<R>(row_value<float>(s, factor, i));
    }
  }
};

// Largest over the threads of a scale block.
__device__ uint32_t largest_of_block(uint32_t bits, uint32_t* shared) {
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, half);
    bits = other > bits ? other : bits;
  }
  constexpr int kPerBlock = kScaleBlock / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) shared[warp] = bits;
  __syncthreads();
  uint32_t largest = 0;
  for (int k = warp / kPerBlock * kPerBlock; k < (warp / kPerBlock + 1) * kPerBlock; ++k) {
    largest = shared[k] > largest ? shared[k] : largest;
  }
  return largest;
}

// Threads before this one for which `flag` holds; two barriers.
__device__ int count_before(bool flag, int* shared) {
  const unsigned mask = __ballot_sync(kAllLanes, flag);
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x) / kWarp;
  __syncthreads();
  if (lane == 0) shared[warp] = __popc(mask);
  __syncthreads();
  int before = __popc(mask & ((1u << lane) - 1));
  for (int k = 0; k < warp; ++k) before += shared[k];
  return before;
}

// True for the `kept` threads of largest magnitude, of equal ones the first; place = its rank among them by index.
__device__ bool kept_of_tile(uint32_t bits, int64_t kept, int* place, int* shared) {
  uint32_t bound = 0;
  for (uint32_t bit = uint32_t{1} << 30; bit != 0; bit >>= 1) {
    if (__syncthreads_count(static_cast<int>(bits >= (bound | bit))) >= kept) bound |= bit;
  }
  const int64_t above = __syncthreads_count(static_cast<int>(bits > bound));
  const int64_t earlier_ties = count_before(bits == bound, shared);  // barriers inside: for every thread
  const bool keep = bits > bound || (bits == bound && earlier_ties < kept - above);
  *place = count_before(keep, shared);
  return keep;
}

// One block of kTile threads per tile.
__global__ void __launch_bounds__(kTile) encode(WindowView w, const void* row) {
  __shared__ uint32_t shared[kWarps];
  const int64_t tile = blockIdx.x, column = threadIdx.x, at = tile * kTile + column;
  const int64_t place = tile * w.slots + w.ring[kRingNext];
  if (w.format == WindowFormat::kDouble) {
    static_cast<double*>(w.rows)[place * kTile + column] = static_cast<const double*>(row)[at];
    return;
  }
  float x = static_cast<const float*>(row)[at], stored = x;
  const int64_t half = w.tiles * kTile, now = w.ring[kRingTotal] % 2;
  if (w.error != nullptr) x = w.error[now * half + at] + x;
  if (w.format == WindowFormat::kFloat) {
    static_cast<float*>(w.rows)[place * kTile + column] = x;
  } else if (w.format == WindowFormat::kBFloat16) {
    core::BFloat16 value;
    core::store(value, x);
    static_cast<core::BFloat16*>(w.rows)[place * kTile + column] = value;
    stored = core::load(value);
  } else if (w.format == WindowFormat::kInt8) {
    const float scale = int8_scale(largest_of_block(magnitude_bits(x), shared));
    const int32_t code = int8_code(x, scale);
    static_cast<int8_t*>(w.rows)[place * kTile + column] = static_cast<int8_t>(code);
    if (column % kScaleBlock == 0) w.scales[place * kScales + column / kScaleBlock] = scale;
    stored = static_cast<float>(code) * scale;
  } else {
    int rank = 0;
    const bool keep = kept_of_tile(magnitude_bits(x), w.kept, &rank, reinterpret_cast<int*>(shared));
    stored = 0;
    if (keep) {
      core::BFloat16 value;
      core::store(value, x);
      static_cast<core::BFloat16*>(w.rows)[place * w.kept + rank] = value;
      w.indices[place * w.kept + rank] = static_cast<int16_t>(column);
      stored = core::load(value);
    }
  }
  if (w.error != nullptr) w.error[(1 - now) * half + at] = x - stored;
}

}  // namespace

void window_gather_cuda(const std::vector<RowSegment>& segments, double sign, const float* grad_scale, bool wide,
                        int64_t padded, void* row, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  const size_t bytes = static_cast<size_t>(padded) * (wide ? sizeof(double) : sizeof(float));
  if (cudaMemsetAsync(row, 0, bytes, cuda_stream) != cudaSuccess) core::check_launch("fisher_window_gather");
  std::vector<RowSegment> present;
  std::vector<core::Split> splits;
  constexpr int64_t kPiece = core::kThreads * 4;
  for (const RowSegment& s : segments) {
    if (s.grad == nullptr) continue;
    present.push_back(s);
    splits.push_back({1, kPiece, (s.numel + kPiece - 1) / kPiece});
  }
  if (wide) {
    core::launch_chunks(present, splits, GatherChunk<double>{static_cast<double*>(row), grad_scale, sign}, cuda_stream,
                        "fisher_window_gather");
  } else {
    core::launch_chunks(present, splits, GatherChunk<float>{static_cast<float*>(row), grad_scale, sign}, cuda_stream,
                        "fisher_window_gather");
  }
}

void window_encode_cuda(const WindowView& window, const void* row, void* stream) {
  encode<<<static_cast<unsigned>(window.tiles), kTile, 0, static_cast<cudaStream_t>(stream)>>>(window, row);
  core::check_launch("fisher_window_encode");
}

}  // namespace torch_ext::kernels
