// Field tables, option checks and the C++ optimizer objects that torch_ext.testing drives.
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <optional>
#include <utility>

#include "optim/base/closure.h"
#include "python/closure.h"
#include "python/optimizers.h"
#include "python/registry.h"

namespace torch_ext::python {

namespace py = pybind11;

namespace {

std::map<std::string, OptimizerBinding>& bindings() {
  static std::map<std::string, OptimizerBinding> all;
  return all;
}

const char* type_name(optim::Field::Type type) {
  switch (type) {
    case optim::Field::Type::kFloat:
      return "float";
    case optim::Field::Type::kOptionalFloat:
      return "float | None";
    case optim::Field::Type::kFloatPair:
      return "tuple[float, float]";
    case optim::Field::Type::kInt:
      return "int";
    case optim::Field::Type::kOptionalInt:
      return "int | None";
    case optim::Field::Type::kBool:
      return "bool";
    case optim::Field::Type::kString:
      return "str";
    case optim::Field::Type::kOptionalString:
      return "str | None";
  }
  return "";
}

const char* dtype_name(optim::StateField::DType dtype) {
  switch (dtype) {
    case optim::StateField::DType::kArithmetic:
      return "arithmetic";
    case optim::StateField::DType::kFloat32:
      return "float32";
    case optim::StateField::DType::kFloat64:
      return "float64";
    case optim::StateField::DType::kInt64:
      return "int64";
    case optim::StateField::DType::kStored:
      return "stored";
  }
  return "";
}

py::dict schema_dict(const std::string& name) {
  const optim::Schema& schema = optimizer_binding(name).schema();
  py::list fields, state;
  for (const optim::Field& field : schema.fields) {
    py::dict item;
    item["name"] = field.name;
    item["type"] = type_name(field.type);
    item["default"] = to_python(field.default_value);
    item["choices"] = field.choices;
    item["global"] = field.global;
    fields.append(item);
  }
  for (const optim::StateField& field : schema.state) {
    py::dict item;
    item["name"] = field.name;
    item["dtype"] = dtype_name(field.dtype);
    item["on_cpu"] = field.on_cpu;
    item["shared"] = field.shared;
    state.append(item);
  }
  py::dict result;
  result["optimizer"] = schema.optimizer;
  result["format_version"] = schema.format_version;
  result["fields"] = fields;
  result["state"] = state;
  return result;
}

// The checked values of all options, in the field's own type.
py::dict check_options(const std::string& name, const py::dict& values) {
  const auto options = options_from(name, values);
  options->check();
  py::dict result;
  for (const optim::Field& field : options->schema().fields) {
    result[py::str(field.name)] = to_python(options->get(field.name));
  }
  return result;
}

// The gradients that a first-order step reads, None where a parameter has none.
std::vector<std::optional<at::Tensor>> first_order_gradients(const std::string& optimizer, const py::object& closure,
                                                             const std::vector<at::Tensor>& params,
                                                             const std::vector<int64_t>& ordinals) {
  const auto wrapped = wrap_closure(closure);
  const auto found =
      without_gil([&] { return optim::first_order_gradients(optimizer.c_str(), wrapped, params, ordinals); });
  std::vector<std::optional<at::Tensor>> result;
  for (const at::Tensor& grad : found.grads) {
    result.push_back(grad.defined() ? std::optional<at::Tensor>(grad) : std::nullopt);
  }
  return result;
}

// A C++ optimizer as torch_ext.testing sees it; not part of the product.
class CppOptimizer {
 public:
  CppOptimizer(const std::string& name, const py::list& groups, const py::dict& defaults)
      : binding_(optimizer_binding(name)) {
    OptimizerBinding::Groups converted;
    for (const py::handle& group : groups) converted.push_back(group_from(name, group.cast<py::dict>()));
    optimizer_ = binding_.make(std::move(converted), *options_from(name, defaults));
  }

  py::object step(const py::object& closure, const py::kwargs& inputs) {
    const at::Tensor loss = binding_.step(*optimizer_, closure, inputs);
    return loss.defined() ? py::cast(loss) : py::none();
  }
  py::object call(const std::string& method, const py::args& arguments) {
    return binding_.call(*optimizer_, method, arguments);
  }
  void add_param_group(const py::dict& group) {
    optimizer_->add_param_group(group_from(optimizer_->schema().optimizer, group));
  }
  void set_option(size_t group, const std::string& name, const py::object& value) {
    static_cast<optim::Options&>(optimizer_->param_groups().at(group).options()).set(name, to_ivalue(value));
  }
  py::object option(size_t group, const std::string& name) const {
    return to_python(static_cast<const optim::Options&>(optimizer_->param_groups().at(group).options()).get(name));
  }
  optim::OptimizerBase& get() { return *optimizer_; }

 private:
  static torch::optim::OptimizerParamGroup group_from(const std::string& name, const py::dict& group) {
    auto params = group["params"].cast<std::vector<at::Tensor>>();
    return {std::move(params), std::unique_ptr<torch::optim::OptimizerOptions>(options_from(name, group))};
  }

  const OptimizerBinding& binding_;
  std::unique_ptr<optim::OptimizerBase> optimizer_;
};

void bind_base(py::module_& module) {
  module.def("optimizers", [] {
    std::vector<std::string> names;
    for (const auto& item : bindings()) names.push_back(item.first);
    return names;
  });
  module.def("schema", &schema_dict, py::arg("optimizer"), "The field table of an optimizer.");
  module.def("check_options", &check_options, py::arg("optimizer"), py::arg("options"),
             "Options checked by the field table, missing ones at their defaults; other keys are ignored.");
  module.def("first_order_gradients", &first_order_gradients);
  py::class_<CppOptimizer>(module, "CppOptimizer")
      .def(py::init<const std::string&, const py::list&, const py::dict&>())
      .def("step", &CppOptimizer::step, py::arg("closure") = py::none())
      .def("call", &CppOptimizer::call, py::arg("method"))
      .def("add_param_group", &CppOptimizer::add_param_group)
      .def("set_option", &CppOptimizer::set_option)
      .def("option", &CppOptimizer::option)
      .def("zero_grad", [](CppOptimizer& self) { self.get().zero_grad(); })
      .def("state_dict", [](CppOptimizer& self) { return to_python(self.get().state_dict()); })
      .def("load_state_dict",
           [](CppOptimizer& self, const py::object& dict) { self.get().load_state_dict(to_ivalue(dict)); })
      .def("save_state_dict", [](CppOptimizer& self, const std::string& path) { self.get().save_state_dict(path); })
      .def("load_state_dict_file",
           [](CppOptimizer& self, const std::string& path) { self.get().load_state_dict(path); })
      .def_property_readonly("skipped_steps", [](CppOptimizer& self) { return self.get().skipped_steps(); });
}

const Binding binding(bind_base);

}  // namespace

OptimizerBinding::Registrar::Registrar(OptimizerBinding binding) {
  const std::string name = binding.schema().optimizer;
  bindings().emplace(name, std::move(binding));
}

const OptimizerBinding& optimizer_binding(const std::string& name) {
  const auto it = bindings().find(name);
  if (it == bindings().end()) throw py::key_error("torch_ext has no optimizer '" + name + "'");
  return it->second;
}

std::unique_ptr<optim::Options> options_from(const std::string& name, const py::dict& values) {
  auto options = optimizer_binding(name).options();
  for (const auto& item : values) {
    const auto key = item.first.cast<std::string>();
    if (options->schema().find(key) == nullptr) continue;
    py::object value = py::reinterpret_borrow<py::object>(item.second);
    if (THPVariable_Check(value.ptr())) value = value.attr("item")();  // a learning rate may be a one-element tensor
    options->set(key, to_ivalue(value));
  }
  return options;
}

}  // namespace torch_ext::python
