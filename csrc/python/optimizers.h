// The optimizers that Python can reach by name: their field tables, and the C++ classes for parity tests.
#pragma once

#include <torch_ext/optim/base.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "python/ivalue_convert.h"

namespace torch_ext::python {

struct OptimizerBinding {
  using Groups = std::vector<torch::optim::OptimizerParamGroup>;
  std::function<const optim::Schema&()> schema;
  std::function<std::unique_ptr<optim::Options>()> options;  // defaults of the table
  std::function<std::unique_ptr<optim::OptimizerBase>(Groups groups, const optim::Options& defaults)> make;
  // step(closure, **inputs) with whatever else the class takes
  std::function<at::Tensor(optim::OptimizerBase& optimizer, const pybind11::object& closure,
                           const pybind11::kwargs& inputs)>
      step;
  // What else the class offers: call(method's name, *arguments). Empty if nothing.
  std::function<pybind11::object(optim::OptimizerBase& optimizer, const std::string& method,
                                 const pybind11::args& arguments)>
      call;

  // Registers under the schema's name; used as a static object like Binding.
  struct Registrar {
    explicit Registrar(OptimizerBinding binding);
  };
};

// KeyError for an unknown name.
const OptimizerBinding& optimizer_binding(const std::string& name);

// Options of an optimizer from a dict; keys that are no option are ignored, so a whole parameter group can be passed.
std::unique_ptr<optim::Options> options_from(const std::string& name, const pybind11::dict& values);

template <typename Optimizer, typename OptimizerOptions>
OptimizerBinding bind_optimizer(
    std::function<at::Tensor(Optimizer&, const pybind11::object&, const pybind11::kwargs&)> step,
    std::function<pybind11::object(Optimizer&, const std::string&, const pybind11::args&)> call = {}) {
  return {[]() -> const optim::Schema& { return Optimizer::static_schema(); },
          [] { return std::make_unique<OptimizerOptions>(); },
          [](OptimizerBinding::Groups groups, const optim::Options& defaults) {
            return std::make_unique<Optimizer>(std::move(groups), static_cast<const OptimizerOptions&>(defaults));
          },
          [step](optim::OptimizerBase& optimizer, const pybind11::object& closure, const pybind11::kwargs& inputs) {
            return step(static_cast<Optimizer&>(optimizer), closure, inputs);
          },
          [call](optim::OptimizerBase& optimizer, const std::string& method, const pybind11::args& arguments) {
            if (!call) throw pybind11::attribute_error("no method '" + method + "'");
            return call(static_cast<Optimizer&>(optimizer), method, arguments);
          }};
}

}  // namespace torch_ext::python
