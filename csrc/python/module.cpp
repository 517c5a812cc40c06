// The Python module torch_ext._C: what the dispatcher cannot offer. Its content is in the *_bind.cpp files.
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>

#include <exception>
#include <vector>

#include "python/registry.h"

namespace torch_ext::python {
namespace {

using BindFunction = void (*)(pybind11::module_&);

// Local to the function, so that it exists before the first static Binding of any file.
std::vector<BindFunction>& bind_functions() {
  static std::vector<BindFunction> functions;
  return functions;
}

// TORCH_CHECK_VALUE becomes ValueError and so on, without the C++ backtrace, as in torch itself. Other exceptions stay
// with pybind11, which knows its own py::type_error and friends.
// NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11 fixes the signature
void translate_torch_error(std::exception_ptr error) {
  try {
    if (error) {
      std::rethrow_exception(error);
    }
  } catch (const c10::Error&) {
    torch::translate_exception_to_python(std::current_exception());
  }
}

}  // namespace

Binding::Binding(BindFunction bind) { bind_functions().push_back(bind); }

}  // namespace torch_ext::python

PYBIND11_MODULE(_C, module) {
  module.doc() = "Internal to torch_ext: bindings of C++ code that is not a dispatcher op.";
  pybind11::register_local_exception_translator(torch_ext::python::translate_torch_error);
  for (const auto& bind : torch_ext::python::bind_functions()) {
    bind(module);
  }
}
