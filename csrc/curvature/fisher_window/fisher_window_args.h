// From the operators' tensors to what the kernels take.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "curvature/fisher_window/fisher_window_kernel.h"

namespace torch_ext::curvature {

// ValueError for a name that is no format.
kernels::WindowFormat window_format(std::string_view name);
// The dtype of `rows`.
at::ScalarType window_dtype(kernels::WindowFormat format);
// Of rows before encoding and of G^T c: double for the format double, else float.
at::ScalarType window_arithmetic(kernels::WindowFormat format);

// Checks dtypes, shapes and devices of a window's tensors; `error` may be undefined.
kernels::WindowView window_view(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                                const at::Tensor& error, const at::Tensor& ring, std::string_view format);

// Gradients and parameters as segments of one row on `device`, in order, row-major inside each. Keeps what had to be
// copied (other layout or device).
class RowSources {
 public:
  RowSources(const char* op, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
             at::ArrayRef<double> weight_decay, const at::Device& device);
  const std::vector<kernels::RowSegment>& segments() const { return segments_; }
  int64_t numel() const { return numel_; }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<kernels::RowSegment> segments_;
  int64_t numel_ = 0;
};

// What multiplies the gradients: +-1 / grad_scale.
class RowFactor {
 public:
  RowFactor(bool negate, const std::optional<at::Tensor>& grad_scale, const at::Device& device);
  double sign() const { return sign_; }
  const float* scale() const { return scale_.defined() ? scale_.const_data_ptr<float>() : nullptr; }   // on the device
  double value() const { return scale() == nullptr ? sign_ : sign_ / static_cast<double>(*scale()); }  // on the CPU

 private:
  double sign_;
  at::Tensor scale_;
};

// Items per thread that make a second thread worth its while, from the bytes that one item reads.
inline int64_t window_grain(int64_t bytes) {
  return std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, bytes));
}

}  // namespace torch_ext::curvature
