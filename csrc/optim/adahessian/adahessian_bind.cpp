#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/optim/adahessian.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "optim/adahessian/adahessian_derivatives.h"
#include "optim/adahessian/adahessian_op.h"
#include "python/closure.h"
#include "python/optimizers.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;
using OptionalTensors = std::vector<std::optional<at::Tensor>>;

OptionalTensors optional(const Tensors& tensors) {
  OptionalTensors result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt);
  }
  return result;
}

Tensors plain(const OptionalTensors& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) result.push_back(tensor.value_or(at::Tensor()));
  return result;
}

// What both calls below need of an optimizer; see AdaHessianRequest.
optim::AdaHessianRequest request_from(Tensors params, std::vector<int64_t> ordinals, size_t n_params,
                                      const py::dict& options, bool refresh, int64_t epoch, bool magnitude_only) {
  optim::AdaHessianRequest request;
  request.params = std::move(params);
  request.n_params = n_params;
  request.probes = {options["n_samples"].cast<int64_t>(), options["seed"].cast<int64_t>(), epoch, std::move(ordinals),
                    nullptr};
  request.refresh = refresh;
  request.finite_difference = options["hvp"].cast<std::string>() == "finite_difference";
  request.magnitude_only = magnitude_only;
  request.scaler_unscaled = false;
  return request;
}

py::tuple derivatives(Tensors params, std::vector<int64_t> ordinals, size_t n_params, const py::dict& options,
                      bool refresh, int64_t epoch, bool magnitude_only, const py::object& closure,
                      const py::object& curvature_closure, const std::optional<OptionalTensors>& hessian,
                      bool scaler_unscaled, Tensors probes) {
  auto request =
      request_from(std::move(params), std::move(ordinals), n_params, options, refresh, epoch, magnitude_only);
  request.closure = wrap_closure(closure);
  request.curvature_closure = wrap_closure(curvature_closure);
  if (hessian.has_value()) request.hessian = plain(*hessian);
  request.scaler_unscaled = scaler_unscaled;
  request.probes.workspace = &probes;
  const auto found = without_gil([&] { return optim::adahessian_derivatives(request); });
  return py::make_tuple(optional(found.grads), found.curvature, probes);
}

py::tuple accumulate(const OptionalTensors& grads, const Tensors& curvature, Tensors params,
                     std::vector<int64_t> ordinals, size_t n_params, const py::dict& options, bool refresh,
                     int64_t epoch, bool magnitude_only, const at::Tensor& loss, double weight) {
  const auto request =
      request_from(std::move(params), std::move(ordinals), n_params, options, refresh, epoch, magnitude_only);
  optim::AdaHessianSums sums{plain(grads), curvature};
  without_gil([&] {
    optim::adahessian_accumulate(sums, request, loss, weight);
    return 0;
  });
  return py::make_tuple(optional(sums.grads), sums.curvature);
}

at::Tensor entry(const py::dict& state, const py::str& name) {
  PyObject* found = PyDict_GetItemWithError(state.ptr(), name.ptr());
  return found == nullptr || !THPVariable_Check(found) ? at::Tensor() : THPVariable_Unpack(found);
}

// A parameter's state dict, completed and on the parameter's device.
void complete_state(py::dict& state, const at::Tensor& param, const optim::Options& options, int64_t ordinal) {
  static const py::str bias_products("bias_products");
  const at::Tensor last = entry(state, bias_products);
  if (last.defined() && last.device() == param.device()) return;
  optim::StateTensors tensors;
  for (const auto& [name, value] : state) {
    if (THPVariable_Check(value.ptr())) tensors[name.cast<std::string>()] = THPVariable_Unpack(value.ptr());
  }
  optim::adahessian_init_state(param, options, ordinal, tensors);
  for (const auto& [name, tensor] : tensors) state[py::str(name)] = tensor;
}

// The update from gradients and curvature: all checks and state first, then one op per group. `owners` are the group
// numbers, `states` the state dicts (None where there is no gradient) of `params`; `groups` the options.
void apply(const Tensors& params, const std::vector<int64_t>& ordinals, const std::vector<size_t>& owners,
           const OptionalTensors& grads, const Tensors& curvature, const py::list& states, const py::list& groups,
           bool refresh, const std::optional<at::Tensor>& found_inf, const at::Tensor& skipped,
           const std::optional<at::Tensor>& grad_scale, double loss_scale, bool grads_unscaled,
           bool external_curvature) {
  static const py::str exp_avg("exp_avg"), second("exp_hessian_diag_sq"), step("step"), bias_products("bias_products");
  const at::NoGradGuard no_grad;
  std::vector<std::unique_ptr<optim::Options>> owned;
  std::vector<const optim::Options*> options;
  for (const auto& group : groups) {
    options.push_back(owned.emplace_back(options_from("AdaHessian", group.cast<py::dict>())).get());
  }
  std::vector<optim::AdaHessianLists> lists(groups.size());
  Tensors read;
  for (size_t i = 0; i < params.size(); ++i) {
    if (!grads[i].has_value()) continue;
    auto state = states[i].cast<py::dict>();
    complete_state(state, params[i], *options[owners[i]], ordinals[i]);
    optim::AdaHessianLists& to = lists[owners[i]];
    to.params.push_back(params[i]);
    to.grads.push_back(*grads[i]);
    if (refresh) to.curvature.push_back(curvature[i]);
    to.exp_avg.push_back(entry(state, exp_avg));
    to.exp_hessian_diag_sq.push_back(entry(state, second));
    to.steps.push_back(entry(state, step));
    to.bias_products.push_back(entry(state, bias_products));
    read.push_back(*grads[i]);
  }
  read.insert(read.end(), curvature.begin(), curvature.end());
  const optim::AdaHessianScaling scaling{grad_scale, loss_scale, grads_unscaled, external_curvature};
  without_gil([&] {
    optim::adahessian_apply(lists, options, read, found_inf, skipped, refresh, scaling);
    return 0;
  });
}

void check_state(const at::Tensor& param, const py::dict& options, const optim::StateTensors& state) {
  optim::adahessian_check_state(param, *options_from("AdaHessian", options), state);
}

at::Tensor step(optim::AdaHessian& optimizer, const py::object& closure, const py::kwargs& kwargs) {
  optim::AdaHessianInputs inputs;
  inputs.closure = wrap_closure(closure);
  if (kwargs.contains("curvature_closure")) inputs.curvature_closure = wrap_closure(kwargs["curvature_closure"]);
  if (kwargs.contains("hessian") && !kwargs["hessian"].is_none())
    inputs.hessian = plain(kwargs["hessian"].cast<OptionalTensors>());
  if (kwargs.contains("loss_scale") && !kwargs["loss_scale"].is_none())
    inputs.loss_scale = kwargs["loss_scale"].cast<double>();
  if (kwargs.contains("accumulate")) {  // list of (loss, weight): the micro-batches of this step
    for (const auto& [loss, weight] : kwargs["accumulate"].cast<std::vector<std::pair<at::Tensor, double>>>()) {
      without_gil([&, &loss = loss, &weight = weight] {
        optimizer.accumulate(loss, weight);
        return 0;
      });
    }
  }
  return without_gil([&] { return optimizer.step(inputs); });
}

const OptimizerBinding::Registrar registrar(bind_optimizer<optim::AdaHessian, optim::AdaHessianOptions>(step));

const Binding binding([](py::module_& module) {
  module.def("adahessian_derivatives", &derivatives);
  module.def("adahessian_accumulate", &accumulate);
  module.def("adahessian_check_loss_scale", &optim::adahessian_check_loss_scale);
  module.def("adahessian_check_same_params", &optim::adahessian_check_same_params);
  module.def("adahessian_apply", &apply);
  module.def("adahessian_check_state", &check_state);
});

}  // namespace
}  // namespace torch_ext::python
