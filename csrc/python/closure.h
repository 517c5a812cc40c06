// Python callables as C++ closures: called with the GIL, destroyed with the GIL, from code that runs without it.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <functional>
#include <memory>

namespace torch_ext::python {

// An empty function for None. A result that is no tensor (a closure that only calls backward) is an undefined tensor.
inline std::function<at::Tensor()> wrap_closure(const pybind11::object& callable) {
  if (callable.is_none()) return {};
  const std::shared_ptr<pybind11::object> held(new pybind11::object(callable), [](pybind11::object* object) {
    const pybind11::gil_scoped_acquire gil;
    delete object;
  });
  return [held]() -> at::Tensor {
    const pybind11::gil_scoped_acquire gil;
    const pybind11::object result = (*held)();
    return THPVariable_Check(result.ptr()) ? THPVariable_Unpack(result.ptr()) : at::Tensor();
  };
}

// Runs `body` without the GIL: what calls autograd must not hold it.
template <typename Body>
auto without_gil(const Body& body) {
  const pybind11::gil_scoped_release released;
  return body();
}

}  // namespace torch_ext::python
