// Derivatives of sinkhorn_newton and sinkhorn_hess_solve, backward and forward, to any order: every formula is made of
// torch's operators and of sinkhorn_hess_solve.
//
// With G the solve, whose result does not change when (p, -q) is added to its argument, and x + y for x_i + y_j:
//   dP = P (df + dg - dC) / eps,   (df, dg) = G(eps da + (P dC) 1, eps db + (P dC)^T 1) up to the gauge a.f = b.g.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include "ops/sinkhorn_newton/sinkhorn_newton.h"

namespace torch_ext::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

at::Tensor outer_sum(const at::Tensor& x, const at::Tensor& y) { return x.unsqueeze(-1) + y.unsqueeze(-2); }
at::Tensor finite(const at::Tensor& x) { return at::where(at::isfinite(x), x, 0); }
at::Tensor total(const at::Tensor& x) { return x.sum(-1, /*keepdim=*/true); }
at::Tensor paired_sum(const at::Tensor& x, const at::Tensor& y) { return (x * y).sum(-1, /*keepdim=*/true); }

void accumulate(at::Tensor& sum, const at::Tensor& term) { sum = sum.defined() ? sum + term : term; }
// The solve amplifies what its right-hand side lost to rounding: at small eps float32 would leave nothing.
at::Tensor wide(const at::Tensor& x) { return x.to(at::kDouble); }
at::Tensor or_zeros(const at::Tensor& x, const at::Tensor& like) { return x.defined() ? x : at::zeros_like(like); }

at::Tensor tangent_of(const at::Tensor& x) { return x.defined() ? x._fw_grad(/*level=*/0) : at::Tensor(); }
at::Tensor primal_of(const at::Tensor& x) { return tangent_of(x).defined() ? x._fw_primal(/*level=*/0) : x; }
void set_tangent(const at::Tensor& x, const at::Tensor& tangent) {
  x._set_fw_grad(tangent.to(x.scalar_type()), /*level=*/0, /*is_inplace_op=*/false);
}

// What the backward of F keeps is kept anew with the tangents, which forward over reverse needs: Function saved its
// outputs before they had one. (Leaving the forward level drops the tangents, and with them the reference cycle.)
template <typename F>
void keep_with_tangents(const at::Tensor& output, variable_list saved) {
  // .get(): a shared_ptr up to torch 2.11, an intrusive_ptr since
  auto* const node = dynamic_cast<torch::autograd::CppNode<F>*>(output.grad_fn().get());
  if (node == nullptr) return;
  node->ctx_.save_for_backward(std::move(saved));
  node->save_variables_to_ctx();
}

struct Sinkhorn : Function<Sinkhorn> {
  static variable_list forward(AutogradContext* context, const at::Tensor& C, const at::Tensor& a, const at::Tensor& b,
                               double eps, std::optional<double> tol, int64_t max_iter, const std::string& mode,
                               const std::optional<at::Tensor>& f0) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [value, plan, f, g, info] = call_sinkhorn_newton(C, a, b, eps, tol, max_iter, mode, f0);
    context->save_for_backward({C, a, b, plan, f, g});
    context->saved_data["eps"] = eps;
    context->set_materialize_grads(false);
    context->mark_non_differentiable({info});
    return {value, plan, f, g, info};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &C = saved[0], &a = saved[1], &b = saved[2], &plan = saved[3];
    const at::Tensor f = finite(saved[4]), g = finite(saved[5]);
    at::Tensor grad_C, grad_a, grad_b;
    if (grads[0].defined()) {  // the envelope: the plan and the potentials are at their optimum
      const at::Tensor by_value = grads[0].unsqueeze(-1);
      grad_C = by_value.unsqueeze(-1) * plan;
      grad_a = by_value * f;
      grad_b = by_value * g;
    }
    if (grads[1].defined() || grads[2].defined() || grads[3].defined()) {
      const double eps = context->saved_data["eps"].toDouble();
      const at::Tensor P = wide(plan);
      at::Tensor u, v;
      const at::Tensor shift = gauge_cotangent(saved, grads, u, v);
      if (grads[1].defined()) {
        const at::Tensor weighted = P * wide(grads[1]) / eps;
        accumulate(u, weighted.sum(-1));
        accumulate(v, weighted.sum(-2));
        accumulate(grad_C, -weighted);
      }
      const auto [alpha, beta] = sinkhorn_hess_solve(P, u, v);
      accumulate(grad_C, P * outer_sum(alpha, beta));
      accumulate(grad_a, eps * alpha - (shift.defined() ? shift * f : at::zeros_like(f)));
      accumulate(grad_b, eps * beta + (shift.defined() ? shift * g : at::zeros_like(g)));
    }
    const auto like = [](const at::Tensor& grad, const at::Tensor& input) {
      return grad.defined() ? at::sum_to(grad, input.sym_sizes()).to(input.scalar_type()) : grad;
    };
    return {like(grad_C, C), like(grad_a, a), like(grad_b, b), {}, {}, {}, {}, {}};
  }

 private:
  // u and v from the cotangents of f and g; how much the centring a.f = b.g moves with a and b.
  static at::Tensor gauge_cotangent(const variable_list& saved, const variable_list& grads, at::Tensor& u,
                                    at::Tensor& v) {
    if (!grads[2].defined() && !grads[3].defined()) return {};
    u = at::where(at::isfinite(saved[4]), wide(or_zeros(grads[2], saved[4])), 0);
    v = at::where(at::isfinite(saved[5]), wide(or_zeros(grads[3], saved[5])), 0);
    return (total(u) - total(v)) / (total(wide(saved[1])) + total(wide(saved[2])));
  }
};

SinkhornTensors sinkhorn_tangents(const SinkhornTensors& out, const at::Tensor& C, const at::Tensor& a,
                                  const at::Tensor& b, const variable_list& tangents, double eps) {
  const at::Tensor plan = wide(std::get<1>(out));
  const at::Tensor f = finite(std::get<2>(out)), g = finite(std::get<3>(out));
  const at::Tensor dC = wide(or_zeros(tangents[0], C)), da = wide(or_zeros(tangents[1], a)),
                   db = wide(or_zeros(tangents[2], b));
  const at::Tensor weighted = plan * dC;
  auto [df, dg] = sinkhorn_hess_solve(plan, eps * da + weighted.sum(-1), eps * db + weighted.sum(-2));
  const at::Tensor d_plan = plan * (outer_sum(df, dg) - dC) / eps;
  const at::Tensor shift =
      (paired_sum(a, df) + paired_sum(da, f) - paired_sum(b, dg) - paired_sum(db, g)) / (total(a) + total(b));
  const at::Tensor d_value = weighted.sum({-2, -1}) + (paired_sum(f, da) + paired_sum(g, db)).squeeze(-1);
  return {d_value, d_plan, df - shift, dg + shift, at::Tensor()};
}

SinkhornTensors sinkhorn_autograd(const at::Tensor& C, const at::Tensor& a, const at::Tensor& b, double eps,
                                  std::optional<double> tol, int64_t max_iter, std::string_view mode,
                                  const std::optional<at::Tensor>& f0) {
  const variable_list tangents{tangent_of(C), tangent_of(a), tangent_of(b)};
  const at::Tensor C0 = primal_of(C), a0 = primal_of(a), b0 = primal_of(b);
  auto outputs = Sinkhorn::apply(C0, a0, b0, eps, tol, max_iter, std::string(mode), f0);
  SinkhornTensors out{outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
  if (tangents[0].defined() || tangents[1].defined() || tangents[2].defined()) {
    const SinkhornTensors moved = sinkhorn_tangents(out, C0, a0, b0, tangents, eps);
    set_tangent(outputs[0], std::get<0>(moved));
    set_tangent(outputs[1], std::get<1>(moved));
    set_tangent(outputs[2], std::get<2>(moved));
    set_tangent(outputs[3], std::get<3>(moved));
    keep_with_tangents<Sinkhorn>(outputs[0], {C, a, b, outputs[1], outputs[2], outputs[3]});
  }
  return out;
}

// z = G y with w = (p, -q), k = (1, -1), T = w.k: G is symmetric, G w = 0 and w.z = 0. For a change of the plan
//   dz = G (dy - dH z - (k.y) dw / T) - k (z.dw) / T,
// and with s = G z_bar the cotangent of P is -(s + s)(z + z) - ((k.y)(s - s) + (k.z_bar)(z - z)) / T.
struct HessSolve : Function<HessSolve> {
  static variable_list forward(AutogradContext* context, const at::Tensor& plan, const at::Tensor& u,
                               const at::Tensor& v) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [alpha, beta] = sinkhorn_hess_solve(plan, u, v);
    context->save_for_backward({plan, u, v, alpha, beta});
    context->set_materialize_grads(false);
    return {alpha, beta};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined() && !grads[1].defined()) return {{}, {}, {}};
    const auto saved = context->get_saved_variables();
    const at::Tensor &plan = saved[0], &u = saved[1], &v = saved[2], &alpha = saved[3], &beta = saved[4];
    const at::Tensor by_alpha = or_zeros(grads[0], alpha), by_beta = or_zeros(grads[1], beta);
    const auto [s, t] = sinkhorn_hess_solve(plan, by_alpha, by_beta);
    const at::Tensor twice_mass = 2 * plan.sum({-2, -1}, /*keepdim=*/true);
    const at::Tensor ky = (total(u) - total(v)).unsqueeze(-1), ks = (total(by_alpha) - total(by_beta)).unsqueeze(-1);
    const at::Tensor grad =
        -outer_sum(s, t) * outer_sum(alpha, beta) - (ky * outer_sum(s, -t) + ks * outer_sum(alpha, -beta)) / twice_mass;
    return {grad, s, t};
  }
};

TensorPair hess_solve_tangents(const at::Tensor& plan, const at::Tensor& u, const at::Tensor& v,
                               const at::Tensor& alpha, const at::Tensor& beta, const variable_list& tangents) {
  const at::Tensor d_plan = or_zeros(tangents[0], plan), du = or_zeros(tangents[1], u), dv = or_zeros(tangents[2], v);
  const at::Tensor dp = d_plan.sum(-1), dq = d_plan.sum(-2);
  const at::Tensor twice_mass = 2 * total(plan.sum(-1)), ky = (total(u) - total(v)) / twice_mass;
  const at::Tensor moved = d_plan * outer_sum(alpha, beta);
  const auto [s, t] = sinkhorn_hess_solve(plan, du - moved.sum(-1) - ky * dp, dv - moved.sum(-2) + ky * dq);
  const at::Tensor shift = (paired_sum(alpha, dp) - paired_sum(beta, dq)) / twice_mass;
  return {s - shift, t + shift};
}

TensorPair hess_solve_autograd(const at::Tensor& plan, const at::Tensor& u, const at::Tensor& v) {
  const variable_list tangents{tangent_of(plan), tangent_of(u), tangent_of(v)};
  const at::Tensor plan0 = primal_of(plan), u0 = primal_of(u), v0 = primal_of(v);
  const auto outputs = HessSolve::apply(plan0, u0, v0);
  if (tangents[0].defined() || tangents[1].defined() || tangents[2].defined()) {
    const auto [d_alpha, d_beta] = hess_solve_tangents(plan0, u0, v0, outputs[0], outputs[1], tangents);
    set_tangent(outputs[0], d_alpha);
    set_tangent(outputs[1], d_beta);
    keep_with_tangents<HessSolve>(outputs[0], {plan, u, v, outputs[0], outputs[1]});
  }
  return {outputs[0], outputs[1]};
}

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("sinkhorn_newton", sinkhorn_autograd);
  m.impl("sinkhorn_hess_solve", hess_solve_autograd);
}

}  // namespace
}  // namespace torch_ext::ops
