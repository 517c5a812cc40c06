#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/local_lipschitz/lipschitz_layers.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

using ops::LipschitzLayers;
namespace py = pybind11;

const Binding binding([](py::module_& module) {
  py::class_<LipschitzLayers>(module, "LipschitzLayers")
      .def(py::init<>())
      .def("linear", &LipschitzLayers::linear)
      .def("conv2d", &LipschitzLayers::conv2d)
      .def("batch_norm", &LipschitzLayers::batch_norm)
      .def("activation", &LipschitzLayers::activation)
      .def("add", &LipschitzLayers::add)
      .def("flatten", &LipschitzLayers::flatten)
      .def_static("refuse", &LipschitzLayers::refuse)
      .def_static("refuse_setting", &LipschitzLayers::refuse_setting)
      .def_readonly("tensors", &LipschitzLayers::tensors)
      .def_readonly("layers", &LipschitzLayers::layers)
      .def_readonly("numbers", &LipschitzLayers::numbers)
      .def_readonly("names", &LipschitzLayers::names);
});

}  // namespace
}  // namespace torch_ext::python
