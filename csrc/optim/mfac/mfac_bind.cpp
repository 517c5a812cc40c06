#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/distributed.h>
#include <torch_ext/optim/mfac.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "optim/mfac/mfac_step.h"
#include "python/closure.h"
#include "python/ivalue_convert.h"
#include "python/optimizers.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using OptionalTensors = std::vector<std::optional<at::Tensor>>;
using ProcessGroup = std::optional<c10::intrusive_ptr<c10d::ProcessGroup>>;

std::vector<at::Tensor> plain(const OptionalTensors& tensors) {
  std::vector<at::Tensor> result;
  for (const auto& tensor : tensors) result.push_back(tensor.value_or(at::Tensor()));
  return result;
}

optim::ColumnShards shards_of(const ProcessGroup& group) {
  return group.has_value() ? shards_over(*group) : optim::ColumnShards();
}

// The windows of one call with their parameters, made from the Python optimizer's groups and states; lives for that
// call. `values` has a gradient, a vector or None for each parameter, `states` its dict or None.
class MFACBlocks {
 public:
  MFACBlocks(const py::list& groups, const OptionalTensors& values, const py::list& states, const ProcessGroup& group)
      : shards_(shards_of(group)) {
    for (const py::handle& entry : groups) options_.push_back(options_from("MFAC", entry.cast<py::dict>()));
    const bool per_group = options_[0]->get("blocks").toStringRef() == "per_group";
    std::vector<optim::MFACBlock> all(per_group ? options_.size() : 1);
    size_t ordinal = 0;
    for (size_t g = 0; g < options_.size(); ++g) {
      for (const py::handle& item : groups[g]["params"]) {
        auto param = item.cast<at::Tensor>();
        add(all[per_group ? g : 0], std::move(param), g, values[ordinal].value_or(at::Tensor()), states[ordinal],
            static_cast<int64_t>(ordinal));
        ++ordinal;
      }
    }
    for (optim::MFACBlock& block : all) {
      if (optim::mfac_columns(block.params) > 0) blocks_.push_back(std::move(block));
    }
    size_ = ordinal;
  }

  void check_columns() const {
    for (const optim::MFACBlock& block : blocks_) optim::mfac_check_columns(block);
  }

  // A step up to its first write: states of what has a gradient, by ordinal. False if nothing has one.
  bool prepare() {
    std::vector<optim::MFACBlock> busy;
    for (optim::MFACBlock& block : blocks_) {
      if (optim::mfac_has_gradients(block)) busy.push_back(std::move(block));
    }
    blocks_ = std::move(busy);
    for (optim::MFACBlock& block : blocks_) optim::mfac_prepare(block, shards_);
    return !blocks_.empty();
  }

  void step(const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
            const at::Tensor& skipped) const {
    without_gil([&] {
      optim::mfac_step(blocks_, {grad_scale, found_inf, skipped, shards_});
      return 0;
    });
  }

  OptionalTensors precondition() {
    OptionalTensors result(size_);
    without_gil([&] {
      for (optim::MFACBlock& block : blocks_) {
        if (block.states[0].count("window_rows") != 0) optim::mfac_ready_window(block, shards_);
        const auto part = optim::mfac_precondition(block, shards_);
        for (size_t i = 0; i < part.size(); ++i) {
          if (part[i].defined()) result[static_cast<size_t>(block.ordinals[i])] = part[i];
        }
      }
      return 0;
    });
    return result;
  }

  // What the calls above have made or moved, by ordinal.
  std::map<int64_t, optim::StateTensors> states() const {
    std::map<int64_t, optim::StateTensors> result;
    for (const optim::MFACBlock& block : blocks_) {
      for (size_t i = 0; i < block.changed.size(); ++i) {
        if (block.changed[i] != 0) result[block.ordinals[i]] = block.states[i];
      }
    }
    return result;
  }

  int64_t window_count() const { return optim::mfac_window_count(blocks_); }
  int64_t memory_bytes() const { return optim::mfac_memory_bytes(blocks_, shards_.count); }

 private:
  void add(optim::MFACBlock& block, at::Tensor param, size_t group, at::Tensor value, const py::handle& state,
           int64_t ordinal) {
    if (!optim::mfac_has_columns(param)) return;
    block.shared = options_[0].get();
    block.params.push_back(std::move(param));
    block.ordinals.push_back(ordinal);
    block.grads.push_back(std::move(value));
    block.options.push_back(options_[group].get());
    optim::StateTensors& tensors = block.states.emplace_back();
    if (state.is_none()) return;
    for (const auto& item : state.cast<py::dict>()) {
      if (THPVariable_Check(item.second.ptr())) {
        tensors[item.first.cast<std::string>()] = item.second.cast<at::Tensor>();
      }
    }
  }

  optim::ColumnShards shards_;
  std::vector<std::unique_ptr<optim::Options>> options_;
  std::vector<optim::MFACBlock> blocks_;
  size_t size_ = 0;
};

void check_state(const at::Tensor& param, const py::dict& options, const optim::StateTensors& state) {
  optim::mfac_check_state(param, *options_from("MFAC", options), state);
}

at::Tensor step(optim::MFAC& optimizer, const py::object& closure, const py::kwargs&) {
  const auto wrapped = wrap_closure(closure);
  return without_gil([&] { return optimizer.step(wrapped); });
}

py::object call(optim::MFAC& optimizer, const std::string& method, const py::args& arguments) {
  if (method == "window_count") return py::int_(optimizer.window_count());
  if (method == "memory_bytes") return py::int_(optimizer.memory_bytes());
  if (method == "set_damping") {
    optimizer.set_damping(arguments[0].cast<double>());
    return py::none();
  }
  if (method == "precondition") {
    OptionalTensors result;
    for (const at::Tensor& tensor : optimizer.precondition(plain(arguments[0].cast<OptionalTensors>()))) {
      result.push_back(tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt);
    }
    return py::cast(result);
  }
  if (method == "state_dict") return to_python(optimizer.state_dict(arguments[0].cast<bool>()));
  if (method == "save_state_dict") {
    optimizer.save_state_dict(arguments[0].cast<std::string>(), arguments[1].cast<bool>());
    return py::none();
  }
  throw py::attribute_error("MFAC has no method '" + method + "'");
}

const OptimizerBinding::Registrar registrar(bind_optimizer<optim::MFAC, optim::MFACOptions>(step, call));

const Binding binding([](py::module_& module) {
  module.def("mfac_check_state", &check_state);
  module.def("mfac_check_vectors", [](const std::vector<at::Tensor>& params, const OptionalTensors& x) {
    optim::mfac_check_vectors(params, plain(x));
  });
  module.def("mfac_is_window", &optim::mfac_is_window);
  py::class_<MFACBlocks>(module, "MFACBlocks")
      .def(py::init<const py::list&, const OptionalTensors&, const py::list&, const ProcessGroup&>())
      .def("check_columns", &MFACBlocks::check_columns)
      .def("prepare", &MFACBlocks::prepare)
      .def("step", &MFACBlocks::step)
      .def("precondition", &MFACBlocks::precondition)
      .def("states", &MFACBlocks::states)
      .def("window_count", &MFACBlocks::window_count)
      .def("memory_bytes", &MFACBlocks::memory_bytes);
});

}  // namespace
}  // namespace torch_ext::python
