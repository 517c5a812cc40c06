// What Eggroll's processes tell each other beside values: signs, five to a byte, and checksums of parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>

namespace torch_ext::optim {

// Signs -1, 0, 1 (double, on the CPU), filled up with zeros to `count`, as bytes d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4 with
// digits 0, 1, 2 for 0, 1, -1: ceil(count / 5) bytes. `bad` writes 255 into all of them, which no digits give.
TORCH_EXT_API at::Tensor pack_trits(const at::Tensor& signs, int64_t count, bool bad = false);
// The other way, for the bytes of several processes with `count` signs each, one after another. *bad is set, and zeros
// stand in their place, if some byte is 255.
TORCH_EXT_API at::Tensor unpack_trits(const at::Tensor& bytes, int64_t count, bool* bad);

// int64 [1] on the tensor's device: the bits of elements in row-major order, each weighted by its odd place, modulo
// 2^64; exact in any order.
at::Tensor bit_checksum(const at::Tensor& tensor);

}  // namespace torch_ext::optim
