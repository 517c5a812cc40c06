#include "optim/adahessian/adahessian_derivatives.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/list_ops.h"
#include "curvature/hvp/hvp.h"
#include "optim/adahessian/adahessian_op.h"

namespace torch_ext::optim {
namespace {

bool any_graph(const std::vector<at::Tensor>& grads) {
  return std::any_of(grads.begin(), grads.end(), [](const at::Tensor& g) { return g.defined() && g.requires_grad(); });
}

void check_all(const AdaHessianRequest& request, const std::vector<at::Tensor>& grads) {
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].defined()) {
      core::check_gradient(kAdaHessian, static_cast<size_t>(request.probes.ordinals[i]), request.params[i], grads[i]);
    }
  }
}

// A closure's gradients, whichever form it has, leaving .grad as found.
Evaluation evaluate_isolated(const Closure& closure, const std::vector<at::Tensor>& params, bool create_graph) {
  struct Restore {
    const std::vector<at::Tensor>& params;
    std::vector<at::Tensor> grads;
    ~Restore() {
      for (size_t i = 0; i < params.size(); ++i) params[i].mutable_grad() = grads[i];
    }
  } restore{params, {}};
  for (const at::Tensor& param : params) {
    restore.grads.push_back(param.grad());
    param.mutable_grad().reset();
  }
  return evaluate(closure, params, create_graph);
}

std::vector<at::Tensor> estimate(const AdaHessianRequest& request, const std::vector<at::Tensor>& grads,
                                 const curvature::GradientFn& difference_gradient) {
  const at::NoGradGuard no_grad;
  const auto product = [&](at::TensorList v, bool last) {
    if (request.finite_difference) return curvature::finite_difference_hvp(difference_gradient, request.params, v);
    return curvature::hvp_of_gradients(grads, request.params, v, /*keep_graph=*/!last);
  };
  return curvature::hutchinson(product, request.params, request.probes, request.magnitude_only);
}

std::vector<at::Tensor> external_hessian(const AdaHessianRequest& request) {
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < request.params.size(); ++i) {
    const at::Tensor& param = request.params[i];
    const at::Tensor& given = (*request.hessian)[static_cast<size_t>(request.probes.ordinals[i])];
    if (!given.defined()) {
      result.push_back(at::zeros_like(param, param.options().requires_grad(false)));
      continue;
    }
    TORCH_CHECK_TYPE(given.layout() == at::kStrided && !given.is_complex(), kAdaHessian, ": hessian of ",
                     core::describe("parameter", static_cast<size_t>(request.probes.ordinals[i]), param),
                     " is sparse or complex");
    bool fits = given.dim() == param.dim() && given.device() == param.device();
    for (int64_t d = 0; fits && d < param.dim(); ++d) {
      fits = given.size(d) == param.size(d) || (given.size(d) != 0 && param.size(d) % given.size(d) == 0);
    }
    TORCH_CHECK_VALUE(fits, kAdaHessian, ": hessian of ",
                      core::describe("parameter", static_cast<size_t>(request.probes.ordinals[i]), param),
                      " has shape ", given.sizes(), " on ", given.device());
    at::Tensor full = given.detach();
    for (int64_t d = 0; d < param.dim(); ++d) {  // a reduced diagonal stands for each of its block's elements
      if (full.size(d) != param.size(d)) full = full.repeat_interleave(param.size(d) / full.size(d), d);
    }
    // a wider one stays wide: second derivatives soon leave the range of float16
    const bool same = full.scalar_type() == param.scalar_type();
    result.push_back(same ? full : full.to(core::arithmetic_type(param.scalar_type())));
  }
  return result;
}

}  // namespace

void adahessian_check_loss_scale(double scale) {
  TORCH_CHECK_VALUE(scale > 0 && std::isfinite(scale), "Invalid loss_scale: ", scale, " (", kAdaHessian,
                    " needs it in (0, inf))");
}

void adahessian_check_same_params(const std::vector<at::Tensor>& summed, const std::vector<at::Tensor>& now) {
  const bool same = std::equal(summed.begin(), summed.end(), now.begin(), now.end(),
                               [](const at::Tensor& a, const at::Tensor& b) { return a.is_same(b); });
  TORCH_CHECK(same, kAdaHessian,
              ": the parameters that take part have changed since accumulate(); its sums are discarded");
}

AdaHessianDerivatives adahessian_derivatives(const AdaHessianRequest& request) {
  const std::vector<at::Tensor>& params = request.params;
  const DetachGradients detach(params);
  const bool estimated = request.refresh && !request.hessian.has_value();
  const bool second_order = estimated && !request.finite_difference;
  const bool from_main = second_order && !request.curvature_closure;
  TORCH_CHECK(!estimated || !request.finite_difference || request.closure || request.curvature_closure, kAdaHessian,
              ": hvp=\"finite_difference\" evaluates the loss at shifted parameters and needs a closure");
  TORCH_CHECK(!from_main || !request.scaler_unscaled, kAdaHessian,
              ": GradScaler has unscaled .grad, but second derivatives still carry its scale: pass "
              "loss_scale=scaler.get_scale() to step()");

  TORCH_CHECK_VALUE(!request.hessian.has_value() || request.hessian->size() == request.n_params, kAdaHessian,
                    ": hessian has ", request.hessian->size(), " tensors, the optimizer ", request.n_params,
                    " parameters");

  Evaluation main;
  if (request.closure) {
    main = evaluate(request.closure, params, from_main);
  } else {
    main.ran_backward = true;
    for (const at::Tensor& param : params) main.grads.push_back(param.grad());
  }
  check_all(request, main.grads);
  AdaHessianDerivatives result;
  result.loss = main.loss.defined() ? main.loss.detach() : main.loss;
  main.loss.reset();  // what only the loss keeps alive is freed before the second backward
  const bool none = std::none_of(main.grads.begin(), main.grads.end(), [](const auto& g) { return g.defined(); });
  if (none) {
    result.grads.resize(params.size());
    return result;
  }
  TORCH_CHECK(!from_main || !main.ran_backward || any_graph(main.grads), kAdaHessian,
              ": this step refreshes the curvature and needs gradients with a graph: call "
              "loss.backward(create_graph=True) (opt.is_second_order says when), or pass a closure that returns the "
              "loss without calling backward");

  if (request.hessian.has_value()) {
    result.curvature = external_hessian(request);
  } else if (estimated && request.finite_difference) {
    const Closure& loss = request.curvature_closure ? request.curvature_closure : request.closure;
    result.curvature = estimate(request, {}, [&] { return evaluate_isolated(loss, params, false).grads; });
  } else if (from_main) {
    result.curvature = estimate(request, main.grads, {});
  } else if (estimated) {
    const Evaluation other = evaluate_isolated(request.curvature_closure, params, /*create_graph=*/true);
    TORCH_CHECK(!other.ran_backward || any_graph(other.grads), kAdaHessian,
                ": curvature_closure must return its loss without calling backward, or call it with create_graph=True");
    check_all(request, other.grads);
    result.curvature = estimate(request, other.grads, {});
  }
  for (size_t i = 0; i < params.size(); ++i) {
    at::Tensor grad = main.grads[i].defined() ? main.grads[i].detach() : at::Tensor();
    if (request.closure && !main.ran_backward) params[i].mutable_grad() = grad;
    result.grads.push_back(std::move(grad));
  }
  return result;
}

void adahessian_accumulate(AdaHessianSums& sums, const AdaHessianRequest& request, const at::Tensor& loss,
                           double weight) {
  TORCH_CHECK(!request.refresh || !request.finite_difference, kAdaHessian,
              ": accumulate() takes a loss, hvp=\"finite_difference\" needs a closure: pass one to step() instead");
  const auto grads = curvature::gradients(loss, request.params, request.refresh, /*keep_graph=*/false);
  check_all(request, grads);
  std::vector<at::Tensor> curvature;
  if (request.refresh) curvature = estimate(request, grads, {});
  const at::NoGradGuard no_grad;
  const auto add = [&](std::vector<at::Tensor>& to, const std::vector<at::Tensor>& from) {
    to.resize(request.params.size());
    std::vector<at::Tensor> targets, addends;
    for (size_t i = 0; i < from.size(); ++i) {
      if (!from[i].defined()) continue;
      if (!to[i].defined()) {
        to[i] = at::zeros(from[i].sizes(), from[i].options().dtype(core::arithmetic_type(from[i].scalar_type())));
      }
      targets.push_back(to[i]);
      addends.push_back(from[i].detach());
    }
    if (!targets.empty()) core::accumulate_(targets, addends, {}, weight);
  };
  add(sums.grads, grads);
  if (request.refresh) add(sums.curvature, curvature);
}

}  // namespace torch_ext::optim
