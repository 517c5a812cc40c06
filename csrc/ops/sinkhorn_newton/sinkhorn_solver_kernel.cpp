// The semi-dual Newton method (mode "auto") and plain Sinkhorn sweeps.
//
// With g eliminated, g(f) = eps (log b - LSE_i((f_i - c_ij) / eps)), the columns are exact and nothing can overflow.
// The concave h(f) = a.f + b.g(f) has gradient a - p and -eps Hessian = diag(p) - P diag(1/b) P^T, of which a Newton
// step sees the part that carries the mass: dropping at most a fraction delta <= error of each row and column keeps the
// quadratic rate, where a fixed number of entries (arXiv:2401.12253) gives a linear one.
#include "ops/sinkhorn_newton/sinkhorn_solver_kernel.h"

#include <algorithm>
#include <cmath>

#include "ops/sinkhorn_newton/sparse_newton_kernel.h"

namespace torch_ext::kernels {

namespace {

constexpr double kAnnealFactor = 0.125;
constexpr double kAnnealTolerance = 5e-2;
constexpr int64_t kAnnealSteps = 10;
constexpr double kWarmError = 0.5;   // a start this good needs no annealing
constexpr double kFarRow = 0.5;      // p_i / a_i below this, or above 1 / this, asks for a Sinkhorn update first
constexpr double kLongestStep = 10;  // in eps
constexpr double kLinear = 0.95;     // gain over predicted gain of a step that may be extended
constexpr int64_t kCgCap = 300;
// Kept entries beyond which the plan is applied entry by entry instead: at such a large eps a few iterations do, and a
// pass costs no more than a product with so many stored entries, whose memory would exceed the cost's.
constexpr int64_t kMaxKept = int64_t{1} << 22;
constexpr double kCholeskyWork = 4e9;

class SemiDual {
 public:
  explicit SemiDual(SinkhornState& state) : s_(state) {}

  // Newton steps at one eps until the error is at most tol. g must be g(f), and its rows measured.
  bool solve(double tol, int64_t max_steps) {
    for (int64_t step = 0;; ++step) {
      if (step > 0) s_.measure_rows();
      if (s_.solution.error <= tol) return true;
      if (step == max_steps || !std::isfinite(s_.solution.error)) return false;
      if (some_row_is_far()) {  // Newton from rows with p_i << a_i diverges
        s_.update_f();
        s_.update_g();
        if (s_.measure_rows() <= tol) return true;
      }
      newton_step();
    }
  }

 private:
  bool some_row_is_far() const {
    for (size_t i = 0; i < s_.row_sum.size(); ++i) {
      const double ratio = s_.row_sum[i] / s_.problem.a[i];
      if (!(ratio > kFarRow && ratio < 1 / kFarRow)) return true;
    }
    return false;
  }

  void newton_step() {
    ++s_.solution.newton;
    const Vector dx = direction();
    if (line_search(dx)) return;
    s_.update_f();
    s_.update_g();
  }

  // Entries above delta min(a_i / m, b_j / n): at most delta a_i of a row and delta b_j of a column are dropped.
  bool sparsify(double delta) {
    const double log_n = logarithm(static_cast<double>(s_.problem.n)),
                 log_m = logarithm(static_cast<double>(s_.problem.m));
    const double log_delta = logarithm(delta);
    log_row_.resize(s_.log_a.size());
    log_column_.resize(s_.log_b.size());
    for (size_t i = 0; i < log_row_.size(); ++i) log_row_[i] = log_delta + s_.log_a[i] - log_m;
    for (size_t j = 0; j < log_column_.size(); ++j) log_column_[j] = log_delta + s_.log_b[j] - log_n;
    return s_.passes.compact(s_.point(), log_row_.data(), log_column_.data(), kMaxKept, plan_);
  }

  // Solves (diag(p)(1 + shift) - S diag(1/b) S^T) dx = r on the kept entries. Where conjugate gradients have hit their
  // cap once, later steps, which are harder, go to the factorisation at once.
  void solve_sparse(const Vector& diagonal, const Vector& weight, double tolerance, Vector& dx) {
    const NormalSystem system{&plan_, diagonal.data(), weight.data(), s_.problem.n, s_.problem.m};
    const auto iterate = [&] {
      return conjugate_gradients(linear_map(system), jacobi(system), s_.residual.data(), tolerance, kCgCap, dx.data())
          .converged;
    };
    if (!direct_) direct_ = !iterate();
    if (!direct_ || sparse_cholesky_solve(system, s_.residual.data(), kCholeskyWork, dx.data())) return;
    direct_ = false;
    iterate();
  }

  void solve_full(const Vector& diagonal, const Vector& weight, double tolerance, Vector& dx) {
    Vector by_column(weight.size()), inverse(diagonal.size());
    for (size_t i = 0; i < inverse.size(); ++i) inverse[i] = 1 / diagonal[i];
    const LinearMap apply = [&](const Vector& x, Vector& out) {
      s_.times_plan_transposed(x, by_column);
      for (size_t j = 0; j < by_column.size(); ++j) by_column[j] *= weight[j];
      s_.times_plan(by_column, out);
      for (size_t i = 0; i < out.size(); ++i) out[i] = diagonal[i] * x[i] - out[i];
    };
    conjugate_gradients(apply, inverse, s_.residual.data(), tolerance, kCgCap, dx.data());
  }

  Vector direction() {
    const double error = s_.solution.error;
    const double shift = std::min(1e-2, 0.1 * error) + 1e-13;
    Vector diagonal(s_.row_sum), weight(s_.log_b.size()), dx(diagonal.size());
    for (double& d : diagonal) d *= 1 + shift;
    for (size_t j = 0; j < weight.size(); ++j) weight[j] = 1 / s_.problem.b[j];
    const double tolerance = std::clamp(error, 1e-10, 0.1);
    if (sparsify(std::min(0.1, error))) {
      solve_sparse(diagonal, weight, tolerance, dx);
    } else {
      solve_full(diagonal, weight, tolerance, dx);
    }
    double mean = 0;
    for (size_t i = 0; i < dx.size(); ++i) mean += s_.problem.a[i] * dx[i];
    double largest = 0;
    for (double& d : dx) largest = std::max(largest, std::abs(d -= mean));
    clipped_ = largest > kLongestStep;
    const double scale = clipped_ ? kLongestStep / largest : 1.0;
    for (double& d : dx) d *= scale * s_.eps;
    return dx;
  }

  void move(const Vector& f, double t, const Vector& df) {
    for (size_t i = 0; i < f.size(); ++i) s_.solution.f[i] = f[i] + t * df[i];
    s_.update_g();
  }

  bool line_search(const Vector& df) {
    const Vector f = s_.solution.f, g = s_.solution.g;
    double magnitude = 0;  // of the addends, whose rounding hides the gain of the last steps
    const double before = s_.dual(&magnitude);
    double slope = 0;
    for (size_t i = 0; i < df.size(); ++i) slope += s_.residual[i] * df[i];
    if (!std::isfinite(slope)) return false;
    for (double t = 1; t > 1e-3; t *= 0.5) {
      move(f, t, df);
      const double after = s_.dual();
      if (after < before + 1e-4 * t * slope - 1e-14 * magnitude) continue;
      if (t == 1 && clipped_ && after >= before + kLinear * slope) extend(f, df, slope, after);
      return true;
    }
    s_.solution.f = f;
    s_.solution.g = g;
    return false;
  }

  // At small eps the dual is nearly piecewise linear: blocks of the plan that hardly touch must travel many eps before
  // the slope changes, so a step that was cut and is still on its linear piece is doubled while it pays.
  void extend(const Vector& f, const Vector& df, double slope, double reached) {
    for (double t = 2; t < 1e6; t *= 2) {
      const Vector f_before = s_.solution.f, g_before = s_.solution.g;
      move(f, t, df);
      const double after = s_.dual();
      if (!(after >= reached + 0.25 * t * slope)) {  // half the slope over the last half
        s_.solution.f = f_before;
        s_.solution.g = g_before;
        return;
      }
      reached = after;
    }
  }

  SinkhornState& s_;
  SparsePlan plan_;
  Vector log_row_, log_column_;
  bool direct_ = false, clipped_ = false;
};

void solve_auto(SinkhornState& s) {
  const double eps = s.problem.eps, tol = s.problem.tol;
  SemiDual method(s);
  bool warm = false;
  if (s.problem.f0 != nullptr || s.problem.g0 != nullptr) {
    s.update_g();
    warm = s.measure_rows() < kWarmError;
    if (!warm) std::fill(s.solution.f.begin(), s.solution.f.end(), 0.0);
  }
  if (!warm) {
    for (double e = s.problem.cost_range * kAnnealFactor; e > eps; e = std::max(eps, e * kAnnealFactor)) {
      s.set_eps(e);
      s.update_g();
      s.measure_rows();
      method.solve(kAnnealTolerance, kAnnealSteps);
    }
    s.set_eps(eps);
    s.update_g();
    s.measure_rows();
  }
  s.solution.converged = method.solve(tol, s.problem.max_iter);
}

void solve_sweeps(SinkhornState& s) {
  s.update_g();
  for (int64_t sweep = 0;; ++sweep) {
    s.solution.converged = s.measure_rows() <= s.problem.tol;
    if (s.solution.converged || sweep >= s.problem.max_iter) return;
    s.update_f();
    s.update_g();
  }
}

}  // namespace

SinkhornSolution solve_sinkhorn(const SinkhornProblem& problem, SinkhornPasses& passes) {
  SinkhornState state(problem, passes);
  switch (problem.mode) {
    case SinkhornMode::kAuto:
      solve_auto(state);
      break;
    case SinkhornMode::kSinkhorn:
      solve_sweeps(state);
      break;
    case SinkhornMode::kSNS:
      return solve_sns(state);
    case SinkhornMode::kSSNS:
      return solve_ssns(state);
  }
  return std::move(state.solution);
}

}  // namespace torch_ext::kernels
