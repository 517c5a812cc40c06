// Operators as the autograd formulas call them (through the dispatcher); the public face is
// <torch_ext/ops/sinkhorn_newton.h>.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace torch_ext::ops {

using SinkhornTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using PointTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using TensorPair = std::tuple<at::Tensor, at::Tensor>;

SinkhornTensors call_sinkhorn_newton(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b, double eps,
                                     std::optional<double> tol, int64_t max_iter, std::string_view mode,
                                     const std::optional<at::Tensor>& f0);
PointTensors call_sinkhorn_points(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b,
                                  double eps, std::optional<double> tol, int64_t max_iter, std::string_view mode,
                                  const std::optional<at::Tensor>& f0);
TensorPair call_displacement(const at::Tensor& x, const at::Tensor& y, const at::Tensor& f, const at::Tensor& g,
                             double eps);

// Shapes and dtypes of C, a and b; the common batch shape.
c10::SmallVector<c10::SymInt, 5> check_sinkhorn(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b);

}  // namespace torch_ext::ops
