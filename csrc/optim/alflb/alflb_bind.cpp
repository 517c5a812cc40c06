#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/optim/alflb.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "optim/alflb/alflb_op.h"
#include "python/closure.h"
#include "python/optimizers.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using OptionalTensor = std::optional<at::Tensor>;

// A bias's state dict, completed and on the bias's device.
optim::StateTensors completed(py::dict& state, const at::Tensor& bias, const optim::Options& options) {
  optim::StateTensors tensors;
  for (const auto& [name, value] : state) {
    if (THPVariable_Check(value.ptr())) tensors[name.cast<std::string>()] = THPVariable_Unpack(value.ptr());
  }
  optim::alflb_init_state(bias, options, tensors);
  for (const auto& [name, tensor] : tensors) state[py::str(name)] = tensor;
  return tensors;
}

// One step of all groups. `owners` are the group numbers of the biases, `states` their state dicts, `groups` the
// options; a histogram and bounds are None where the rule has none.
void apply(const std::vector<at::Tensor>& biases, const std::vector<size_t>& owners,
           const std::vector<at::Tensor>& loads, const std::vector<OptionalTensor>& histograms,
           const std::vector<OptionalTensor>& bounds, const std::vector<int64_t>& top_k, const py::list& states,
           const py::list& groups, const OptionalTensor& found_inf, const at::Tensor& skipped) {
  const at::NoGradGuard no_grad;
  std::vector<std::unique_ptr<optim::Options>> owned;
  std::vector<const optim::Options*> options;
  for (const auto& group : groups) {
    options.push_back(owned.emplace_back(options_from("ALFLB", group.cast<py::dict>())).get());
  }
  std::vector<optim::AlflbLayers> layers(groups.size());
  for (size_t i = 0; i < biases.size(); ++i) {
    optim::alflb_check_bias(biases[i], i);
    auto dict = states[i].cast<py::dict>();
    const optim::StateTensors state = completed(dict, biases[i], *options[owners[i]]);
    const auto entry = [&](const char* name) {
      const auto found = state.find(name);
      return found == state.end() ? at::Tensor() : found->second;
    };
    optim::AlflbLayers& to = layers[owners[i]];
    to.biases.push_back(biases[i]);
    to.loads.push_back(loads[i]);
    to.last_loads.push_back(entry("last_load"));
    to.steps.push_back(entry("step"));
    to.updates.push_back(entry("updates"));
    to.momenta.push_back(entry("momentum_buffer"));
    to.histograms.push_back(histograms[i].value_or(at::Tensor()));
    to.bounds.push_back(bounds[i].value_or(at::Tensor()));
    to.top_k.push_back(top_k[i]);
  }
  without_gil([&] {
    optim::alflb_apply(layers, options, found_inf, skipped);
    return 0;
  });
}

py::tuple make_histogram(const at::Tensor& bias, int64_t bins) {
  at::Tensor histogram, bounds;
  optim::alflb_make_histogram(bias, bins, histogram, bounds);
  return py::make_tuple(histogram, bounds);
}

py::dict as_dict(const optim::LoadReport& report) {
  py::dict result;
  result["max_vio"] = report.max_vio;
  result["min_vio"] = report.min_vio;
  result["avg_vio"] = report.avg_vio;
  result["entropy"] = report.entropy;
  result["dead"] = report.dead;
  result["bias_spread"] = report.bias_spread;
  result["floor"] = report.floor;
  return result;
}

void check_state(const at::Tensor& bias, const py::dict& options, const optim::StateTensors& state) {
  optim::alflb_check_state(bias, *options_from("ALFLB", options), state);
}

at::Tensor step(optim::ALFLB& optimizer, const py::object& closure, const py::kwargs&) {
  const auto wrapped = wrap_closure(closure);
  return without_gil([&] { return optimizer.step(wrapped); });
}

py::object call(optim::ALFLB& optimizer, const std::string& method, const py::args& arguments) {
  if (method == "loads") return py::cast(optimizer.loads());
  if (method == "record") {
    optimizer.record(arguments[0].cast<size_t>(), arguments[1].cast<at::Tensor>());
    return py::none();
  }
  if (method == "discard") {
    optimizer.discard();
    return py::none();
  }
  if (method == "report") {
    py::list result;
    for (const auto& report : optimizer.report(arguments.size() > 0 && arguments[0].cast<bool>())) {
      result.append(as_dict(report));
    }
    return result;
  }
  throw py::attribute_error("ALFLB has no method '" + method + "'");
}

const OptimizerBinding::Registrar registrar(bind_optimizer<optim::ALFLB, optim::ALFLBOptions>(step, call));

const Binding binding([](py::module_& module) {
  module.def("alflb_apply", &apply);
  module.def("alflb_check_bias", &optim::alflb_check_bias);
  module.def("alflb_check_state", &check_state);
  module.def("alflb_make_histogram", &make_histogram);
  module.def("load_report", [](const at::Tensor& load, const at::Tensor& bias, int64_t top_k) {
    return as_dict(optim::load_report(load, bias, top_k));
  });
  module.def("sampling_floor", &optim::ALFLB::sampling_floor);
});

}  // namespace
}  // namespace torch_ext::python
