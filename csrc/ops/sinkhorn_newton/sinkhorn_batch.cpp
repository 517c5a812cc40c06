#include "ops/sinkhorn_newton/sinkhorn_batch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "ops/sinkhorn_newton/sinkhorn_passes.h"

namespace torch_ext::ops {

using kernels::SinkhornMode;
using kernels::SinkhornProblem;
using kernels::SinkhornSolution;
using kernels::Vector;

kernels::SinkhornMode sinkhorn_mode(const char* op, const std::string& mode) {
  if (mode == "auto") return SinkhornMode::kAuto;
  if (mode == "sns") return SinkhornMode::kSNS;
  if (mode == "ssns") return SinkhornMode::kSSNS;
  TORCH_CHECK_VALUE(mode == "sinkhorn", op, ": mode must be 'auto', 'sns', 'ssns' or 'sinkhorn', got '", mode, "'");
  return SinkhornMode::kSinkhorn;
}

void check_settings(const char* op, double eps, std::optional<double> tol, int64_t max_iter) {
  TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), op, ": eps must be a finite number > 0, got ", eps);
  TORCH_CHECK_VALUE(!tol.has_value() || *tol > 0, op, ": tol must be > 0, got ", tol.value_or(0));
  TORCH_CHECK_VALUE(max_iter >= 1, op, ": max_iter must be at least 1, got ", max_iter);
}

SinkhornSettings settings_for(const char* op, at::ScalarType result, double eps, std::optional<double> tol,
                              int64_t max_iter, const std::string& mode) {
  check_settings(op, eps, tol, max_iter);
  const bool wide = result == at::kDouble;
  return {op, eps, tol.value_or(wide ? 1e-9 : 1e-5), wide ? 1e-6 : 1e-4, max_iter, sinkhorn_mode(op, mode)};
}

namespace {

// One problem without what has no mass, scaled to mass 1, with at most as many rows as columns: the Newton system has
// a row per row.
struct Prepared {
  std::vector<int64_t> rows, columns;  // kept
  Vector a, b, start;
  double mass = 0;
  bool transposed = false;
  CostView view;
};

double checked_sum(const SinkhornSettings& s, const char* name, const double* marginal, int64_t size, int64_t problem,
                   std::vector<int64_t>& kept) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) {
    TORCH_CHECK_VALUE(std::isfinite(marginal[i]) && marginal[i] >= 0, s.op, ": ", name, "[", i, "] of problem ",
                      problem, " is ", marginal[i], "; a marginal holds finite masses >= 0");
    total += marginal[i];
    if (marginal[i] > 0) kept.push_back(i);
  }
  TORCH_CHECK_VALUE(total > 0 && std::isfinite(total), s.op, ": ", name, " of problem ", problem, " sums to ", total,
                    "; there must be some mass to move");
  return total;
}

Vector gathered(const double* from, const std::vector<int64_t>& kept, double scale) {
  Vector out;
  for (const int64_t i : kept) out.push_back(from[i] * scale);
  return out;
}

at::Tensor index_of(const std::vector<int64_t>& kept, int64_t size, const at::Device& device) {
  if (static_cast<int64_t>(kept.size()) == size) return {};
  return at::from_blob(const_cast<int64_t*>(kept.data()), {static_cast<int64_t>(kept.size())},
                       at::TensorOptions(at::kLong))
      .to(device, at::kLong, /*non_blocking=*/false, /*copy=*/true);
}

Prepared prepare(const SinkhornSettings& s, int64_t problem, const double* a, int64_t n, const double* b, int64_t m,
                 const double* f0, const at::Device& device, const CostSource& source) {
  Prepared p;
  const double mass_a = checked_sum(s, "a", a, n, problem, p.rows),
               mass_b = checked_sum(s, "b", b, m, problem, p.columns);
  TORCH_CHECK_VALUE(std::abs(mass_a - mass_b) <= s.mass_tolerance * mass_a, s.op, ": problem ", problem, ": a sums to ",
                    mass_a, " and b to ", mass_b, "; both must carry the same mass (to a relative ", s.mass_tolerance,
                    "): normalise them, or add a point that takes the rest");
  p.mass = mass_a;
  p.a = gathered(a, p.rows, 1 / mass_a);
  p.b = gathered(b, p.columns, 1 / mass_b);
  if (f0 != nullptr) {
    for (const int64_t i : p.rows) {
      TORCH_CHECK_VALUE(std::isfinite(f0[i]), s.op, ": f0[", i, "] of problem ", problem, " is ", f0[i],
                        "; a start must be finite wherever a > 0");
    }
    p.start = gathered(f0, p.rows, 1);
  }
  p.transposed = p.rows.size() > p.columns.size();
  p.view = source(problem, index_of(p.rows, n, device), index_of(p.columns, m, device), p.transposed);
  return p;
}

SinkhornSolution solve_one(const SinkhornSettings& s, int64_t problem, const Prepared& p, const at::Device& device) {
  const Vector& a = p.transposed ? p.b : p.a;
  const Vector& b = p.transposed ? p.a : p.b;
  const double* start = p.start.empty() ? nullptr : p.start.data();
  const auto passes = make_passes(p.view.cost, device);
  try {
    SinkhornSolution solution =
        kernels::solve_sinkhorn({p.view.cost.n, p.view.cost.m, a.data(), b.data(), s.eps, s.tol, s.max_iter,
                                 p.view.range, p.transposed ? nullptr : start, p.transposed ? start : nullptr, s.mode},
                                *passes);
    if (p.transposed) std::swap(solution.f, solution.g);
    return solution;
  } catch (const kernels::InfeasibleSupport& error) {
    const bool row = error.row != p.transposed;
    const int64_t at = (row ? p.rows : p.columns)[static_cast<size_t>(error.index)];
    TORCH_CHECK_VALUE(false, s.op, ": ", row ? "row " : "column ", at, " of problem ", problem,
                      " has mass but no finite cost; allow it a partner or set its marginal to 0");
  }
}

double inner(const Vector& weight, const Vector& x) {
  double total = 0;
  for (size_t i = 0; i < weight.size(); ++i) total += weight[i] * x[i];
  return total;
}

Vector scattered(const Vector& from, const std::vector<int64_t>& kept, int64_t size) {
  Vector out(static_cast<size_t>(size), -std::numeric_limits<double>::infinity());
  for (size_t i = 0; i < kept.size(); ++i) out[static_cast<size_t>(kept[i])] = from[i];
  return out;
}

// f + g gains offset and eps log(mass), split so that a.f = b.g.
void write_solution(const SinkhornSettings& s, const Prepared& p, const SinkhornSolution& solution, int64_t problem,
                    BatchSolution& out) {
  const double gain = p.view.cost.offset + s.eps * kernels::logarithm(p.mass);
  const double af = inner(p.a, solution.f), bg = inner(p.b, solution.g), t = 0.5 * (bg + gain - af);
  RawPotentials& raw = out.raw[static_cast<size_t>(problem)];
  raw = {scattered(solution.f, p.rows, out.f.size(1)), scattered(solution.g, p.columns, out.g.size(1)), p.mass,
         p.view.cost.offset};
  auto* f = out.f.mutable_data_ptr<double>() + problem * out.f.size(1);
  auto* g = out.g.mutable_data_ptr<double>() + problem * out.g.size(1);
  for (size_t i = 0; i < raw.f.size(); ++i) f[i] = raw.f[i] + t;
  for (size_t j = 0; j < raw.g.size(); ++j) g[j] = raw.g[j] + (gain - t);
  out.value.mutable_data_ptr<double>()[problem] = p.mass * (af + bg + gain - s.eps * solution.mass);
  double* info = out.info.mutable_data_ptr<double>() + problem * 4;
  info[0] = solution.error;
  info[1] = static_cast<double>(solution.newton);
  info[2] = static_cast<double>(solution.passes);
  info[3] = solution.converged ? 1 : 0;
}

}  // namespace

BatchSolution solve_batch(const SinkhornSettings& settings, const at::Tensor& a, const at::Tensor& b,
                          const at::Tensor& f0, const at::Device& device, const CostSource& source) {
  const int64_t count = a.size(0), n = a.size(1), m = b.size(1);
  BatchSolution out;
  out.raw.resize(static_cast<size_t>(count));
  out.value = at::empty({count}, a.options());
  out.f = at::empty({count, n}, a.options());
  out.g = at::empty({count, m}, a.options());
  out.info = at::empty({count, 4}, a.options());
  std::vector<Prepared> prepared;
  for (int64_t k = 0; k < count; ++k) {
    prepared.push_back(prepare(settings, k, a.const_data_ptr<double>() + k * n, n, b.const_data_ptr<double>() + k * m,
                               m, f0.defined() ? f0.const_data_ptr<double>() + k * n : nullptr, device, source));
  }
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Prepared& p = prepared[static_cast<size_t>(k)];
      write_solution(settings, p, solve_one(settings, k, p, device), k, out);
    }
  };
  // Problems side by side where there are enough of them, else the threads share each pass: the bits are the same.
  if (device.is_cpu() && count >= at::get_num_threads()) {
    at::parallel_for(0, count, 1, run);
  } else {
    run(0, count);
  }
  return out;
}

}  // namespace torch_ext::ops
