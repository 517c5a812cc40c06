#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "core/noise_cuda.cuh"
#include "core/noise_kernel.h"

namespace torch_ext::kernels {
namespace {

using core::NoiseLaw;
using core::opmath_t;

constexpr int kNoiseThreads = 256;
constexpr int64_t kFillChunk = 4096;  // elements of one thread block

template <typename S>
struct RoundedTo {
  S* out;
  __device__ void operator()(int64_t i, float z) const { core::store(out[i], static_cast<opmath_t<S>>(z)); }
};

struct UnitsTo {
  int8_t* out;
  float units;
  __device__ void operator()(int64_t i, float z) const { out[i] = static_cast<int8_t>(static_cast<int>(z * units)); }
};

template <NoiseLaw law, typename Write>
__global__ void __launch_bounds__(kNoiseThreads) noise_fill(const NoiseFill f, int64_t chunks, const Write write) {
  const auto* cells = core::load_cells<law>();
  const int64_t number = blockIdx.x / chunks, from = blockIdx.x % chunks * kFillChunk;
  const int64_t to = from + kFillChunk < f.elements ? from + kFillChunk : f.elements;
  core::PhiloxStream stream = f.stream;
  stream.stream += static_cast<uint32_t>(number);
  core::for_each_noise<law>(stream, f.begin + from, f.begin + to, cells,
                            [&](int64_t q, float z) { write(number * f.elements + (q - f.begin), z); });
}

// A thread keeps the sums of one unit of elements in registers, in the order of the streams.
template <typename S, NoiseLaw law>
__global__ void __launch_bounds__(kNoiseThreads) noise_sum(const NoiseSum s) {
  using T = opmath_t<S>;
  constexpr int64_t kPer = core::kNoisePerThread<law>;
  const auto* cells = core::load_cells<law>();
  const int64_t unit = s.origin / kPer + static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x;
  if (unit * kPer >= s.origin + s.numel) return;
  const auto* coeff = static_cast<const T*>(s.coeff);
  core::PhiloxStream stream = s.stream;
  T total[kPer] = {};
  for (int64_t first = 0; first < s.count; first += kNoiseSumStreams) {
    T block[kPer] = {};
    const int64_t last = first + kNoiseSumStreams < s.count ? first + kNoiseSumStreams : s.count;
    for (int64_t k = first; k < last; ++k, ++stream.stream) {
      const T weight = coeff == nullptr ? T(1) : coeff[k];
      core::noise_unit<law>(stream, unit, cells,
                            [&](int64_t e, float z) { block[e] += weight * core::noise_as<S>(z); });
    }
    for (int64_t e = 0; e < kPer; ++e) total[e] += block[e];
  }
  const T scale = static_cast<T>(s.scale);
  for (int64_t e = 0; e < kPer; ++e) {
    const int64_t i = unit * kPer + e - s.origin;
    if (i < 0 || i >= s.numel) continue;
    if (s.add) {
      S& to = static_cast<S*>(s.to)[i];
      core::store(to, core::load(to) + scale * total[e]);
    } else {
      static_cast<T*>(s.to)[i] = scale * total[e];
    }
  }
}

}  // namespace

void noise_fill_cuda(const NoiseFill& f, void* stream) {
  const int64_t chunks = (f.elements + kFillChunk - 1) / kFillChunk;
  if (f.streams == 0 || chunks == 0) return;
  const auto blocks = static_cast<unsigned>(f.streams * chunks);
  core::dispatch_noise(f.law, [&](auto law) {
    const auto launch = [&](const auto& write) {
      noise_fill<law()><<<blocks, kNoiseThreads, 0, static_cast<cudaStream_t>(stream)>>>(f, chunks, write);
    };
    if (f.units) {
      launch(UnitsTo{static_cast<int8_t*>(f.out), static_cast<float>(core::kNoiseUnits<law()>)});
    } else {
      core::dispatch_dtype(f.type, [&](auto storage) {
        using S = decltype(storage);
        launch(RoundedTo<S>{static_cast<S*>(f.out)});
      });
    }
  });
  core::check_launch("eggroll_noise");
}

void noise_sum_cuda(const NoiseSum& s, void* stream) {
  if (s.numel == 0) return;
  core::dispatch_dtype(s.type, [&](auto storage) {
    core::dispatch_noise(s.law, [&](auto law) {
      constexpr int64_t kPer = core::kNoisePerThread<law()>;
      const int64_t units = (s.origin + s.numel + kPer - 1) / kPer - s.origin / kPer;
      const auto blocks = static_cast<unsigned>((units + kNoiseThreads - 1) / kNoiseThreads);
      noise_sum<decltype(storage), law()><<<blocks, kNoiseThreads, 0, static_cast<cudaStream_t>(stream)>>>(s);
    });
  });
  core::check_launch("noise_sum");
}

}  // namespace torch_ext::kernels
