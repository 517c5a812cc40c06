// How much memory a device has left for a window.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <optional>

namespace torch_ext::curvature {

// Bytes that an allocation on `device` can expect to get: on the CPU what the kernel calls available, within the limit
// of the control group; on CUDA what is free, with what torch's allocator holds unused. Nothing where it cannot be
// told.
std::optional<int64_t> available_memory(const c10::Device& device);

}  // namespace torch_ext::curvature
