#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/distributed.h>

#include "python/closure.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

std::vector<at::Tensor> all_reduce_mean(std::vector<at::Tensor> tensors,
                                        const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  return without_gil([&] {
    mean_over(group)(tensors);
    return tensors;
  });
}

std::vector<at::Tensor> all_reduce_sum(std::vector<at::Tensor> tensors,
                                       const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  return without_gil([&] {
    sum_over(group)(tensors);
    return tensors;
  });
}

const Binding binding([](pybind11::module_& module) {
  module.def("all_reduce_mean", &all_reduce_mean);
  module.def("all_reduce_sum", &all_reduce_sum);
});

}  // namespace
}  // namespace torch_ext::python
