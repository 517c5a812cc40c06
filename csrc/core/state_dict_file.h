// The checkpoint file that C++ and Python share: torch.save's zip archive, pickled so that
// torch.load(path, weights_only=True) opens it.
//
// A value is a tree of dicts (keys: int, str, bool, float), lists, tuples, tensors, ints, floats, bools, strings and
// None. Ints stay ints, also as keys, so an optimizer's state_dict keeps the indices that torch.optim expects.
//
// Every failure is a c10::Error (RuntimeError in Python) that names the file and says what to do. Both functions may be
// called from any thread.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>

#include <cstddef>
#include <optional>
#include <string>

#include "torch_ext/export.h"

namespace torch_ext::core {

// Writes `value` to `path`. The file is written beside its target and renamed, so an existing file is either replaced
// whole or left as it was; the mode of an existing file and a symbolic link at `path` are kept.
//
// Tensors must be strided and own memory (CPU or an accelerator); sizes, strides, dtype, requires_grad and the device
// string are kept. Tensors that share memory still share it after loading. Of each storage only the span that the
// tensors of `value` touch is written: a slice of a large buffer makes a small file (torch.save would write the
// buffer).
TORCH_EXT_API void write_state_dict(const c10::IValue& value, const std::string& path);

// Reads a file made by write_state_dict or by torch.save (zip format, default pickle protocol). No Python code is ever
// run: a file that holds any other Python object is refused, as torch.load(weights_only=True) does.
//
// Every tensor comes back on the CPU, whatever device it was saved from, unless `map_location` names another device.
// Unlike torch.load, the checksum of every record is compared (torch.serialization.set_crc32_options(False) leaves
// none): a damaged file is an error, never wrong numbers.
TORCH_EXT_API c10::IValue read_state_dict(const std::string& path,
                                          std::optional<c10::Device> map_location = std::nullopt);

// The same for a file that is already in memory.
TORCH_EXT_API c10::IValue read_state_dict(const void* data, size_t size,
                                          std::optional<c10::Device> map_location = std::nullopt);

}  // namespace torch_ext::core
