// The loops that noise on the CPU spends its time in, with vector instructions where there are some. Every version
// computes the same bits.
#pragma once

#include <cstdint>

#include "core/noise.h"

namespace torch_ext::kernels {

constexpr int64_t kPhiloxStep = 16;  // Philox blocks that fill the widest registers twice

// Words of blocks first, first + 1, ... first + count - 1 in their order; count is a multiple of kPhiloxStep.
void philox_words(uint32_t first, int64_t count, const core::PhiloxStream& stream, uint32_t* words);

// out[i] = the gaussian element of words[i]; count is a multiple of 16.
void gaussian_from_words(const uint32_t* words, int64_t count, float* out);

// out[i] = the element of the binomial64 law from words[2 i] and words[2 i + 1]; count is a multiple of 8.
void binomial64_from_words(const uint32_t* words, int64_t count, float* out);

// The table of the gaussian law in host memory.
const core::GaussianCell* gaussian_cells_cpu();

}  // namespace torch_ext::kernels
