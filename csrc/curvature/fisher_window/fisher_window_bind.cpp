#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>

#include "curvature/fisher_window/fisher_window_op.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using curvature::FisherWindowLayout;
using Tensors = std::map<std::string, at::Tensor>;

FisherWindowLayout layout(int64_t num_grads, int64_t dim, const std::string& format, double topk, bool error_feedback) {
  return {num_grads, dim, format, topk, error_feedback};
}

void check(int64_t num_grads, int64_t dim, double damping, const std::string& format, double topk,
           bool error_feedback) {
  curvature::fisher_window_check(layout(num_grads, dim, format, topk, error_feedback), damping);
}

int64_t bytes(int64_t num_grads, int64_t dim, const std::string& format, double topk, bool error_feedback) {
  return curvature::fisher_window_bytes(layout(num_grads, dim, format, topk, error_feedback));
}

Tensors state(int64_t num_grads, int64_t dim, const std::string& format, double topk, bool error_feedback,
              const at::Device& device) {
  const auto made = curvature::fisher_window_state(layout(num_grads, dim, format, topk, error_feedback), device);
  Tensors tensors;
  for (const auto& [name, member] : curvature::fisher_window_tensors()) tensors[name] = made.*member;
  return tensors;
}

void load(int64_t num_grads, int64_t dim, const std::string& format, double topk, bool error_feedback, double damping,
          const Tensors& tensors, const Tensors& saved) {
  curvature::FisherWindowState own;
  for (const auto& [name, member] : curvature::fisher_window_tensors()) own.*member = tensors.at(name);
  curvature::fisher_window_load(layout(num_grads, dim, format, topk, error_feedback), damping, own, saved);
}

void check_row(const at::Tensor& row, int64_t dim, const std::string& what) {
  curvature::fisher_window_check_row(row, dim, what.c_str());
}

const Binding binding([](py::module_& module) {
  module.def("fisher_window_check", &check);
  module.def("fisher_window_bytes", &bytes);
  module.def("fisher_window_state", &state);
  module.def("fisher_window_about", &curvature::fisher_window_about);
  module.def("fisher_window_load", &load);
  module.def("fisher_window_check_row", &check_row);
});

}  // namespace
}  // namespace torch_ext::python
