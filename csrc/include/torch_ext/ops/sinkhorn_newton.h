// Entropic optimal transport, solved by a sparse Newton method, with exact derivatives.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace torch_ext::ops {

// What sinkhorn_newton takes besides its tensors. Each setter returns the object.
struct SinkhornOptions {
  explicit SinkhornOptions(double eps) : eps_(eps) {}
  double eps() const { return eps_; }
  std::optional<double> tol() const { return tol_; }
  int64_t max_iter() const { return max_iter_; }
  const std::string& mode() const { return mode_; }
  SinkhornOptions& tol(double value) {
    tol_ = value;
    return *this;
  }
  SinkhornOptions& max_iter(int64_t value) {
    max_iter_ = value;
    return *this;
  }
  SinkhornOptions& mode(std::string value) {
    mode_ = std::move(value);
    return *this;
  }

 private:
  double eps_;
  std::optional<double> tol_;
  int64_t max_iter_ = 100;
  std::string mode_ = "auto";
};

struct SinkhornResult {
  at::Tensor value;  // [...]
  at::Tensor plan;   // [..., n, m]
  at::Tensor f;      // [..., n]
  at::Tensor g;      // [..., m]
  at::Tensor
      info;  // [..., 4] float64: L1 error of the marginals relative to their mass, Newton steps, passes, converged
};

// V = min <C, P> + eps sum P (log P - 1) over P >= 0 with row sums a and column sums b
//   = max a.f + b.g - eps sum_ij exp((f_i + g_j - C_ij) / eps);      P_ij = exp((f_i + g_j - C_ij) / eps).
//
//   C  [..., n, m]  float64, float32, bfloat16 or float16; +infinity forbids a pair
//   a  [..., n], b [..., m]  masses >= 0 of equal sum, float64 for a float64 C, else float32; leading dimensions of all
//      three broadcast. Where a is 0, f is -infinity and the row of P is 0.
//   eps   absolute, in units of C; nothing is rescaled behind it
//   tol   on info's error; 1e-9 for float64, 1e-5 for float32. Arithmetic is float64 throughout
//   max_iter  Newton steps at the final eps (sweeps in "sinkhorn")
//   mode  "auto": Newton on the semi-dual with the entries that carry the mass, reached through larger eps
//         "sns": 20 sweeps, then Newton on the 2 m largest entries (arXiv:2401.12253)
//         "ssns": the safeguarded variant (Tang and Qiu, NeurIPS 2024)
//         "sinkhorn": alternating sweeps, for comparison
//   f0    [..., n]  a start, such as f of the training step before; skips the larger eps if its error is below 0.5
//
// value, plan, f and g have the dtype of a; f and g are shifted so that a.f = b.g. A problem that has not converged is
// reported in info and by a warning. Counted passes: every sweep over all n m entries but the compaction of the sparse
// plan.
//
// Differentiable any number of times, and in forward mode, with respect to C, a and b: dV = P.dC + f.da + g.db
// (directions with sum da = sum db), and P, f and g by the implicit function theorem on the full plan. Where the
// solution has not converged the gradient is off by the order of the error.
//
// Errors: ValueError for shapes, eps, tol, max_iter and mode, negative or non-finite marginals, unequal masses, NaN or
// -infinity in C, and a row or column with mass but no finite cost; TypeError for dtypes.
TORCH_EXT_API SinkhornResult sinkhorn_newton(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b,
                                             const SinkhornOptions& options,
                                             const std::optional<at::Tensor>& f0 = std::nullopt);

// (alpha, beta) with [[diag p, P], [P^T, diag q]] (alpha, beta) = (u, v), p and q the row and column sums of plan
// [..., n, m], in the gauge p.alpha = q.beta; (u, v) is first projected to sum u = sum v by subtracting a multiple of
// (p, -q). The linear map behind every derivative of the plan; differentiable itself.
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor> sinkhorn_hess_solve(const at::Tensor& plan, const at::Tensor& u,
                                                                     const at::Tensor& v);

// The same transport between points x [..., n, d] and y [..., m, d] with C_ij = |x_i - y_j|^2 / 2, which is computed
// wherever it is needed and never stored: memory O((n + m) d). Returns (value, f, g, info); value is differentiable
// once with respect to x, y, a and b.
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sinkhorn_points(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const SinkhornOptions& options,
    const std::optional<at::Tensor>& f0 = std::nullopt);

// What to say of the problems of `info` [..., 4] that did not converge; empty if all did or info holds no data (meta).
// The functions above warn with it. The operator itself does not, so under torch.compile look at info.
TORCH_EXT_API std::string sinkhorn_unconverged(const std::string& op, const at::Tensor& info);

}  // namespace torch_ext::ops
