// Unpickles what torch.save writes for plain containers and tensors, and nothing else. Not torch::jit::Unpickler: that
// one trusts its input (it indexes its stack unchecked) and returns lists of mixed types only with TorchScript tags.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace torch_ext::core {

// Returns the storage in record data/<key>, which must have `nbytes` bytes.
using StorageLoader = std::function<c10::Storage(const std::string& key, uint64_t nbytes)>;

// Throws FormatError for anything but a complete pickle of a value that a checkpoint may hold; safe on hostile bytes.
c10::IValue unpickle_value(std::string_view pickle, const StorageLoader& load_storage);

}  // namespace torch_ext::core
