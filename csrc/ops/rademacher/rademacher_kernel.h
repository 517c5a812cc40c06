// Entry points of the Rademacher probe kernels over raw pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/multi_tensor.h"
#include "ops/rademacher/rademacher_functor.h"

namespace torch_ext::kernels {

struct RademacherTensor {
  void* out;
  int64_t numel;
  core::PhiloxStream stream;
};

// Elements [begin, end) of one tensor; any range on its own.
void rademacher_cpu(const RademacherTensor& tensor, core::DType type, int64_t begin, int64_t end);
void rademacher_cuda(const std::vector<RademacherTensor>& tensors, core::DType type, void* stream);

}  // namespace torch_ext::kernels
