// Collects what the module torch_ext._C binds. A *_bind.cpp file adds to it with a static object:
//
//   void bind(pybind11::module_& module) { module.def("name", &function); }
//   const Binding binding(bind);
#pragma once

#include <pybind11/pybind11.h>

namespace torch_ext::python {

struct Binding {
  explicit Binding(void (*bind)(pybind11::module_& module));
};

}  // namespace torch_ext::python
