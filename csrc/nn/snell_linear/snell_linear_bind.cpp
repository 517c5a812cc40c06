#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/nn/snell_linear.h>

#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;

nn::SnellBudgetOptions budget(int64_t total_steps, double initial, double target, std::tuple<double, double> betas,
                              int64_t init_warmup, int64_t final_warmup) {
  return nn::SnellBudgetOptions(total_steps)
      .initial(initial)
      .target(target)
      .betas(betas)
      .init_warmup(init_warmup)
      .final_warmup(final_warmup);
}

const Binding binding([](py::module_& module) {
  module.def("check_snell_options", &nn::check_snell_options);
  module.def("snell_add_", &nn::snell_add_, py::call_guard<py::gil_scoped_release>());
  module.def("snell_budget_score", &nn::snell_budget_score, py::call_guard<py::gil_scoped_release>());
  module.def("snell_budget_check", [](int64_t layers, int64_t total_steps, double initial, double target,
                                      std::tuple<double, double> betas, int64_t init_warmup, int64_t final_warmup) {
    nn::check_snell_budget(budget(total_steps, initial, target, betas, init_warmup, final_warmup), layers);
  });
  module.def("snell_budget_split", [](const std::vector<double>& scores, const std::vector<int64_t>& entries,
                                      int64_t step, int64_t total_steps, double initial, double target,
                                      std::tuple<double, double> betas, int64_t init_warmup, int64_t final_warmup) {
    return nn::snell_budget_split(scores, entries, step,
                                  budget(total_steps, initial, target, betas, init_warmup, final_warmup));
  });
});

}  // namespace
}  // namespace torch_ext::python
