// What every optimizer of the pack is: a torch::optim::Optimizer without the traps of its base class.
#pragma once

#include <torch_ext/optim/options.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace torch_ext::optim {

// Replaces each tensor by its mean over all processes, in place. <torch_ext/distributed.h> makes one from a
// ProcessGroup.
using ReduceFn = std::function<void(std::vector<at::Tensor>&)>;

// How `count` processes share the elements of one long vector, the r-th slice of equal length being that of process r.
// <torch_ext/distributed.h> makes one from a ProcessGroup. The default is one process.
struct ColumnShards {
  int64_t rank = 0, count = 1;
  // The whole vector of each process -> the own slice of their mean.
  std::function<at::Tensor(const at::Tensor&)> reduce_scatter_mean;
  // Sums over the processes, in place.
  std::function<void(at::Tensor&)> all_reduce_sum;
  // The own slice of each process -> the whole vector.
  std::function<at::Tensor(const at::Tensor&)> all_gather;
};

class TORCH_EXT_API OptimizerBase : public torch::optim::Optimizer {
 public:
  const Schema& schema() const { return options_of(*defaults_).schema(); }

  // Adds a group. Options that the group does not set explicitly are inherited from the defaults. Errors: duplicate
  // parameters (ValueError), another optimizer's options (TypeError), a global option that differs from the other
  // groups (ValueError). Call it on this type: through torch::optim::Optimizer& the base's version would run.
  void add_param_group(const torch::optim::OptimizerParamGroup& group);

  // {'state': {index: {name: tensor}}, 'param_groups': [...], 'torch_ext': {...}}: the dict that Python's state_dict()
  // returns. Tensors are shared, not copied.
  c10::IValue state_dict() const;
  // Takes such a dict, from either language. State goes to the parameters' devices and keeps its own dtype. Errors
  // leave the optimizer as it was.
  void load_state_dict(const c10::IValue& dict);
  // The same to and from a file that torch.load(path, weights_only=True) reads and torch.save writes.
  void save_state_dict(const std::string& path) const;
  void load_state_dict(const std::string& path);
  void load_state_dict(const char* path) { load_state_dict(std::string(path)); }

  // torch::save(optimizer, path) and torch::load(optimizer, path).
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  // Steps that changed nothing because a gradient was infinite or NaN: 0-dim int64 on the first parameter's device.
  at::Tensor skipped_steps() const;

  // Drops state of tensors that no longer are in any group; call it after editing param_groups()[i].params().
  void prune_state();

  // Averages over processes whatever a step reads; empty means not distributed.
  void set_reduce(ReduceFn reduce) { reduce_ = std::move(reduce); }

 protected:
  // One parameter that has a place in the step.
  struct Entry {
    at::Tensor param;
    int64_t ordinal;  // running number over groups
    size_t group;
  };

  OptimizerBase(const std::vector<torch::optim::OptimizerParamGroup>& groups, std::unique_ptr<Options> defaults);

  // Shapes of loaded state against the parameter and its group's options; ValueError.
  virtual void check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const = 0;
  // What a checkpoint would make of the optimizer, before it does: options of each group, state of a parameter (null if
  // it has none). Rules that concern several parameters; ValueError.
  using StateLookup = std::function<const StateTensors*(const at::Tensor& param)>;
  virtual void check_loaded(const std::vector<const Options*>&, const StateLookup&) const {}
  // Called after a checkpoint was loaded: drops what was begun on top of the old state.
  virtual void state_replaced() {}

  static const Options& options_of(const torch::optim::OptimizerOptions& options);
  const Options& group_options(size_t group) const { return options_of(param_groups_[group].options()); }
  // All parameters of all groups in order.
  std::vector<Entry> entries() const;
  // The state of a parameter, made on first use.
  ParamState& state_of(const at::Tensor& param);
  // An optimizer-wide 0-dim int64 counter in the first parameter's state; 0 on first use.
  at::Tensor global_counter(const std::string& name);
  // Its value without creating it (reads the device).
  int64_t global_value(const std::string& name) const;

  // ValueError if there is none.
  const at::Tensor& first_param() const;

  ReduceFn reduce_;
};

}  // namespace torch_ext::optim
