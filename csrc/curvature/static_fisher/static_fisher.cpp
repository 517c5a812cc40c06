#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/curvature/static_fisher.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "curvature/static_fisher/fisher_blocks.h"

namespace torch_ext::curvature {
namespace {

using Block = std::optional<int64_t>;

at::ScalarType result_type(const at::Tensor& gradients) { return core::arithmetic_type(gradients.scalar_type()); }

void check_vector(const at::Tensor& x, const at::Tensor& gradients) {
  core::dtype_of(x, "StaticFisher.mul: x");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == gradients.sym_size(1), "StaticFisher.mul: x must be [..., ",
                    gradients.sym_size(1), "], got ", x.sym_sizes());
  TORCH_CHECK_VALUE(x.device() == gradients.device(), "StaticFisher.mul: x is on ", x.device(), ", the gradients on ",
                    gradients.device());
}

std::tuple<at::Tensor, at::Tensor> factor_op(const at::Tensor& gradients, double damping, Block block) {
  const at::NoGradGuard no_grad;
  auto factor = factorize(fisher_blocks(gradients, damping, block));
  return {std::move(factor.blocks), std::move(factor.tail)};
}

at::Tensor diag_op(const at::Tensor& gradients, const at::Tensor& factor, const at::Tensor& tail, double damping,
                   Block block) {
  const at::NoGradGuard no_grad;
  const FisherBlocks fisher = fisher_blocks(gradients, damping, block);
  return inverse_diagonal(fisher, checked_factor(fisher, factor, tail)).to(result_type(gradients));
}

at::Tensor mul_op(const at::Tensor& x, const at::Tensor& gradients, const at::Tensor& factor, const at::Tensor& tail,
                  double damping, Block block) {
  const at::NoGradGuard no_grad;
  const FisherBlocks fisher = fisher_blocks(gradients, damping, block);
  check_vector(x, gradients);
  const at::Tensor columns = x.reshape({-1, x.size(-1)}).t().to(at::kDouble);
  const at::Tensor product = inverse_times(fisher, checked_factor(fisher, factor, tail), columns);
  return product.t().to(x.scalar_type()).reshape(x.sizes());
}

at::Tensor rows_op(const at::Tensor& gradients, double damping, Block block) {
  const at::NoGradGuard no_grad;
  return whitened_rows(fisher_blocks(gradients, damping, block)).contiguous().to(result_type(gradients));
}

at::Tensor element_op(const at::Tensor& gradients, const at::Tensor& factor, const at::Tensor& tail, double damping,
                      Block block, int64_t i, int64_t j) {
  const at::NoGradGuard no_grad;
  const FisherBlocks fisher = fisher_blocks(gradients, damping, block);
  const FisherFactor all = checked_factor(fisher, factor, tail);
  const int64_t d = gradients.size(1), b = i / fisher.block;
  TORCH_CHECK_INDEX(i >= 0 && i < d && j >= 0 && j < d, "StaticFisher.element: (", i, ", ", j,
                    ") is outside the matrix of ", d, " x ", d);
  if (b != j / fisher.block) return at::zeros({}, gradients.options().dtype(at::kDouble));
  const at::Tensor matrix = (b * fisher.block + fisher.block > d ? all.tail[0] : all.blocks[b]);
  const int64_t width = std::min(fisher.block, d - b * fisher.block);
  if (width <= gradients.size(0)) return matrix[i % fisher.block][j % fisher.block].clone();
  const auto column = [&](int64_t k) { return gradients.narrow(1, k, 1).to(at::kDouble); };
  const auto whitened = [&](int64_t k) { return at::linalg_solve_triangular(matrix, column(k), /*upper=*/false); };
  const at::Tensor dot = (whitened(i) * whitened(j)).sum();
  at::Tensor value = dot.neg_().add_(i == j ? 1 : 0).div_(damping);
  if (i != j) return value;
  const at::Tensor largest = column(i).square().sum().div_(gradients.size(0)).add_(damping);
  return value.maximum(largest.reciprocal_());  // as in diag()
}

std::tuple<at::Tensor, at::Tensor> factor_meta(const at::Tensor& gradients, double damping, Block block) {
  check_fisher(gradients, damping, block);
  const c10::SymInt m = gradients.sym_size(0), d = gradients.sym_size(1);
  const c10::SymInt width = block.has_value() ? d.min(*block) : d, rest = d % width;
  const c10::SymInt order = m.min(width), tail_order = m.min(rest), tails = rest.min(1);
  const auto options = gradients.options().dtype(at::kDouble);
  return {at::empty_symint({d / width, order, order}, options),
          at::empty_symint({tails, tail_order, tail_order}, options)};
}

at::Tensor diag_meta(const at::Tensor& gradients, const at::Tensor&, const at::Tensor&, double damping, Block block) {
  check_fisher(gradients, damping, block);
  return at::empty_symint({gradients.sym_size(1)}, gradients.options().dtype(result_type(gradients)));
}

at::Tensor mul_meta(const at::Tensor& x, const at::Tensor& gradients, const at::Tensor&, const at::Tensor&,
                    double damping, Block block) {
  check_fisher(gradients, damping, block);
  check_vector(x, gradients);
  return at::empty_symint(x.sym_sizes(), x.options());
}

at::Tensor rows_meta(const at::Tensor& gradients, double damping, Block block) {
  check_fisher(gradients, damping, block);
  return at::empty_symint(gradients.sym_sizes(), gradients.options().dtype(result_type(gradients)));
}

at::Tensor element_meta(const at::Tensor& gradients, const at::Tensor&, const at::Tensor&, double damping, Block block,
                        int64_t, int64_t) {
  check_fisher(gradients, damping, block);
  return at::empty_symint({}, gradients.options().dtype(at::kDouble));
}

}  // namespace

StaticFisher::StaticFisher(at::Tensor gradients, double damping, std::optional<int64_t> block)
    : gradients_(std::move(gradients)), damping_(damping) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::static_fisher_factor", "")
                             .typed<decltype(factor_op)>();
  std::tie(factor_, tail_factor_) = op.call(gradients_, damping, block);
  block_ = std::min(block.value_or(dim()), dim());
}

at::Tensor StaticFisher::diag() const {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::static_fisher_diag", "").typed<decltype(diag_op)>();
  return op.call(gradients_, factor_, tail_factor_, damping_, block_);
}

at::Tensor StaticFisher::mul(const at::Tensor& x) const {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::static_fisher_mul", "").typed<decltype(mul_op)>();
  return op.call(x, gradients_, factor_, tail_factor_, damping_, block_);
}

double StaticFisher::element(int64_t i, int64_t j) const {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::static_fisher_element", "")
                             .typed<decltype(element_op)>();
  return op.call(gradients_, factor_, tail_factor_, damping_, block_, i, j).item<double>();
}

at::Tensor StaticFisher::rows() const {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::static_fisher_rows", "").typed<decltype(rows_op)>();
  return op.call(gradients_, damping_, block_);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("static_fisher_factor(Tensor gradients, float damping, int? block) -> (Tensor, Tensor)");
  m.def("static_fisher_diag(Tensor gradients, Tensor factor, Tensor tail_factor, float damping, int? block) -> Tensor");
  m.def(
      "static_fisher_mul(Tensor x, Tensor gradients, Tensor factor, Tensor tail_factor, float damping, int? block) -> "
      "Tensor");
  m.def(
      "static_fisher_element(Tensor gradients, Tensor factor, Tensor tail_factor, float damping, int? block, int i, "
      "int j) -> Tensor");
  m.def("static_fisher_rows(Tensor gradients, float damping, int? block) -> Tensor");
}

#define TORCH_EXT_STATIC_FISHER(suffix)              \
  m.impl("static_fisher_factor", factor_##suffix);   \
  m.impl("static_fisher_diag", diag_##suffix);       \
  m.impl("static_fisher_mul", mul_##suffix);         \
  m.impl("static_fisher_element", element_##suffix); \
  m.impl("static_fisher_rows", rows_##suffix)

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { TORCH_EXT_STATIC_FISHER(op); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { TORCH_EXT_STATIC_FISHER(op); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { TORCH_EXT_STATIC_FISHER(meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  for (const char* op : {"static_fisher_factor", "static_fisher_diag", "static_fisher_mul", "static_fisher_element",
                         "static_fisher_rows"}) {
    m.impl(op, core::not_differentiable());
  }
}
#undef TORCH_EXT_STATIC_FISHER

}  // namespace torch_ext::curvature
