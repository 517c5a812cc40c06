// One problem of entropic transport between histograms of mass 1 with positive entries. The control flow and everything
// of length n, m or nnz run on the host; what touches all n * m entries is a pass, which a device supplies. Passes give
// the same bits everywhere, hence so does the whole solver.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops/sinkhorn_newton/sinkhorn_newton_kernel.h"

namespace torch_ext::kernels {

using Vector = std::vector<double>;

// Sweeps over the cost; every pointer is host memory.
class SinkhornPasses {
 public:
  virtual ~SinkhornPasses() = default;
  virtual void rows(const double* g, double inv_eps, double* out) = 0;     // log sum_j exp((g_j - c_ij) / eps)
  virtual void columns(const double* f, double inv_eps, double* out) = 0;  // log sum_i exp((f_i - c_ij) / eps)
  virtual void apply_rows(const SinkhornPoint& at, const double* w, double* out) = 0;     // sum_j P_ij w_j
  virtual void apply_columns(const SinkhornPoint& at, const double* w, double* out) = 0;  // sum_i P_ij w_i
  // Entries whose exponent exceeds min(log_row_i, log_column_j). False, with no plan, if they are more than `limit`.
  virtual bool compact(const SinkhornPoint& at, const double* log_row, const double* log_column, int64_t limit,
                       SparsePlan& plan) = 0;
};

enum class SinkhornMode : uint8_t { kAuto, kSNS, kSSNS, kSinkhorn };

struct SinkhornProblem {
  int64_t n, m;
  const double* a;
  const double* b;
  double eps;
  double tol;         // L1 error of the row marginals (of both in sns and ssns)
  int64_t max_iter;   // Newton steps; sweeps in kSinkhorn
  double cost_range;  // largest - smallest finite cost
  const double* f0;   // start, or null
  const double* g0;   // the same, from the other potential
  SinkhornMode mode;
};

struct SinkhornSolution {
  Vector f, g;
  double mass = 1;  // of the plan
  double error = HUGE_VAL;
  int64_t newton = 0;
  int64_t passes = 0;
  bool converged = false;
};

// A row or column without a finite cost.
struct InfeasibleSupport : std::runtime_error {
  InfeasibleSupport(bool is_row, int64_t at) : std::runtime_error("no finite cost"), row(is_row), index(at) {}
  bool row;
  int64_t index;
};

SinkhornSolution solve_sinkhorn(const SinkhornProblem& problem, SinkhornPasses& passes);

// Shared by the modes: potentials, marginals and the counted passes.
class SinkhornState {
 public:
  SinkhornState(const SinkhornProblem& problem, SinkhornPasses& passes);

  void set_eps(double eps);
  void update_g();                                 // g = g(f): columns become exact
  void update_f();                                 // f = f(g), from the last measure_rows()
  double measure_rows();                           // p and r = a - p at (f, g); returns |r|_1
  double plan_mass();                              // sum of the plan at (f, g), by a pass over the rows
  double dual(double* magnitude = nullptr) const;  // a.f + b.g; sum of |addends|
  // out = P w and P^T w at (f, g), by counted passes.
  void times_plan(const Vector& w, Vector& out);
  void times_plan_transposed(const Vector& w, Vector& out);
  SinkhornPoint point() const { return {solution.f.data(), solution.g.data(), 1 / eps}; }

  const SinkhornProblem& problem;
  SinkhornPasses& passes;
  SinkhornSolution solution;
  double eps;
  Vector log_a, log_b, row_sum, residual;

 private:
  Vector row_log_sum_, column_log_sum_;
};

SinkhornSolution solve_sns(SinkhornState& state);
SinkhornSolution solve_ssns(SinkhornState& state);

}  // namespace torch_ext::kernels
