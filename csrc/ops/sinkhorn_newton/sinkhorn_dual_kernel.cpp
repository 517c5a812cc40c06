// Newton methods on both potentials: the paper's (mode "sns", arXiv:2401.12253) and SSNS (Tang and Qiu, NeurIPS 2024),
// for comparison with mode "auto". They maximise F(f, g) = a.f + b.g - eps sum P, whose Hessian is -1/eps times
//   M = [[diag p, P], [P^T, diag q]]   (positive semidefinite, null vector (1, -1)),
// so the ascent step solves M dz = eps grad F. (Solving it with the negative gradient, as some write-ups print,
// descends.)
#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>

#include "ops/sinkhorn_newton/sinkhorn_solver_kernel.h"
#include "ops/sinkhorn_newton/sparse_newton_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr double kEverything = -700.0;  // log of the smallest entry of a full plan
constexpr int64_t kCgCap = 300;
constexpr double kCholeskyWork = 4e9;

class BothPotentials {
 public:
  explicit BothPotentials(SinkhornState& state)
      : s_(state),
        everything_row_(s_.log_a.size(), kEverything),
        everything_column_(s_.log_b.size(), kEverything),
        column_sum_(s_.log_b.size()),
        column_residual_(s_.log_b.size()) {}

  // The full plan at (f, g), its marginals and gradient; returns the L1 error of both marginals.
  double measure() {
    s_.passes.compact(s_.point(), everything_row_.data(), everything_column_.data(),
                      std::numeric_limits<int64_t>::max(), full_);
    std::fill(s_.row_sum.begin(), s_.row_sum.end(), 0.0);
    std::fill(column_sum_.begin(), column_sum_.end(), 0.0);
    for_each(full_, [&](size_t i, size_t j, double value) {
      s_.row_sum[i] += value;
      column_sum_[j] += value;
    });
    double error = 0, square = 0;
    const auto add = [&](double r) {
      error += std::abs(r);
      square += r * r;
    };
    for (size_t i = 0; i < s_.row_sum.size(); ++i) add(s_.residual[i] = s_.problem.a[i] - s_.row_sum[i]);
    for (size_t j = 0; j < column_sum_.size(); ++j) add(column_residual_[j] = s_.problem.b[j] - column_sum_[j]);
    gradient_norm_ = std::sqrt(square);
    return s_.solution.error = error;
  }

  // F by a counted pass.
  double objective() { return s_.dual() - s_.eps * s_.plan_mass(); }

  // What rounding may hide of a gain.
  double slack() const {
    double magnitude = 0;
    s_.dual(&magnitude);
    return 1e-14 * magnitude;
  }

  // Solves [[diag p + shift, S], [S^T, diag q + shift]] dz = eps grad on the kept plan, without its last column if
  // `fix_last` (g_m stays). Returns grad . dz.
  double direction(double shift, double relative_shift, bool fix_last) {
    const size_t n = s_.row_sum.size(), m = column_sum_.size(), used = fix_last ? m - 1 : m;
    Vector diagonal(n), weight(m, 0.0), rhs(s_.residual);
    for (size_t i = 0; i < n; ++i) diagonal[i] = s_.row_sum[i] * (1 + relative_shift) + shift;
    for (size_t j = 0; j < used; ++j) weight[j] = 1 / std::max(column_sum_[j] + shift, 1e-300);
    for_each(kept, [&](size_t i, size_t j, double value) { rhs[i] -= value * weight[j] * column_residual_[j]; });
    df.assign(n, 0.0);
    const NormalSystem system{&kept, diagonal.data(), weight.data(), s_.problem.n, s_.problem.m};
    const double tolerance = std::clamp(0.1 * s_.solution.error, 1e-10, 0.1);
    if (!conjugate_gradients(linear_map(system), jacobi(system), rhs.data(), tolerance, kCgCap, df.data()).converged) {
      sparse_cholesky_solve(system, rhs.data(), kCholeskyWork, df.data());
    }
    dg.assign(m, 0.0);
    for_each(kept, [&](size_t i, size_t j, double value) { dg[j] -= value * df[i]; });
    double slope = 0;
    for (size_t j = 0; j < m; ++j) {
      dg[j] = (column_residual_[j] + dg[j]) * weight[j] * s_.eps;
      slope += column_residual_[j] * dg[j];
    }
    for (size_t i = 0; i < n; ++i) {
      df[i] *= s_.eps;
      slope += s_.residual[i] * df[i];
    }
    return slope;
  }

  void move(const Vector& f, const Vector& g, double t) {
    for (size_t i = 0; i < f.size(); ++i) s_.solution.f[i] = f[i] + t * df[i];
    for (size_t j = 0; j < g.size(); ++j) s_.solution.g[j] = g[j] + t * dg[j];
  }

  void keep_largest(int64_t count);
  void keep_mass(double delta);
  // Status of the result.
  SinkhornSolution finish(double error) {
    s_.solution.mass = 0;
    for (const double q : column_sum_) s_.solution.mass += q;
    s_.solution.converged = error <= s_.problem.tol;
    return std::move(s_.solution);
  }
  double gradient_norm() const { return gradient_norm_; }

  SparsePlan kept;
  Vector df, dg;

 private:
  template <typename Body>
  static void for_each(const SparsePlan& plan, const Body& body) {
    for (size_t i = 0; i + 1 < plan.start.size(); ++i) {
      for (auto k = static_cast<size_t>(plan.start[i]); k < static_cast<size_t>(plan.start[i + 1]); ++k) {
        body(i, static_cast<size_t>(plan.column[k]), plan.value[k]);
      }
    }
  }

  template <typename Keep>
  void keep_where(const Keep& keep) {
    kept.start.assign(1, 0);
    kept.column.clear();
    kept.value.clear();
    for (size_t i = 0; i + 1 < full_.start.size(); ++i) {
      for (auto k = static_cast<size_t>(full_.start[i]); k < static_cast<size_t>(full_.start[i + 1]); ++k) {
        if (!keep(k)) continue;
        kept.column.push_back(full_.column[k]);
        kept.value.push_back(full_.value[k]);
      }
      kept.start.push_back(static_cast<int64_t>(kept.value.size()));
    }
  }

  SinkhornState& s_;
  Vector everything_row_, everything_column_, column_sum_, column_residual_;
  SparsePlan full_;
  double gradient_norm_ = 0;
};

// The entries not smaller than the count-th largest.
void BothPotentials::keep_largest(int64_t count) {
  double threshold = 0;
  if (count < static_cast<int64_t>(full_.value.size())) {
    Vector sorted(full_.value);
    std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<>());
    threshold = sorted[static_cast<size_t>(count - 1)];
  }
  keep_where([&](size_t k) { return full_.value[k] >= threshold; });
}

// Per column drops the smallest entries while their sum is at most delta, then per row takes the largest back until the
// dropped sum is at most 2 delta. The last column, whose potential is fixed, is dropped whole.
void BothPotentials::keep_mass(double delta) {
  std::vector<std::vector<size_t>> by_column(column_sum_.size());
  for (size_t k = 0; k < full_.value.size(); ++k) by_column[static_cast<size_t>(full_.column[k])].push_back(k);
  std::vector<uint8_t> keep(full_.value.size(), 1);
  const auto larger = [&](size_t x, size_t y) { return full_.value[x] > full_.value[y]; };
  for (auto& entries : by_column) {
    std::sort(entries.begin(), entries.end(), [&](size_t x, size_t y) { return larger(y, x); });
    double dropped = 0;
    for (const size_t k : entries) {
      if ((dropped += full_.value[k]) > delta) break;
      keep[k] = 0;
    }
  }
  std::vector<size_t> lost;
  for (size_t i = 0; i + 1 < full_.start.size(); ++i) {
    lost.clear();
    double dropped = 0;
    for (auto k = static_cast<size_t>(full_.start[i]); k < static_cast<size_t>(full_.start[i + 1]); ++k) {
      if (keep[k] != 0) continue;
      lost.push_back(k);
      dropped += full_.value[k];
    }
    std::sort(lost.begin(), lost.end(), larger);
    for (size_t t = 0; t < lost.size() && dropped > 2 * delta; ++t) {
      keep[lost[t]] = 1;
      dropped -= full_.value[lost[t]];
    }
  }
  const auto last = static_cast<int32_t>(column_sum_.size() - 1);
  keep_where([&](size_t k) { return keep[k] != 0 && full_.column[k] != last; });
}

// False, with the potentials put back, where no step of the list gains what it should.
template <typename Enough>
bool first_step(SinkhornState& s, BothPotentials& both, double before, std::initializer_list<double> steps,
                const Enough& enough) {
  const Vector f = s.solution.f, g = s.solution.g;
  for (const double t : steps) {
    both.move(f, g, t);
    const double after = both.objective();
    if (std::isfinite(after) && enough(after - before, t)) return true;
  }
  s.solution.f = f;
  s.solution.g = g;
  return false;
}

void sweep(SinkhornState& s) {
  s.measure_rows();
  s.update_f();
  s.update_g();
}

}  // namespace

// The paper's stages: 20 sweeps, then Newton steps on the ceil(lambda n m), lambda = 2 / n, largest entries.
SinkhornSolution solve_sns(SinkhornState& s) {
  constexpr int kSweeps = 20;
  s.update_g();
  for (int k = 0; k < kSweeps; ++k) sweep(s);
  BothPotentials both(s);
  double error = both.measure();
  for (; s.solution.newton < s.problem.max_iter && error > s.problem.tol; error = both.measure()) {
    ++s.solution.newton;
    both.keep_largest(2 * s.problem.m);
    const double slope = both.direction(0, 1e-13, /*fix_last=*/false);
    const double before = both.objective(), slack = both.slack();
    const auto armijo = [&](double gain, double t) { return gain >= 1e-4 * t * slope - slack; };
    if (!first_step(s, both, before, {1, 0.5, 0.25, 0.125, 0x1p-4, 0x1p-5, 0x1p-6, 0x1p-7, 0x1p-8, 0x1p-9}, armijo)) {
      sweep(s);
    }
  }
  return both.finish(error);
}

// Trust region on the shift: mu |grad|, mu * 4 below a quarter of the predicted gain, / 2 above three quarters.
SinkhornSolution solve_ssns(SinkhornState& s) {
  s.update_g();
  sweep(s);
  BothPotentials both(s);
  double error = both.measure(), mu = 1;
  for (; s.solution.newton < s.problem.max_iter && error > s.problem.tol; error = both.measure()) {
    ++s.solution.newton;
    both.keep_mass(0.01 * both.gradient_norm());
    const double slope = both.direction(mu * both.gradient_norm(), 0, /*fix_last=*/true);
    const double before = both.objective(), slack = both.slack();
    double rho = 0;
    const auto gains = [&](double gain, double t) {
      rho = (gain + slack) / (slope * (t - 0.5 * t * t));
      return rho > 0;
    };
    const bool moved = slope > 0 && first_step(s, both, before, {1, 0.5, 0.25, 0.1}, gains);
    if (!moved || rho < 0.25) {
      mu *= 4;
    } else if (rho > 0.75) {
      mu = std::max(mu / 2, 1e-3);
    }
  }
  return both.finish(error);
}

}  // namespace torch_ext::kernels
