// Philox4x32-10, the counter-based generator behind every random number of the pack.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

namespace torch_ext::ops {

// Ten rounds of Philox4x32 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//   counter  [..., 4] int64, each word taken modulo 2^32
//   key      [..., 2] int64, the same; leading dimensions broadcast against those of counter
//   returns  [..., 4] int64 in [0, 2^32)
// Errors: TypeError for another dtype, ValueError for a last dimension other than 4 and 2.
TORCH_EXT_API at::Tensor philox4x32(const at::Tensor& counter, const at::Tensor& key);

}  // namespace torch_ext::ops
