// Transport between points: the cost is computed inside every pass. Only what has O((n + m) d) entries is stored.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include <string>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "ops/sinkhorn_newton/sinkhorn_batch.h"
#include "ops/sinkhorn_newton/sinkhorn_newton.h"
#include "ops/sinkhorn_newton/sinkhorn_passes.h"

namespace torch_ext::ops {
namespace {

constexpr const char* kPointsOp = "sinkhorn_points";
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

SymSizes check_points(const at::Tensor& x, const at::Tensor& y) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, kPointsOp, ": x has dtype ",
                   x.scalar_type(), "; points are float32 or float64");
  TORCH_CHECK_TYPE(y.scalar_type() == x.scalar_type(), kPointsOp, ": y has dtype ", y.scalar_type(), ", x ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(y.device() == x.device(), kPointsOp, ": y is on ", y.device(), ", x on ", x.device());
  TORCH_CHECK_VALUE(x.dim() >= 2 && y.dim() >= 2 && x.sym_size(-1) == y.sym_size(-1), kPointsOp,
                    ": x must be [..., n, d] and y [..., m, d], got shapes ", x.sym_sizes(), " and ", y.sym_sizes());
  TORCH_CHECK_VALUE(x.sym_size(-2) > 0 && y.sym_size(-2) > 0, kPointsOp,
                    ": both sides need at least one point, got shapes ", x.sym_sizes(), " and ", y.sym_sizes());
  const auto batch = at::infer_size_symdimvector(leading(x, 2), leading(y, 2));
  return {batch.begin(), batch.end()};
}

void check_weight(const char* name, const at::Tensor& weight, const at::Tensor& points) {
  TORCH_CHECK_TYPE(weight.scalar_type() == points.scalar_type(), kPointsOp, ": ", name, " has dtype ",
                   weight.scalar_type(), ", the points ", points.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == points.device(), kPointsOp, ": ", name, " is on ", weight.device(),
                    ", the points on ", points.device());
  TORCH_CHECK_VALUE(weight.dim() >= 1 && weight.sym_size(-1) == points.sym_size(-2), kPointsOp, ": ", name,
                    " has shape ", weight.sym_sizes(), ", its points ", points.sym_sizes());
}

PointTensors points_meta(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, double eps,
                         std::optional<double> tol, int64_t max_iter, std::string_view mode,
                         const std::optional<at::Tensor>& f0) {
  check_settings(kPointsOp, eps, tol, max_iter);
  sinkhorn_mode(kPointsOp, std::string(mode));
  const SymSizes points = check_points(x, y);
  check_weight("a", a, x);
  check_weight("b", b, y);
  const auto weights = at::infer_size_symdimvector(leading(a, 1), leading(b, 1));
  const auto both = at::infer_size_symdimvector(points, weights);
  const SymSizes batch(both.begin(), both.end());
  TORCH_CHECK_VALUE(!f0.has_value() || (f0->dim() >= 1 && f0->sym_size(-1) == x.sym_size(-2)), kPointsOp,
                    ": f0 must be [..., n] like a");
  const auto options = x.options().requires_grad(false), wide = options.dtype(at::kDouble);
  return {at::empty_symint(batch, options), at::empty_symint(with(batch, {x.sym_size(-2)}), wide),
          at::empty_symint(with(batch, {y.sym_size(-2)}), wide), at::empty_symint(with(batch, {c10::SymInt(4)}), wide)};
}

// Points [B, size, d] in float64 on their device, broadcast.
at::Tensor flat(const at::Tensor& points, at::IntArrayRef batch) {
  std::vector<int64_t> sizes = batch.vec();
  sizes.insert(sizes.end(), {points.size(-2), points.size(-1)});
  return points.to(at::kDouble).expand(sizes).reshape({-1, points.size(-2), points.size(-1)});
}

at::Tensor flat_host(const at::Tensor& weight, at::IntArrayRef batch) {
  std::vector<int64_t> sizes = batch.vec();
  sizes.push_back(weight.size(-1));
  return weight.to(at::kCPU, at::kDouble).expand(sizes).reshape({-1, weight.size(-1)}).contiguous();
}

CostView view_of(const at::Tensor& rows, const at::Tensor& columns, double range) {
  const at::Tensor x = rows.contiguous(), y_t = columns.t().contiguous();
  return {{nullptr, core::DType::kDouble, 0, x.const_data_ptr<double>(), y_t.const_data_ptr<double>(), x.size(0),
           y_t.size(1), x.size(1)},
          range,
          {x, y_t}};
}

// Half the squared diagonal of the box that holds all points: an upper bound of the cost.
double cost_bound(const at::Tensor& x, const at::Tensor& y) {
  if (x.size(1) == 0) return 0;
  const at::Tensor high = at::maximum(x.amax(0), y.amax(0)), low = at::minimum(x.amin(0), y.amin(0));
  return (0.5 * (high - low).square().sum()).item<double>();
}

CostView point_view(const at::Tensor& all_x, const at::Tensor& all_y, int64_t problem, const at::Tensor& rows,
                    const at::Tensor& columns, bool transposed) {
  at::Tensor x = all_x[problem], y = all_y[problem];
  if (rows.defined()) x = x.index_select(0, rows);
  if (columns.defined()) y = y.index_select(0, columns);
  const double bound = cost_bound(x, y);
  TORCH_CHECK_VALUE(std::isfinite(bound), kPointsOp, ": a point of problem ", problem, " is not finite");
  return transposed ? view_of(y, x, bound) : view_of(x, y, bound);
}

PointTensors points_op(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, double eps,
                       std::optional<double> tol, int64_t max_iter, std::string_view mode,
                       const std::optional<at::Tensor>& f0) {
  PointTensors out = points_meta(x, y, a, b, eps, tol, max_iter, mode, f0);
  auto [value, f, g, info] = out;
  if (value.numel() == 0) return out;
  const c10::DeviceGuard guard(x.device());
  const SinkhornSettings settings = settings_for(kPointsOp, x.scalar_type(), eps, tol, max_iter, std::string(mode));
  const at::Tensor all_x = flat(x, value.sizes()), all_y = flat(y, value.sizes());
  const BatchSolution solution =
      solve_batch(settings, flat_host(a, value.sizes()), flat_host(b, value.sizes()),
                  f0.has_value() ? flat_host(*f0, value.sizes()) : at::Tensor(), x.device(),
                  [&](int64_t problem, const at::Tensor& rows, const at::Tensor& columns, bool transposed) {
                    return point_view(all_x, all_y, problem, rows, columns, transposed);
                  });
  value.copy_(solution.value.view(value.sizes()));
  f.copy_(solution.f.view(f.sizes()));
  g.copy_(solution.g.view(g.sizes()));
  info.copy_(solution.info.view(info.sizes()));
  return out;
}

TensorPair displacement_meta(const at::Tensor& x, const at::Tensor& y, const at::Tensor& f, const at::Tensor& g,
                             double) {
  const SymSizes points = check_points(x, y);
  TORCH_CHECK_VALUE(
      f.dim() >= 1 && g.dim() >= 1 && f.sym_size(-1) == x.sym_size(-2) && g.sym_size(-1) == y.sym_size(-2),
      "sinkhorn_displacement: f must be [..., n] and g [..., m], got shapes ", f.sym_sizes(), " and ", g.sym_sizes());
  const auto both = at::infer_size_symdimvector(points, leading(f, 1));
  const SymSizes batch(both.begin(), both.end());
  const auto options = x.options().requires_grad(false);
  return {at::empty_symint(with(batch, {x.sym_size(-2), x.sym_size(-1)}), options),
          at::empty_symint(with(batch, {y.sym_size(-2), y.sym_size(-1)}), options)};
}

TensorPair displacement_op(const at::Tensor& x, const at::Tensor& y, const at::Tensor& f, const at::Tensor& g,
                           double eps) {
  TensorPair out = displacement_meta(x, y, f, g, eps);
  auto [dx, dy] = out;
  if (dx.numel() == 0 || dy.numel() == 0) return out;
  const c10::DeviceGuard guard(x.device());
  const auto batch = dx.sizes().slice(0, static_cast<size_t>(dx.dim() - 2));
  const at::Tensor all_x = flat(x, batch), all_y = flat(y, batch);
  const at::Tensor all_f = flat_host(f, batch), all_g = flat_host(g, batch);
  const at::Tensor flat_dx = dx.view({-1, dx.size(-2), dx.size(-1)}), flat_dy = dy.view({-1, dy.size(-2), dy.size(-1)});
  for (int64_t k = 0; k < all_x.size(0); ++k) {
    const auto* fk = all_f.const_data_ptr<double>() + k * all_f.size(1);
    const auto* gk = all_g.const_data_ptr<double>() + k * all_g.size(1);
    const CostView by_x = view_of(all_x[k], all_y[k], 0), by_y = view_of(all_y[k], all_x[k], 0);
    flat_dx[k].copy_(displacement(by_x.cost, {fk, gk, 1 / eps}, x.device()));
    flat_dy[k].copy_(displacement(by_y.cost, {gk, fk, 1 / eps}, x.device()));
  }
  return out;
}

struct Points : Function<Points> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& y, const at::Tensor& a,
                               const at::Tensor& b, double eps, std::optional<double> tol, int64_t max_iter,
                               const std::string& mode, const std::optional<at::Tensor>& f0) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [value, f, g, info] = call_sinkhorn_points(x, y, a, b, eps, tol, max_iter, mode, f0);
    context->save_for_backward({x, y, a, b, f, g});
    context->saved_data["eps"] = eps;
    context->mark_non_differentiable({f, g, info});
    return {value, f, g, info};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &y = saved[1], &a = saved[2], &b = saved[3], &f = saved[4], &g = saved[5];
    const auto [dx, dy] = call_displacement(x, y, f, g, context->saved_data["eps"].toDouble());
    const at::Tensor by_value = grads[0].unsqueeze(-1);
    const auto potential = [&](const at::Tensor& p, const at::Tensor& like) {
      return at::sum_to((by_value * at::where(at::isfinite(p), p, 0)).to(like.scalar_type()), like.sym_sizes());
    };
    return {at::sum_to(by_value.unsqueeze(-1) * dx, x.sym_sizes()),
            at::sum_to(by_value.unsqueeze(-1) * dy, y.sym_sizes()),
            potential(f, a),
            potential(g, b),
            {},
            {},
            {},
            {},
            {}};
  }
};

PointTensors points_autograd(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b,
                             double eps, std::optional<double> tol, int64_t max_iter, std::string_view mode,
                             const std::optional<at::Tensor>& f0) {
  const auto out = Points::apply(x, y, a, b, eps, tol, max_iter, std::string(mode), f0);
  return {out[0], out[1], out[2], out[3]};
}

struct Displacement : Function<Displacement> {
  static variable_list forward(AutogradContext*, const at::Tensor& x, const at::Tensor& y, const at::Tensor& f,
                               const at::Tensor& g, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [dx, dy] = call_displacement(x, y, f, g, eps);
    return {dx, dy};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "sinkhorn_points does not implement double backward: second derivatives need the plan; call "
        "sinkhorn_newton on the cost matrix 0.5 * torch.cdist(x, y).square()");
  }
};

TensorPair displacement_autograd(const at::Tensor& x, const at::Tensor& y, const at::Tensor& f, const at::Tensor& g,
                                 double eps) {
  const auto out = Displacement::apply(x, y, f, g, eps);
  return {out[0], out[1]};
}

}  // namespace

PointTensors call_sinkhorn_points(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b,
                                  double eps, std::optional<double> tol, int64_t max_iter, std::string_view mode,
                                  const std::optional<at::Tensor>& f0) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::sinkhorn_points", "")
                             .typed<decltype(call_sinkhorn_points)>();
  return op.call(x, y, a, b, eps, tol, max_iter, mode, f0);
}

TensorPair call_displacement(const at::Tensor& x, const at::Tensor& y, const at::Tensor& f, const at::Tensor& g,
                             double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::sinkhorn_displacement", "")
                             .typed<decltype(call_displacement)>();
  return op.call(x, y, f, g, eps);
}

PointTensors sinkhorn_points(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b,
                             const SinkhornOptions& options, const std::optional<at::Tensor>& f0) {
  auto out = call_sinkhorn_points(x, y, a, b, options.eps(), options.tol(), options.max_iter(), options.mode(), f0);
  if (const std::string text = sinkhorn_unconverged(kPointsOp, std::get<3>(out)); !text.empty()) {
    TORCH_WARN(text);
  }
  return out;
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "sinkhorn_points(Tensor x, Tensor y, Tensor a, Tensor b, float eps, float? tol=None, int max_iter=100, str "
      "mode=\"auto\", Tensor? f0=None) -> (Tensor value, Tensor f, Tensor g, Tensor info)");
  m.def("sinkhorn_displacement(Tensor x, Tensor y, Tensor f, Tensor g, float eps) -> (Tensor by_x, Tensor by_y)");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("sinkhorn_points", points_op);
  m.impl("sinkhorn_displacement", displacement_op);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("sinkhorn_points", points_op);
  m.impl("sinkhorn_displacement", displacement_op);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("sinkhorn_points", points_meta);
  m.impl("sinkhorn_displacement", displacement_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("sinkhorn_points", points_autograd);
  m.impl("sinkhorn_displacement", displacement_autograd);
}

}  // namespace torch_ext::ops
