#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/curvature/obs_prune.h>
#include <torch_ext/curvature/prune_model.h>

#include <utility>

#include "python/closure.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;

// (masks, sparsity of each, total sparsity, predicted increase or None)
py::tuple prune_model(const std::vector<std::string>& names, const Tensors& weights, const py::object& next_loss,
                      double sparsity, const std::string& method, int64_t num_grads, double damping,
                      std::optional<int64_t> block, int64_t recomputations, Tensors masks,
                      std::function<void(int64_t, int64_t)> progress) {
  curvature::PruneModelOptions options;
  options.method = method;
  options.num_grads = num_grads;
  options.damping = damping;
  options.block = block;
  options.recomputations = recomputations;
  options.masks = std::move(masks);
  options.progress = std::move(progress);
  curvature::NamedWeights named;
  for (size_t i = 0; i < names.size(); ++i) named.emplace_back(names[i], weights.at(i));
  const auto closure = wrap_closure(next_loss);
  const auto result = without_gil([&] { return curvature::prune_model(named, closure, sparsity, options); });
  py::object increase = py::none();
  if (result.predicted_loss_increase.defined()) increase = py::float_(result.predicted_loss_increase.item<double>());
  return py::make_tuple(result.masks, result.sparsity, result.total_sparsity, increase);
}

const Binding binding([](py::module_& module) {
  module.def("prune_model", &prune_model);
  module.def("sparsity_schedule", &curvature::sparsity_schedule);
});

}  // namespace
}  // namespace torch_ext::python
