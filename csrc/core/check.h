// Checks and layout rules that every op on lists of tensors applies, and the bridge from at::Tensor to raw kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <functional>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace torch_ext::core {

// "parameter 3 (shape [10, 64])": how messages name the i-th tensor of a list.
std::string describe(const char* what, size_t index, const at::Tensor& tensor);

// The kernel's name of a floating-point dtype; TypeError naming `what` for anything else.
DType dtype_of(const at::Tensor& tensor, const std::string& what);
// float for half, bfloat16 and float; double for double.
at::ScalarType arithmetic_type(at::ScalarType storage);

// Gradients that no optimizer of the pack accepts: sparse (RuntimeError), complex, integer or DTensor-like subclasses
// without storage, another shape or device than the parameter. Names the parameter by its running number.
void check_gradient(const char* optimizer, size_t ordinal, const at::Tensor& param, const at::Tensor& grad);
void check_same_length(const char* op, const char* what, size_t expected, size_t got);

// One tensor made addressable in the element order of a chosen layout. If its strides differ it is copied in, and
// written back by finish() when it is mutated.
class Staged {
 public:
  Staged(const at::Tensor& tensor, at::IntArrayRef strides);
  void* data() const { return staged_.data_ptr(); }
  void finish() const;

 private:
  at::Tensor original_, staged_;
};

// Strides in which a list of equal-shaped tensors is walked: those of `lead` if it is non-overlapping and dense
// (storage order) and `any_order` holds, else the contiguous ones. Refuses an expanded or otherwise self-overlapping
// lead.
std::vector<int64_t> walking_strides(const at::Tensor& lead, bool any_order, const char* what, size_t index = 0);

// Indices grouped by (device, dtype of `by`), in order of first appearance.
std::vector<std::vector<size_t>> buckets(at::TensorList by);

// Current CUDA stream of a device as the opaque pointer that kernels take; null for the CPU.
void* current_stream(const at::Device& device);

void bump_versions(at::TensorList tensors);

}  // namespace torch_ext::core
