// The linear system of a Newton step on the sparsified plan S, after the columns are eliminated:
//   A = diag(d) - S diag(w) S^T,  d_i > 0, w_j > 0,
// positive definite once d carries a shift, since dropped entries leave their mass on the diagonal.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "ops/sinkhorn_newton/sinkhorn_newton_kernel.h"

namespace torch_ext::kernels {

struct NormalSystem {
  const SparsePlan* plan;
  const double* diagonal;
  const double* weight;
  int64_t n, m;
};

struct SolveReport {
  int64_t iterations;
  bool converged;
};

// out = A x.
using LinearMap = std::function<void(const std::vector<double>& x, std::vector<double>& out)>;

LinearMap linear_map(const NormalSystem& system);
// 1 / diagonal of A, which rounding and dropping may bring near 0.
std::vector<double> jacobi(const NormalSystem& system);

// Conjugate gradients from x = 0 with a diagonal preconditioner, until |A x - r| <= tolerance |r|; at most `cap`
// iterations. Stops at a direction of no curvature.
SolveReport conjugate_gradients(const LinearMap& apply, const std::vector<double>& preconditioner, const double* r,
                                double tolerance, int64_t cap, double* x);

// Sparse Cholesky in minimum-degree order. False, leaving x alone, where a pivot is not positive or the factor would
// cost more than `work` multiplications.
bool sparse_cholesky_solve(const NormalSystem& system, const double* r, double work, double* x);

}  // namespace torch_ext::kernels
