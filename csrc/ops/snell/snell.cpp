#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch_ext/ops/snell.h>

#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "ops/snell/snell_layer.h"
#include "ops/snell/snell_op.h"

namespace torch_ext::ops {
namespace {

constexpr const char* kLinear = "snell_linear";
constexpr const char* kMerge = "snell_merge";

// [..., features] as a matrix that a product reads without a copy.
at::Tensor as_matrix(const at::Tensor& x) {
  const at::Tensor matrix = x.reshape({x.numel() / std::max<int64_t>(1, x.size(-1)), x.size(-1)});
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const bool by_rows = matrix.stride(1) == 1 && matrix.stride(0) >= columns;
  const bool by_columns = matrix.stride(0) == 1 && matrix.stride(1) >= rows;
  return by_rows || by_columns ? matrix : matrix.contiguous();
}

void check_linear(const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, double scale, double sparsity,
                  std::string_view sparsifier, std::string_view grad) {
  check_snell(kLinear, a, b, scale, sparsity, sparsifier, grad);
  check_snell_input(kLinear, x, a);
}

std::tuple<at::Tensor, at::Tensor> linear_impl(const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                                               double scale, double sparsity, std::string_view sparsifier,
                                               std::string_view grad) {
  check_linear(x, a, b, scale, sparsity, sparsifier, grad);
  const c10::OptionalDeviceGuard guard(device_of(x));
  const SnellLayer layer = make_snell_layer(kLinear, a, b, scale, sparsifier, grad, /*values=*/true);
  const at::Tensor t = snell_threshold(layer, sparsity);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = b.size(1);
  return {snell_product(layer, t, as_matrix(x), /*transposed=*/false).view(sizes), t};
}

std::tuple<at::Tensor, at::Tensor> linear_meta(const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                                               double scale, double sparsity, std::string_view sparsifier,
                                               std::string_view grad) {
  check_linear(x, a, b, scale, sparsity, sparsifier, grad);
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = b.sym_size(1);
  return {at::empty_symint(sizes, x.options().requires_grad(false)),
          at::empty({}, a.options().dtype(core::arithmetic_type(a.scalar_type())).requires_grad(false))};
}

SnellGrads backward_impl(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                         const at::Tensor& t, double scale, double sparsity, std::string_view sparsifier,
                         std::string_view grad, std::array<bool, 3> wanted) {
  check_linear(x, a, b, scale, sparsity, sparsifier, grad);
  const c10::OptionalDeviceGuard guard(device_of(x));
  const SnellLayer layer = make_snell_layer(kLinear, a, b, scale, sparsifier, grad, /*values=*/false);
  const at::Tensor dy = as_matrix(grad_y.to(x.scalar_type()));
  SnellGradients grads;
  if (wanted[1] || wanted[2]) {
    grads = snell_gradients(layer, t, as_matrix(x), dy, /*pulled=*/sparsity > 0, wanted[0]);
  } else if (wanted[0]) {
    grads.x = snell_product(layer, t, dy, /*transposed=*/true);
  }
  const auto result = [](bool want, const at::Tensor& value, const at::Tensor& like) {
    return want ? value.to(like.scalar_type()).view(like.sizes()) : at::empty({0}, like.options());
  };
  return {result(wanted[0], grads.x, x), result(wanted[1], grads.a, a), result(wanted[2], grads.b, b)};
}

SnellGrads backward_meta(const at::Tensor&, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                         const at::Tensor&, double scale, double sparsity, std::string_view sparsifier,
                         std::string_view grad, std::array<bool, 3> wanted) {
  check_linear(x, a, b, scale, sparsity, sparsifier, grad);
  const auto result = [](bool want, const at::Tensor& like) {
    const auto options = like.options().requires_grad(false);
    return want ? at::empty_symint(like.sym_sizes(), options) : at::empty({0}, options);
  };
  return {result(wanted[0], x), result(wanted[1], a), result(wanted[2], b)};
}

at::Tensor merge_impl(const at::Tensor& a, const at::Tensor& b, double scale, double sparsity,
                      std::string_view sparsifier) {
  check_snell(kMerge, a, b, scale, sparsity, sparsifier, "detached");
  const c10::OptionalDeviceGuard guard(device_of(a));
  const SnellLayer layer = make_snell_layer(kMerge, a, b, scale, sparsifier, "detached", /*values=*/true);
  const at::Tensor out = at::empty({a.size(1), b.size(1)}, layer.a.options());
  snell_fill(layer, snell_threshold(layer, sparsity), out);
  return out.to(a.scalar_type());
}

at::Tensor merge_meta(const at::Tensor& a, const at::Tensor& b, double scale, double sparsity,
                      std::string_view sparsifier) {
  check_snell(kMerge, a, b, scale, sparsity, sparsifier, "detached");
  return at::empty_symint({a.sym_size(1), b.sym_size(1)}, a.options().requires_grad(false));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> snell_linear(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B,
                                                double scale, double sparsity, std::string_view sparsifier,
                                                std::string_view grad) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::snell_linear", "").typed<decltype(snell_linear)>();
  return op.call(x, A, B, scale, sparsity, sparsifier, grad);
}

SnellGrads snell_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                 const at::Tensor& B, const at::Tensor& t, double scale, double sparsity,
                                 std::string_view sparsifier, std::string_view grad, std::array<bool, 3> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::snell_linear_backward", "")
                             .typed<decltype(snell_linear_backward)>();
  return op.call(grad_y, x, A, B, t, scale, sparsity, sparsifier, grad, wanted);
}

at::Tensor snell_merge(const at::Tensor& A, const at::Tensor& B, double scale, double sparsity,
                       std::string_view sparsifier) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::snell_merge", "").typed<decltype(snell_merge)>();
  return op.call(A, B, scale, sparsity, sparsifier);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "snell_linear(Tensor x, Tensor A, Tensor B, float scale, float sparsity, *, str sparsifier='code', "
      "str grad='detached') -> (Tensor y, Tensor t)");
  m.def(
      "snell_linear_backward(Tensor grad_y, Tensor x, Tensor A, Tensor B, Tensor t, float scale, float sparsity, "
      "str sparsifier, str grad, bool[3] wanted) -> (Tensor, Tensor, Tensor)");
  m.def("snell_merge(Tensor A, Tensor B, float scale, float sparsity, *, str sparsifier='code') -> Tensor");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("snell_linear", linear_impl);
  m.impl("snell_linear_backward", backward_impl);
  m.impl("snell_merge", merge_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("snell_linear", linear_impl);
  m.impl("snell_linear_backward", backward_impl);
  m.impl("snell_merge", merge_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("snell_linear", linear_meta);
  m.impl("snell_linear_backward", backward_meta);
  m.impl("snell_merge", merge_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("snell_merge", core::not_differentiable()); }

}  // namespace torch_ext::ops
