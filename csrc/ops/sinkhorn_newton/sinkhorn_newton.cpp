#include "ops/sinkhorn_newton/sinkhorn_newton.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "ops/sinkhorn_newton/sinkhorn_batch.h"
#include "ops/sinkhorn_newton/sinkhorn_passes.h"

namespace torch_ext::ops {
namespace {

constexpr const char* kOp = "sinkhorn_newton";

void check_marginal(const char* name, const at::Tensor& marginal, const at::Tensor& C, int64_t dim) {
  const at::ScalarType wanted = core::arithmetic_type(C.scalar_type());
  TORCH_CHECK_TYPE(marginal.scalar_type() == wanted, kOp, ": ", name, " has dtype ", marginal.scalar_type(),
                   "; a cost of dtype ", C.scalar_type(), " takes marginals of dtype ", wanted);
  TORCH_CHECK_VALUE(marginal.device() == C.device(), kOp, ": ", name, " is on ", marginal.device(), ", C on ",
                    C.device());
  TORCH_CHECK_VALUE(marginal.dim() >= 1 && marginal.sym_size(-1) == C.sym_size(dim), kOp, ": ", name, " has shape ",
                    marginal.sym_sizes(), ", its last dimension must be the ", dim == -2 ? "rows" : "columns",
                    " of C, whose shape is ", C.sym_sizes());
}

SinkhornTensors sinkhorn_meta(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b, double eps,
                              std::optional<double> tol, int64_t max_iter, std::string_view mode,
                              const std::optional<at::Tensor>& f0) {
  check_settings(kOp, eps, tol, max_iter);
  sinkhorn_mode(kOp, std::string(mode));
  const SymSizes batch = check_sinkhorn(C, a, b);
  if (f0.has_value()) {
    TORCH_CHECK_VALUE(f0->dim() >= 1 && f0->sym_size(-1) == C.sym_size(-2), kOp, ": f0 has shape ", f0->sym_sizes(),
                      "; it must be [..., n] like a, whose shape is ", a.sym_sizes());
  }
  const auto options = a.options().requires_grad(false);
  const c10::SymInt n = C.sym_size(-2), m = C.sym_size(-1);
  return {at::empty_symint(batch, options), at::empty_symint(with(batch, {n, m}), options),
          at::empty_symint(with(batch, {n}), options), at::empty_symint(with(batch, {m}), options),
          at::empty_symint(with(batch, {4}), options.dtype(at::kDouble))};
}

// [B, size] float64 on the host, broadcast.
at::Tensor on_host(const at::Tensor& tensor, at::IntArrayRef batch) {
  std::vector<int64_t> sizes = batch.vec();
  sizes.push_back(tensor.size(-1));
  return tensor.to(at::kCPU, at::kDouble).expand(sizes).reshape({-1, tensor.size(-1)}).contiguous();
}

// The problems' cost matrices without copying a broadcast one.
class DenseCosts {
 public:
  DenseCosts(const at::Tensor& C, at::IntArrayRef batch) : type_(core::dtype_of(C, "sinkhorn_newton: C")) {
    std::vector<int64_t> sizes = batch.vec();
    sizes.insert(sizes.end(), {C.size(-2), C.size(-1)});
    all_ = C.contiguous().expand(sizes);
  }

  at::Tensor matrix(int64_t problem) const {
    at::Tensor at = all_;
    for (int64_t d = all_.dim() - 3; d >= 0; --d) {
      at = at.select(d, problem % all_.size(d));
      problem /= all_.size(d);
    }
    return at;
  }

  kernels::SinkhornCost cost(const at::Tensor& matrix, double offset) const {
    return {matrix.const_data_ptr(), type_, offset, nullptr, nullptr, matrix.size(0), matrix.size(1), 0};
  }

  CostView view(int64_t problem, const at::Tensor& rows, const at::Tensor& columns, bool transposed) const {
    at::Tensor own = matrix(problem);
    if (rows.defined()) own = own.index_select(0, rows);
    if (columns.defined()) own = own.index_select(1, columns);
    if (transposed) own = own.t();
    own = own.contiguous();
    const kernels::CostRange range = cost_range(cost(own, 0), own.device());
    TORCH_CHECK_VALUE(!range.invalid, kOp, ": C of problem ", problem,
                      " has a NaN or -infinity where there is mass; only +infinity (a forbidden pair) may stand there");
    const bool some = range.min <= range.max;
    return {cost(own, some ? range.min : 0), some ? range.max - range.min : 0, {own}};
  }

 private:
  core::DType type_;
  at::Tensor all_;
};

SinkhornTensors sinkhorn_op(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b, double eps,
                            std::optional<double> tol, int64_t max_iter, std::string_view mode,
                            const std::optional<at::Tensor>& f0) {
  SinkhornTensors out = sinkhorn_meta(C, a, b, eps, tol, max_iter, mode, f0);
  auto [value, plan, f, g, info] = out;
  if (value.numel() == 0) return out;
  const c10::DeviceGuard guard(C.device());
  const SinkhornSettings settings = settings_for(kOp, a.scalar_type(), eps, tol, max_iter, std::string(mode));
  const DenseCosts costs(C, value.sizes());
  const BatchSolution solution =
      solve_batch(settings, on_host(a, value.sizes()), on_host(b, value.sizes()),
                  f0.has_value() ? on_host(*f0, value.sizes()) : at::Tensor(), C.device(),
                  [&](int64_t problem, const at::Tensor& rows, const at::Tensor& columns, bool transposed) {
                    return costs.view(problem, rows, columns, transposed);
                  });
  value.copy_(solution.value.view(value.sizes()));
  f.copy_(solution.f.view(f.sizes()));
  g.copy_(solution.g.view(g.sizes()));
  info.copy_(solution.info.view(info.sizes()));
  const at::Tensor plans = plan.view({-1, plan.size(-2), plan.size(-1)});
  for (int64_t k = 0; k < plans.size(0); ++k) {
    const RawPotentials& raw = solution.raw[static_cast<size_t>(k)];
    write_plan(costs.cost(costs.matrix(k), raw.offset), {raw.f.data(), raw.g.data(), 1 / eps}, raw.mass, plans[k]);
  }
  return out;
}

}  // namespace

SymSizes check_sinkhorn(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b) {
  core::dtype_of(C, "sinkhorn_newton: C");
  TORCH_CHECK_VALUE(C.dim() >= 2, kOp, ": C must be [..., n, m], got shape ", C.sym_sizes());
  TORCH_CHECK_VALUE(C.sym_size(-2) > 0 && C.sym_size(-1) > 0, kOp, ": C has shape ", C.sym_sizes(),
                    "; both sides need at least one point");
  check_marginal("a", a, C, -2);
  check_marginal("b", b, C, -1);
  const auto both = at::infer_size_symdimvector(leading(a, 1), leading(b, 1));
  const auto batch = at::infer_size_symdimvector(leading(C, 2), both);
  return {batch.begin(), batch.end()};
}

SinkhornTensors call_sinkhorn_newton(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b, double eps,
                                     std::optional<double> tol, int64_t max_iter, std::string_view mode,
                                     const std::optional<at::Tensor>& f0) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::sinkhorn_newton", "")
                             .typed<decltype(call_sinkhorn_newton)>();
  return op.call(C, a, b, eps, tol, max_iter, mode, f0);
}

SinkhornResult sinkhorn_newton(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b,
                               const SinkhornOptions& options, const std::optional<at::Tensor>& f0) {
  auto [value, plan, f, g, info] =
      call_sinkhorn_newton(C, a, b, options.eps(), options.tol(), options.max_iter(), options.mode(), f0);
  if (const std::string text = sinkhorn_unconverged(kOp, info); !text.empty()) {
    TORCH_WARN(text);
  }
  return {value, plan, f, g, info};
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "sinkhorn_newton(Tensor C, Tensor a, Tensor b, float eps, float? tol=None, int max_iter=100, str mode=\"auto\", "
      "Tensor? f0=None) -> (Tensor value, Tensor plan, Tensor f, Tensor g, Tensor info)");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("sinkhorn_newton", sinkhorn_op); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("sinkhorn_newton", sinkhorn_op); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("sinkhorn_newton", sinkhorn_meta); }

}  // namespace torch_ext::ops
