// Typed calls of the ops that every optimizer shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <optional>
#include <vector>

namespace torch_ext::core {

// 0-dim float32 flag, 1 if any element of any tensor is infinite or NaN or if found_inf is nonzero; adds it to
// `skipped` (0-dim int64, any device). Tensors may sit on several devices; no host sync on one CUDA device.
TORCH_EXT_API at::Tensor count_nonfinite_(at::TensorList tensors, const std::optional<at::Tensor>& found_inf,
                                          const at::Tensor& skipped);

// sums[i] += weight * signs[i] * x[i], computed in the dtype of sums (float32 or float64); signs may be empty.
TORCH_EXT_API void accumulate_(at::TensorList sums, at::TensorList x, at::TensorList signs, double weight);

}  // namespace torch_ext::core
