#include "ops/sinkhorn_newton/sparse_newton_kernel.h"

#include <algorithm>
#include <cmath>

namespace torch_ext::kernels {
namespace {

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double total = 0;
  for (size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
  return total;
}

void apply(const NormalSystem& system, const std::vector<double>& x, std::vector<double>& by_column,
           std::vector<double>& out) {
  const SparsePlan& plan = *system.plan;
  std::fill(by_column.begin(), by_column.end(), 0.0);
  for (int64_t i = 0; i < system.n; ++i) {
    const double xi = x[static_cast<size_t>(i)];
    for (int64_t k = plan.start[static_cast<size_t>(i)]; k < plan.start[static_cast<size_t>(i) + 1]; ++k) {
      by_column[static_cast<size_t>(plan.column[static_cast<size_t>(k)])] += plan.value[static_cast<size_t>(k)] * xi;
    }
  }
  for (int64_t j = 0; j < system.m; ++j) by_column[static_cast<size_t>(j)] *= system.weight[j];
  for (int64_t i = 0; i < system.n; ++i) {
    double total = 0;
    for (int64_t k = plan.start[static_cast<size_t>(i)]; k < plan.start[static_cast<size_t>(i) + 1]; ++k) {
      total += plan.value[static_cast<size_t>(k)] * by_column[static_cast<size_t>(plan.column[static_cast<size_t>(k)])];
    }
    out[static_cast<size_t>(i)] = system.diagonal[i] * x[static_cast<size_t>(i)] - total;
  }
}

}  // namespace

std::vector<double> jacobi(const NormalSystem& system) {
  const SparsePlan& plan = *system.plan;
  std::vector<double> inverse(static_cast<size_t>(system.n));
  for (size_t i = 0; i < inverse.size(); ++i) {
    double total = 0;
    for (int64_t k = plan.start[i]; k < plan.start[i + 1]; ++k) {
      const double s = plan.value[static_cast<size_t>(k)];
      total += s * s * system.weight[plan.column[static_cast<size_t>(k)]];
    }
    inverse[i] = 1 / std::max(system.diagonal[i] - total, 1e-3 * system.diagonal[i]);
  }
  return inverse;
}

LinearMap linear_map(const NormalSystem& system) {
  return [system, by_column = std::vector<double>(static_cast<size_t>(system.m))](
             const std::vector<double>& x, std::vector<double>& out) mutable { apply(system, x, by_column, out); };
}

SolveReport conjugate_gradients(const LinearMap& apply, const std::vector<double>& inverse, const double* r,
                                double tolerance, int64_t cap, double* x) {
  const size_t n = inverse.size();
  std::vector<double> residual(r, r + n), z(n), p(n), q(n);
  std::fill(x, x + n, 0.0);
  for (size_t i = 0; i < n; ++i) p[i] = z[i] = inverse[i] * residual[i];
  const double goal = tolerance * std::sqrt(dot(residual, residual));
  double rz = dot(residual, z);
  for (int64_t iteration = 0; iteration < cap; ++iteration) {
    if (!(std::sqrt(dot(residual, residual)) > goal)) return {iteration, true};
    apply(p, q);
    const double curvature = dot(p, q);
    if (!(curvature > 0)) return {iteration, false};
    const double alpha = rz / curvature;
    for (size_t i = 0; i < n; ++i) {
      x[i] += alpha * p[i];
      residual[i] -= alpha * q[i];
      z[i] = inverse[i] * residual[i];
    }
    const double next = dot(residual, z), beta = next / rz;
    rz = next;
    for (size_t i = 0; i < n; ++i) p[i] = z[i] + beta * p[i];
  }
  return {cap, false};
}

}  // namespace torch_ext::kernels
