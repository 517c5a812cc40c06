// Pickles a value for torch.load(weights_only=True). Not torch::jit::Pickler: it wraps typed lists in TorchScript
// classes that weights-only loading refuses, and it writes whole storages.
#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

namespace torch_ext::core {

struct PickledValue {
  std::string pickle;
  std::vector<at::Tensor>
      storages;  // 1-D, contiguous, on their own device; element i is the content of record data/<i>
};

// Throws FormatError for a value that a checkpoint cannot hold.
PickledValue pickle_value(const c10::IValue& value);

}  // namespace torch_ext::core
