// Rademacher (+1 / -1) probes that are never stored: every element is a function of the seed and its own position.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <vector>

namespace torch_ext::ops {

// Fills `tensor` (any shape and layout; float32, float64, bfloat16 or float16) with independent signs. Element e (row-
// major index) is bit e mod 128 of the Philox4x32-10 block with key = seed and
// counter = (e / 128, stream, ordinal << 8 | 3, epoch); a set bit is +1. Returns `tensor`.
// Errors: TypeError for another dtype, RuntimeError for an expanded tensor, ValueError for a negative counter.
TORCH_EXT_API at::Tensor rademacher_(at::Tensor tensor, int64_t seed, int64_t stream, int64_t ordinal = 0,
                                     int64_t epoch = 0);

// One new contiguous probe per tensor of `like` (its shape, dtype and device), drawn jointly: ordinals[i] is the i-th
// tensor's number.
TORCH_EXT_API std::vector<at::Tensor> rademacher_probe(at::TensorList like, at::IntArrayRef ordinals, int64_t seed,
                                                       int64_t stream, int64_t epoch);

// The same into contiguous tensors that stand ready, such as the probes of an earlier call.
TORCH_EXT_API void rademacher_refill_(at::TensorList probes, at::IntArrayRef ordinals, int64_t seed, int64_t stream,
                                      int64_t epoch);

}  // namespace torch_ext::ops
