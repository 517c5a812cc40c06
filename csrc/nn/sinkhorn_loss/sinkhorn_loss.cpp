#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones.h>
#include <torch_ext/nn/sinkhorn_loss.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include <cmath>

#include "core/library.h"

namespace torch_ext::nn {
namespace {

void check_eps(double eps) {
  TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), "SinkhornLoss: eps must be a finite number > 0, got ", eps);
}

at::Tensor or_uniform(const std::optional<at::Tensor>& weight, const at::Tensor& points) {
  if (weight.has_value()) return *weight;
  TORCH_CHECK_VALUE(points.dim() >= 2, "SinkhornLoss: points must be [..., n, d], got shape ", points.sym_sizes());
  const at::Tensor ones = at::ones_symint({points.sym_size(-2)}, points.options().requires_grad(false));
  return ones / ones.sum();
}

// Composite: made of differentiable operators, so that it needs no formula of its own.
at::Tensor loss_op(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                   const std::optional<at::Tensor>& b, double eps, bool debias) {
  check_eps(eps);
  const at::Tensor wa = or_uniform(a, x), wb = or_uniform(b, y);
  const ops::SinkhornOptions options(eps);
  const auto value = [&](const at::Tensor& p, const at::Tensor& q, const at::Tensor& wp, const at::Tensor& wq) {
    return std::get<0>(ops::sinkhorn_points(p, q, wp, wq, options));
  };
  const at::Tensor across = value(x, y, wa, wb);
  return debias ? across - 0.5 * (value(x, x, wa, wa) + value(y, y, wb, wb)) : across;
}

}  // namespace

SinkhornLossImpl::SinkhornLossImpl(double eps, bool debias) : eps_(eps), debias_(debias) { check_eps(eps); }

at::Tensor SinkhornLossImpl::forward(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                                     const std::optional<at::Tensor>& b) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::sinkhorn_loss", "").typed<decltype(loss_op)>();
  return op.call(x, y, a, b, eps_, debias_);
}

void SinkhornLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::SinkhornLoss(eps=" << eps_ << ", debias=" << (debias_ ? "true" : "false") << ')';
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "sinkhorn_loss(Tensor x, Tensor y, Tensor? a, Tensor? b, float eps, bool debias=False) -> Tensor",
      loss_op);
  m.def("sinkhorn_loss_check(float eps) -> ()", check_eps);
}

}  // namespace torch_ext::nn
