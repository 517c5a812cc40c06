// Many problems: checks of the marginals, what is dropped and turned before solving, and the way back.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "ops/sinkhorn_newton/sinkhorn_solver_kernel.h"

namespace torch_ext::ops {

using SymSizes = c10::SmallVector<c10::SymInt, 5>;

// All sizes but the last `own`.
inline c10::SymIntArrayRef leading(const at::Tensor& tensor, int64_t own) {
  return tensor.sym_sizes().slice(0, static_cast<size_t>(tensor.dim() - own));
}
inline SymSizes with(SymSizes sizes, std::initializer_list<c10::SymInt> last) {
  sizes.append(last.begin(), last.end());
  return sizes;
}

struct SinkhornSettings {
  const char* op;  // named in messages
  double eps, tol, mass_tolerance;
  int64_t max_iter;
  kernels::SinkhornMode mode;
};

kernels::SinkhornMode sinkhorn_mode(const char* op, const std::string& mode);
void check_settings(const char* op, double eps, std::optional<double> tol, int64_t max_iter);
// 1e-9 for float64, 1e-5 for float32 if not given; 1e-6 and 1e-4 for the marginals' masses.
SinkhornSettings settings_for(const char* op, at::ScalarType result, double eps, std::optional<double> tol,
                              int64_t max_iter, const std::string& mode);

// A cost and what keeps its memory alive.
struct CostView {
  kernels::SinkhornCost cost;
  double range;  // largest - smallest finite entry, or a bound
  std::vector<at::Tensor> owners;
};
// The cost of a problem without the rows and columns that are not in the index lists (undefined: all of them), turned
// if `transposed`.
using CostSource =
    std::function<CostView(int64_t problem, const at::Tensor& rows, const at::Tensor& columns, bool transposed)>;

// Potentials of one problem as the passes use them: mass 1, -infinity where the marginal is 0.
struct RawPotentials {
  kernels::Vector f, g;
  double mass, offset;
};

struct BatchSolution {
  std::vector<RawPotentials> raw;
  at::Tensor value, f, g, info;  // float64 on the host: [B], [B, n], [B, m], [B, 4]
};

// a [B, n], b [B, m] and f0 (or undefined) [B, n]: float64 on the host.
BatchSolution solve_batch(const SinkhornSettings& settings, const at::Tensor& a, const at::Tensor& b,
                          const at::Tensor& f0, const at::Device& device, const CostSource& source);

}  // namespace torch_ext::ops
