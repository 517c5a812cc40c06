#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/distributed.h>
#include <torch_ext/optim/mezo.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "optim/mezo/mezo_step.h"
#include "python/closure.h"
#include "python/optimizers.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using ProcessGroup = std::optional<c10::intrusive_ptr<c10d::ProcessGroup>>;

std::vector<optim::MezoTarget> targets_of(const py::list& groups) {
  std::vector<optim::MezoTarget> targets;
  int64_t ordinal = 0;
  for (const py::handle& item : groups) {
    const auto options = options_from("MeZO", item.cast<py::dict>());
    for (const py::handle& entry : item["params"]) {
      auto param = entry.cast<at::Tensor>();
      if (param.requires_grad()) {
        optim::mezo_check_param(param, ordinal);
        targets.push_back(
            {std::move(param), ordinal, options->get("lr").toDouble(), options->get("weight_decay").toDouble(), {}});
      }
      ++ordinal;
    }
  }
  return targets;
}

optim::MezoNoise noise_of(const py::list& groups, int64_t epoch) {
  const auto options = options_from("MeZO", groups[0].cast<py::dict>());
  return {options->get("seed").toInt(), epoch, options->get("eps").toDouble()};
}

// (mean, slope) of both losses; the parameters are as they were.
py::tuple losses(const py::list& groups, int64_t epoch, const py::object& closure, const ProcessGroup& group) {
  const auto targets = targets_of(groups);
  const auto noise = noise_of(groups, epoch);
  const bool maximize = options_from("MeZO", groups[0].cast<py::dict>())->get("maximize").toBool();
  const auto wrapped = wrap_closure(closure);
  const auto result = without_gil([&] {
    return optim::mezo_losses(targets, noise, maximize, wrapped, group.has_value() ? mean_over(*group) : nullptr);
  });
  return py::make_tuple(result.mean, result.slope);
}

// `state_of` gives a parameter's state dict.
void update(const py::list& groups, int64_t epoch, const at::Tensor& slope, const at::Tensor& skipped,
            const py::object& state_of) {
  auto targets = targets_of(groups);
  for (auto& target : targets) {
    auto state = state_of(target.param).cast<py::dict>();
    optim::StateTensors tensors;
    for (const auto& [name, value] : state) {
      if (THPVariable_Check(value.ptr())) tensors[name.cast<std::string>()] = THPVariable_Unpack(value.ptr());
    }
    optim::mezo_init_state(target.param, tensors);
    for (const auto& [name, tensor] : tensors) state[py::str(name)] = tensor;
    target.step = tensors.at("step");
  }
  const auto noise = noise_of(groups, epoch);
  without_gil([&] {
    optim::mezo_update(targets, noise, slope, skipped);
    return 0;
  });
}

at::Tensor step(optim::MeZO& optimizer, const py::object& closure, const py::kwargs&) {
  const auto wrapped = wrap_closure(closure);
  return without_gil([&] { return optimizer.step(wrapped); });
}

const OptimizerBinding::Registrar registrar(bind_optimizer<optim::MeZO, optim::MeZOOptions>(step));

// A perturbation by itself, for tests: what it remembers, and taking it back.
const Binding binding([](py::module_& module) {
  module.def("mezo_losses", &losses);
  module.def("mezo_update", &update);
  module.def("mezo_check_state",
             [](const at::Tensor& param, const optim::StateTensors& state) { optim::mezo_check_state(param, state); });
  py::class_<optim::MezoPerturbation>(module, "MezoPerturbation")
      .def(py::init([](const std::vector<at::Tensor>& params, double scale, int64_t seed, int64_t epoch) {
        std::vector<optim::MezoTarget> targets;
        for (const at::Tensor& p : params) targets.push_back({p, static_cast<int64_t>(targets.size()), 0, 0, {}});
        return std::make_unique<optim::MezoPerturbation>(targets, optim::MezoNoise{seed, epoch, 0}, scale);
      }))
      .def("restore", &optim::MezoPerturbation::restore)
      .def("bytes", &optim::MezoPerturbation::bytes)
      .def("kept", &optim::MezoPerturbation::kept);
});

}  // namespace
}  // namespace torch_ext::python
