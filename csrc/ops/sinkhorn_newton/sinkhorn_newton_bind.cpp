#include <torch/csrc/utils/pybind.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include "python/registry.h"

namespace torch_ext::python {
namespace {

const Binding binding([](pybind11::module_& module) {
  module.def("sinkhorn_unconverged", &ops::sinkhorn_unconverged);
});

}  // namespace
}  // namespace torch_ext::python
