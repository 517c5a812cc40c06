// The linear system of the implicit derivatives, through ATen: matrix products and a Cholesky factorisation of the
// smaller side, which conjugate gradients on the full plan (hundreds of n m sweeps at small eps) do not beat.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include "core/check.h"
#include "core/library.h"
#include "ops/sinkhorn_newton/sinkhorn_newton.h"

namespace torch_ext::ops {
namespace {

void check(const at::Tensor& plan, const at::Tensor& u, const at::Tensor& v) {
  constexpr const char* kOp = "sinkhorn_hess_solve";
  TORCH_CHECK_VALUE(plan.dim() >= 2, kOp, ": plan must be [..., n, m], got shape ", plan.sym_sizes());
  const auto side = [&](const char* name, const at::Tensor& tensor, int64_t removed) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == plan.scalar_type(), kOp, ": ", name, " has dtype ", tensor.scalar_type(),
                     ", plan ", plan.scalar_type());
    auto sizes = plan.sym_sizes().vec();
    sizes.erase(sizes.end() + removed);
    TORCH_CHECK_VALUE(tensor.sym_sizes() == c10::SymIntArrayRef(sizes), kOp, ": ", name, " has shape ",
                      tensor.sym_sizes(), ", plan ", plan.sym_sizes());
  };
  core::dtype_of(plan, "sinkhorn_hess_solve: plan");
  side("u", u, -1);
  side("v", v, -2);
}

at::Tensor times(const at::Tensor& matrix, const at::Tensor& x) {
  return at::matmul(matrix, x.unsqueeze(-1)).squeeze(-1);
}

// alpha for at most as many rows as columns; p, q > 0. In the variable sqrt(p) alpha the matrix
//   I - D P diag(1/q) P^T D + w w^T / |w|^2,   D = diag(p)^(-1/2), w = sqrt(p),
// has eigenvalues in [0, 1]; a plan that falls apart into blocks leaves some at rounding, hence the shift, whose effect
// two refinements take back wherever there is something to solve.
at::Tensor solve_rows(const at::Tensor& plan, const at::Tensor& p, const at::Tensor& q, const at::Tensor& u,
                      const at::Tensor& v) {
  constexpr double kShift = 1e-13;
  const at::Tensor w = p.sqrt();
  const at::Tensor scaled = plan / w.unsqueeze(-1) / q.sqrt().unsqueeze(-2);
  const at::Tensor unit = w / w.square().sum(-1, true).sqrt();
  at::Tensor matrix = at::matmul(scaled, scaled.mT()).neg_();
  matrix += unit.unsqueeze(-1) * unit.unsqueeze(-2);
  matrix.diagonal(0, -2, -1).add_(1);
  const at::Tensor rhs = ((u - times(plan, v / q)) / w).unsqueeze(-1);
  at::Tensor factor, failed;
  double shift = kShift;
  do {  // rounding may push a null eigenvalue below -shift
    std::tie(factor, failed) = at::linalg_cholesky_ex(matrix + shift * at::eye(p.size(-1), p.options()));
    shift *= 10;
  } while (shift < 1e-6 && failed.any().item<bool>());
  at::Tensor x = at::cholesky_solve(rhs, factor);
  for (int refinement = 0; refinement < 2; ++refinement) {
    x = x + at::cholesky_solve(rhs - at::matmul(matrix, x), factor);
  }
  return x.squeeze(-1) / w;
}

TensorPair hess_solve_op(const at::Tensor& plan, const at::Tensor& u, const at::Tensor& v) {
  check(plan, u, v);
  if (plan.numel() == 0) return {u.clone(), v.clone()};
  const c10::DeviceGuard guard(plan.device());
  const at::Tensor P = plan.to(at::kDouble);
  const at::Tensor row = P.sum(-1), column = P.sum(-2);
  // Rows and columns without mass have no equation: their unknowns are 0.
  const at::Tensor p = at::where(row > 0, row, 1), q = at::where(column > 0, column, 1);
  const at::Tensor total = (row.sum(-1) + column.sum(-1)).unsqueeze(-1);
  at::Tensor s = at::where(row > 0, u.to(at::kDouble), 0), t = at::where(column > 0, v.to(at::kDouble), 0);
  const at::Tensor excess = (s.sum(-1) - t.sum(-1)).unsqueeze(-1) / total;
  s = s - row * excess;
  t = t + column * excess;
  at::Tensor alpha, beta;
  if (P.size(-2) <= P.size(-1)) {
    alpha = solve_rows(P, p, q, s, t);
    beta = (t - times(P.mT(), alpha)) / q;
  } else {
    beta = solve_rows(P.mT(), q, p, t, s);
    alpha = (s - times(P, beta)) / p;
  }
  const at::Tensor gauge = ((row * alpha).sum(-1) - (column * beta).sum(-1)).unsqueeze(-1) / total;
  alpha = at::where(row > 0, alpha - gauge, 0);
  beta = at::where(column > 0, beta + gauge, 0);
  return {alpha.to(plan.scalar_type()).contiguous(), beta.to(plan.scalar_type()).contiguous()};
}

TensorPair hess_solve_meta(const at::Tensor& plan, const at::Tensor& u, const at::Tensor& v) {
  check(plan, u, v);
  const auto options = plan.options().requires_grad(false);
  return {at::empty_symint(u.sym_sizes(), options), at::empty_symint(v.sym_sizes(), options)};
}

}  // namespace

TensorPair sinkhorn_hess_solve(const at::Tensor& plan, const at::Tensor& u, const at::Tensor& v) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::sinkhorn_hess_solve", "")
                             .typed<decltype(sinkhorn_hess_solve)>();
  return op.call(plan, u, v);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("sinkhorn_hess_solve(Tensor plan, Tensor u, Tensor v) -> (Tensor alpha, Tensor beta)");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("sinkhorn_hess_solve", hess_solve_op); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("sinkhorn_hess_solve", hess_solve_op); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("sinkhorn_hess_solve", hess_solve_meta); }

}  // namespace torch_ext::ops
