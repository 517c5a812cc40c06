// Entry points of the Philox4x32-10 kernels over int64 words.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace torch_ext::kernels {

// Row i of out[.., 4] from counter[.., 4] and key[.., 2]; rows [begin, end).
void philox4x32_cpu(const int64_t* counter, const int64_t* key, int64_t* out, int64_t begin, int64_t end);
void philox4x32_cuda(const int64_t* counter, const int64_t* key, int64_t* out, int64_t rows, void* stream);

TX_HD void philox4x32_row(const int64_t* counter, const int64_t* key, int64_t* out) {
  const core::Philox4 words = core::philox4x32({static_cast<uint32_t>(counter[0]), static_cast<uint32_t>(counter[1]),
                                                static_cast<uint32_t>(counter[2]), static_cast<uint32_t>(counter[3])},
                                               static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1]));
  out[0] = words.x;
  out[1] = words.y;
  out[2] = words.z;
  out[3] = words.w;
}

}  // namespace torch_ext::kernels
