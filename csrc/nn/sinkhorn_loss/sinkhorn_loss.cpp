#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/nn/sinkhorn_loss.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include <cmath>
#include <string>
#include <tuple>

#include "core/library.h"
#include "ops/sinkhorn_newton/sinkhorn_newton.h"

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

using LossAndInfo = std::tuple<at::Tensor, at::Tensor>;

// The worse error and status, the sum of the work.
at::Tensor joined(const at::Tensor& a, const at::Tensor& b) {
  const auto part = [](const at::Tensor& info, int64_t k) { return info.narrow(-1, k, 1); };
  const at::Tensor work = a.narrow(-1, 1, 2) + b.narrow(-1, 1, 2);
  return at::cat({at::maximum(part(a, 0), part(b, 0)), work, at::minimum(part(a, 3), part(b, 3))}, -1);
}

// Composite: made of differentiable operators, so that it needs no formula of its own.
LossAndInfo loss_op(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                    const std::optional<at::Tensor>& b, double eps, bool debias) {
  check_eps(eps);
  const at::Tensor wa = or_uniform(a, x), wb = or_uniform(b, y);
  const auto solve = [&](const at::Tensor& p, const at::Tensor& q, const at::Tensor& wp, const at::Tensor& wq) {
    const auto out = ops::call_sinkhorn_points(p, q, wp, wq, eps, std::nullopt, 100, "auto", std::nullopt);
    return LossAndInfo{std::get<0>(out), std::get<3>(out)};
  };
  const auto [across, info] = solve(x, y, wa, wb);
  if (!debias) return {across, info};
  const auto [in_x, info_x] = solve(x, x, wa, wa);
  const auto [in_y, info_y] = solve(y, y, wb, wb);
  return {across - 0.5 * (in_x + in_y), joined(joined(info, info_x), info_y)};
}

}  // namespace

SinkhornLossImpl::SinkhornLossImpl(double eps, bool debias) : eps_(eps), debias_(debias) { check_eps(eps); }

at::Tensor SinkhornLossImpl::forward(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                                     const std::optional<at::Tensor>& b) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::sinkhorn_loss", "").typed<decltype(loss_op)>();
  const auto [loss, info] = op.call(x, y, a, b, eps_, debias_);
  if (const std::string text = ops::sinkhorn_unconverged("SinkhornLoss", info); !text.empty()) {
    TORCH_WARN(text);
  }
  return loss;
}

void SinkhornLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::SinkhornLoss(eps=" << eps_ << ", debias=" << (debias_ ? "true" : "false") << ')';
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "sinkhorn_loss(Tensor x, Tensor y, Tensor? a, Tensor? b, float eps, bool debias=False) -> (Tensor loss, Tensor "
      "info)",
      loss_op);
  m.def("sinkhorn_loss_check(float eps) -> ()", check_eps);
}

}  // namespace torch_ext::nn
