#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/moe/stochastic_balance.h>

#include <optional>
#include <string>

#include "moe/stochastic_balance/stochastic_balance_op.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

moe::BalanceOptions options_of(const std::string& rule, const std::string& g, const OptionalTensor& table) {
  return moe::BalanceOptions().rule(rule).g(g).table(table.value_or(at::Tensor()));
}

const Binding binding([](pybind11::module_& module) {
  module.def("stochastic_balance_exact",
             [](const at::Tensor& probability, const OptionalTensor& weight, const OptionalTensor& capacity,
                const std::string& rule, const std::string& g, const OptionalTensor& table) {
               return moe::stochastic_balance_exact(probability, weight, capacity, options_of(rule, g, table));
             });
  module.def("stochastic_optimum", &moe::stochastic_optimum);
  module.def("fluid_lp_equal_p", &moe::fluid_lp_equal_p);
  module.def("balance_check", [](int64_t servers, const OptionalTensor& weight, const OptionalTensor& capacity,
                                 const std::string& rule, const std::string& g, const OptionalTensor& table) {
    moe::balance_check(servers, weight, capacity, options_of(rule, g, table));
  });
  module.def(
      "balance_assign", [](const at::Tensor& probability, const OptionalTensor& weight, const OptionalTensor& capacity,
                           const std::string& rule, const std::string& g, const OptionalTensor& table,
                           const at::Tensor& load, const at::Tensor& attempts, const at::Tensor& done) {
        return moe::balance_assign(probability, weight, capacity, options_of(rule, g, table), load, attempts, done);
      });
  module.def("balance_report", &moe::balance_report);
});

}  // namespace
}  // namespace torch_ext::python
