#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/curvature/hutchinson_diag.h>
#include <torch_ext/curvature/hvp.h>

#include "python/closure.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;

Tensors hvp_of_loss(const at::Tensor& loss, const Tensors& params, const Tensors& v) {
  return without_gil([&] { return curvature::hvp(loss, params, v); });
}

Tensors hvp_of_function(const py::function& loss, const Tensors& params, const Tensors& v, const std::string& mode) {
  const auto closure = wrap_closure(loss);
  return without_gil([&] { return curvature::hvp(closure, params, v, mode); });
}

Tensors hutchinson_diag(const at::Tensor& loss, const Tensors& params, int64_t n_samples, int64_t seed) {
  return without_gil([&] { return curvature::hutchinson_diag(loss, params, n_samples, seed); });
}

const Binding binding([](py::module_& module) {
  module.def("hvp_of_loss", &hvp_of_loss);
  module.def("hvp_of_function", &hvp_of_function);
  module.def("hutchinson_diag", &hutchinson_diag);
});

}  // namespace
}  // namespace torch_ext::python
