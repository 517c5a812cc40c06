// What the modes of the solver share: potentials, marginals and counted passes.
#include <algorithm>
#include <cmath>

#include "ops/sinkhorn_newton/sinkhorn_solver_kernel.h"

namespace torch_ext::kernels {

SinkhornState::SinkhornState(const SinkhornProblem& of, SinkhornPasses& with)
    : problem(of),
      passes(with),
      eps(of.eps),
      log_a(static_cast<size_t>(of.n)),
      log_b(static_cast<size_t>(of.m)),
      row_sum(log_a.size()),
      residual(log_a.size()),
      row_log_sum_(log_a.size()),
      column_log_sum_(log_b.size()) {
  for (size_t i = 0; i < log_a.size(); ++i) log_a[i] = logarithm(of.a[i]);
  for (size_t j = 0; j < log_b.size(); ++j) log_b[j] = logarithm(of.b[j]);
  solution.f.assign(log_a.size(), 0.0);
  solution.g.assign(log_b.size(), 0.0);
  if (of.f0 != nullptr) solution.f.assign(of.f0, of.f0 + of.n);
  if (of.g0 != nullptr) {
    solution.g.assign(of.g0, of.g0 + of.m);
    plan_mass();
    update_f();
  }
}

void SinkhornState::set_eps(double value) { eps = value; }

void SinkhornState::update_g() {
  passes.columns(solution.f.data(), 1 / eps, column_log_sum_.data());
  ++solution.passes;
  for (size_t j = 0; j < solution.g.size(); ++j) {
    if (!(column_log_sum_[j] > -HUGE_VAL)) throw InfeasibleSupport(false, static_cast<int64_t>(j));
    solution.g[j] = eps * (log_b[j] - column_log_sum_[j]);
  }
}

double SinkhornState::plan_mass() {
  passes.rows(solution.g.data(), 1 / eps, row_log_sum_.data());
  ++solution.passes;
  double total = 0;
  for (size_t i = 0; i < row_sum.size(); ++i) {
    if (!(row_log_sum_[i] > -HUGE_VAL)) throw InfeasibleSupport(true, static_cast<int64_t>(i));
    row_sum[i] = exponential(solution.f[i] / eps + row_log_sum_[i], kUnderflow);
    total += row_sum[i];
  }
  return total;
}

double SinkhornState::measure_rows() {
  plan_mass();
  double drift = 0;
  for (size_t i = 0; i < row_sum.size(); ++i) drift += residual[i] = problem.a[i] - row_sum[i];
  double error = 0;
  for (size_t i = 0; i < residual.size(); ++i) {
    residual[i] -= problem.a[i] * drift;  // rounding: the exact residual sums to 0
    error += std::abs(residual[i]);
  }
  return solution.error = error;
}

void SinkhornState::update_f() {
  for (size_t i = 0; i < solution.f.size(); ++i) solution.f[i] = eps * (log_a[i] - row_log_sum_[i]);
}

void SinkhornState::times_plan(const Vector& w, Vector& out) {
  passes.apply_rows(point(), w.data(), out.data());
  ++solution.passes;
}

void SinkhornState::times_plan_transposed(const Vector& w, Vector& out) {
  passes.apply_columns(point(), w.data(), out.data());
  ++solution.passes;
}

double SinkhornState::dual(double* magnitude) const {
  double total = 0, size = 0;
  const auto add = [&](double term) {
    total += term;
    size += std::abs(term);
  };
  for (size_t i = 0; i < solution.f.size(); ++i) add(problem.a[i] * solution.f[i]);
  for (size_t j = 0; j < solution.g.size(); ++j) add(problem.b[j] * solution.g[j]);
  if (magnitude != nullptr) *magnitude = size;
  return total;
}

}  // namespace torch_ext::kernels
