// Noise on the device: the table of the gaussian law in shared memory, and a thread block's turn through a range.
#pragma once

#include <cstdint>

#include "core/noise.h"

namespace torch_ext::core {

static __device__ const GaussianTable kDeviceTable = make_gaussian_table();

// Called by all threads of a block, once.
template <NoiseLaw law>
__device__ const GaussianCell* load_cells() {
  if constexpr (law != NoiseLaw::kGaussian) {
    return nullptr;
  } else {
    __shared__ GaussianCell cells[kGaussianCells];
    for (int c = threadIdx.x; c < kGaussianCells; c += blockDim.x) cells[c] = kDeviceTable.cell[c];
    __syncthreads();
    return cells;
  }
}

// Elements that one thread makes from one Philox block: all of it, or one word's where a block has very many.
template <NoiseLaw law>
constexpr int64_t kNoisePerThread = law == NoiseLaw::kRademacher ? 32 : kNoisePerBlock<law>;

// body(k, value) for the elements k = 0 ... kNoisePerThread - 1 of unit `unit`, whose first element is
// unit * kNoisePerThread.
template <NoiseLaw law, typename Body>
__device__ void noise_unit(const PhiloxStream& stream, int64_t unit, const GaussianCell* cells, const Body& body) {
  constexpr int64_t kPer = kNoisePerThread<law>, kUnits = kNoisePerBlock<law> / kPer;
  const Philox4 block = stream.block(static_cast<uint32_t>(unit / kUnits));
  const int64_t first = unit % kUnits * kPer;
#pragma unroll
  for (int64_t k = 0; k < kPer; ++k) body(k, noise_of_block<law>(block, first + k, cells));
}

// body(q, value) once for every element q in [begin, end), by all threads of the block.
template <NoiseLaw law, typename Body>
__device__ void for_each_noise(const PhiloxStream& stream, int64_t begin, int64_t end, const GaussianCell* cells,
                               const Body& body) {
  constexpr int64_t kPer = kNoisePerThread<law>;
  for (int64_t unit = begin / kPer + threadIdx.x; unit * kPer < end; unit += blockDim.x) {
    noise_unit<law>(stream, unit, cells, [&](int64_t k, float value) {
      const int64_t q = unit * kPer + k;
      if (q >= begin && q < end) body(q, value);
    });
  }
}

}  // namespace torch_ext::core
