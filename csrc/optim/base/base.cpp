#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>
#include <torch_ext/optim/base.h>

#include <algorithm>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/state_dict_file.h"

namespace torch_ext::optim {
namespace {

using torch::optim::OptimizerParamGroup;

c10::impl::GenericDict any_dict(c10::TypePtr key) {
  return c10::impl::GenericDict(std::move(key), c10::AnyType::get());
}

c10::impl::GenericDict dict_at(const c10::IValue& dict, const std::string& key) {
  TORCH_CHECK_VALUE(dict.isGenericDict() && dict.toGenericDict().contains(key),
                    "not an optimizer's state_dict: it has no '", key, "'");
  const c10::IValue value = dict.toGenericDict().at(key);
  TORCH_CHECK_VALUE(value.isGenericDict(), "state_dict: '", key, "' is not a dict");
  return value.toGenericDict();
}

// The tensor on the device and in the dtype that its field wants; numbers (older checkpoints hold `step` as one) too.
at::Tensor adopt(const Schema& schema, const std::string& name, const c10::IValue& value, const at::Tensor& param) {
  TORCH_CHECK_VALUE(value.isTensor() || value.isInt() || value.isDouble(), schema.optimizer, ": state '", name,
                    "' is no tensor");
  const at::Tensor tensor =
      value.isTensor() ? value.toTensor().detach() : at::scalar_tensor(value.toScalar(), at::kDouble);
  for (const StateField& field : schema.state) {
    if (field.name != name) continue;
    TORCH_CHECK_VALUE(!tensor.is_complex() && tensor.layout() == at::kStrided, schema.optimizer, ": state '", name,
                      "' is complex or sparse");
    if (field.dtype == StateField::DType::kStored) return tensor.clone(at::MemoryFormat::Contiguous);
    const at::ScalarType dtype = field.dtype == StateField::DType::kInt64     ? at::kLong
                                 : field.dtype == StateField::DType::kFloat64 ? at::kDouble
                                 : field.dtype == StateField::DType::kFloat32
                                     ? at::kFloat
                                     : core::arithmetic_type(param.scalar_type());
    return tensor.to(field.on_cpu ? at::Device(at::kCPU) : param.device(), dtype, /*non_blocking=*/false,
                     /*copy=*/true);
  }
  return tensor.to(param.device(), tensor.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace

OptimizerBase::OptimizerBase(const std::vector<OptimizerParamGroup>& groups, std::unique_ptr<Options> defaults)
    : Optimizer(std::vector<OptimizerParamGroup>{}, std::move(defaults)) {
  options_of(*defaults_).check();
  TORCH_CHECK_VALUE(!groups.empty(), schema().optimizer, " got no parameters");
  for (const OptimizerParamGroup& group : groups) add_param_group(group);
}

const Options& OptimizerBase::options_of(const torch::optim::OptimizerOptions& options) {
  const auto* ours = dynamic_cast<const Options*>(&options);
  TORCH_CHECK_TYPE(ours != nullptr, "these are not options of torch_ext");
  return *ours;
}

void OptimizerBase::add_param_group(const OptimizerParamGroup& group) {
  const auto& defaults = static_cast<const Options&>(*defaults_);
  const size_t index = param_groups_.size();
  std::unique_ptr<torch::optim::OptimizerOptions> merged;
  if (group.has_options()) {
    const auto* given = dynamic_cast<const Options*>(&group.options());
    TORCH_CHECK_TYPE(given != nullptr && &given->schema() == &defaults.schema(), defaults.schema().optimizer,
                     ": the options of parameter group ", index, " are of another optimizer");
    merged = given->clone();
    static_cast<Options&>(*merged).inherit(defaults);
  } else {
    merged = defaults.clone();
  }
  auto& options = static_cast<Options&>(*merged);
  const Options& first = param_groups_.empty() ? defaults : group_options(0);  // loading changes groups, not defaults
  for (const Field& field : defaults.schema().fields) {
    if (!field.global) continue;
    const bool given = group.has_options() && static_cast<const Options&>(group.options()).is_set(field.name);
    TORCH_CHECK_VALUE(!given || options.get(field.name) == first.get(field.name), defaults.schema().optimizer,
                      ": option ", field.name, " is the same for all parameters and cannot differ in group ", index);
    options.set(field.name, first.get(field.name));
  }
  options.check();
  std::set<const void*> seen;
  for (const Entry& entry : entries()) seen.insert(entry.param.unsafeGetTensorImpl());
  for (const at::Tensor& param : group.params()) {
    TORCH_CHECK_VALUE(param.defined(), defaults.schema().optimizer, ": group ", index, " has an undefined tensor");
    TORCH_CHECK_VALUE(param.is_leaf(), "can't optimize a non-leaf tensor (parameter group ", index, ")");
    TORCH_CHECK_VALUE(seen.insert(param.unsafeGetTensorImpl()).second,
                      "some parameters appear more than once (parameter group ", index, ", shape ", param.sizes(), ")");
  }
  // The base class would merge or drop options differently in each torch version, so it only ever sees a bare group.
  Optimizer::add_param_group(OptimizerParamGroup(group.params()));
  param_groups_.back().set_options(std::move(merged));
}

std::vector<OptimizerBase::Entry> OptimizerBase::entries() const {
  std::vector<Entry> all;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    for (const at::Tensor& param : param_groups_[g].params())
      all.push_back({param, static_cast<int64_t>(all.size()), g});
  }
  return all;
}

ParamState& OptimizerBase::state_of(const at::Tensor& param) {
  auto& slot = state_[param.unsafeGetTensorImpl()];
  if (slot == nullptr) slot = std::make_unique<ParamState>();
  return static_cast<ParamState&>(*slot);
}

const at::Tensor& OptimizerBase::first_param() const {
  for (const OptimizerParamGroup& group : param_groups_) {
    if (!group.params().empty()) return group.params()[0];
  }
  TORCH_CHECK_VALUE(false, schema().optimizer, " has no parameters");
}

at::Tensor OptimizerBase::global_counter(const std::string& name) {
  const at::Tensor& param = first_param();
  at::Tensor& counter = state_of(param).tensors[name];
  bool on_cpu = false;
  for (const StateField& field : schema().state) on_cpu = on_cpu || (field.name == name && field.on_cpu);
  const at::Device device = on_cpu ? at::Device(at::kCPU) : param.device();
  if (!counter.defined()) counter = at::zeros({}, at::TensorOptions(device).dtype(at::kLong));
  if (counter.device() != device) counter = counter.to(device);
  return counter;
}

int64_t OptimizerBase::global_value(const std::string& name) const {
  const auto it = state_.find(first_param().unsafeGetTensorImpl());
  if (it == state_.end()) return 0;
  const auto& state = static_cast<const ParamState&>(*it->second);
  return state.has(name) ? state.at(name).item<int64_t>() : 0;
}

at::Tensor OptimizerBase::skipped_steps() const {
  const at::Tensor& param = first_param();
  const auto it = state_.find(param.unsafeGetTensorImpl());
  if (it != state_.end()) {
    const auto& state = static_cast<const ParamState&>(*it->second);
    if (state.has("global_skipped")) return state.at("global_skipped").clone();
  }
  return at::zeros({}, at::TensorOptions(param.device()).dtype(at::kLong));
}

void OptimizerBase::prune_state() {
  std::set<const void*> alive;
  for (const Entry& entry : entries()) alive.insert(entry.param.unsafeGetTensorImpl());
  std::vector<void*> dead;
  for (const auto& item : state_) {
    if (alive.count(item.first) == 0) dead.push_back(item.first);
  }
  for (void* key : dead) state_.erase(key);
}

c10::IValue OptimizerBase::state_dict() const {
  auto state = any_dict(c10::IntType::get());
  for (const Entry& entry : entries()) {
    const auto it = state_.find(entry.param.unsafeGetTensorImpl());
    if (it == state_.end()) continue;
    auto tensors = any_dict(c10::StringType::get());
    for (const auto& [name, tensor] : static_cast<const ParamState&>(*it->second).tensors) tensors.insert(name, tensor);
    state.insert(entry.ordinal, tensors);
  }
  c10::impl::GenericList groups(c10::AnyType::get());
  int64_t next = 0;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    auto group = any_dict(c10::StringType::get());
    const Options& options = group_options(g);
    for (const Field& field : schema().fields) group.insert(field.name, options.get(field.name));
    for (const auto& [name, value] : options.extras) group.insert(name, value);
    c10::impl::GenericList indices(c10::AnyType::get());
    for (size_t i = 0; i < param_groups_[g].params().size(); ++i) indices.push_back(c10::IValue(next++));
    group.insert("params", indices);
    groups.push_back(group);
  }
  auto about = any_dict(c10::StringType::get());
  about.insert("optimizer", schema().optimizer);
  about.insert("format_version", schema().format_version);
  auto dict = any_dict(c10::StringType::get());
  dict.insert("state", state);
  dict.insert("param_groups", groups);
  dict.insert("torch_ext", about);
  return dict;
}

void OptimizerBase::load_state_dict(const c10::IValue& dict) {
  const auto state = dict_at(dict, "state");
  TORCH_CHECK_VALUE(dict.toGenericDict().contains("param_groups") && dict.toGenericDict().at("param_groups").isList(),
                    "not an optimizer's state_dict: it has no 'param_groups'");
  if (dict.toGenericDict().contains("torch_ext")) {
    const auto about = dict_at(dict, "torch_ext");
    const auto is = [&](const char* key, auto test) { return !about.contains(key) || (about.at(key).*test)(); };
    TORCH_CHECK_VALUE(is("optimizer", &c10::IValue::isString) && is("format_version", &c10::IValue::isInt),
                      "state_dict: 'torch_ext' must hold an optimizer's name and an integer format_version");
    const std::string writer = about.contains("optimizer") ? about.at("optimizer").toStringRef() : "?";
    TORCH_CHECK_VALUE(writer == schema().optimizer, "this state_dict is of ", writer, ", not of ", schema().optimizer);
    const int64_t version = about.contains("format_version") ? about.at("format_version").toInt() : 1;
    TORCH_CHECK_VALUE(version <= schema().format_version, "this state_dict has format version ", version,
                      "; this build of torch_ext reads up to ", schema().format_version, ": update torch_ext");
  }
  const auto groups = dict.toGenericDict().at("param_groups").toListRef();
  TORCH_CHECK_VALUE(groups.size() == param_groups_.size(), "loaded state dict has ", groups.size(),
                    " parameter groups, the optimizer ", param_groups_.size());

  // Everything is made ready before anything is changed.
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> new_options;
  std::vector<std::pair<at::Tensor, std::unique_ptr<ParamState>>> new_state;
  std::set<int64_t> listed;
  for (size_t g = 0; g < groups.size(); ++g) {
    TORCH_CHECK_VALUE(groups[g].isGenericDict(), "state_dict: parameter group ", g, " is not a dict");
    const auto saved = groups[g].toGenericDict();
    TORCH_CHECK_VALUE(saved.contains("params") && saved.at("params").isList(), "state_dict: parameter group ", g,
                      " has no 'params'");
    const auto indices = saved.at("params").toListRef();
    const auto& params = param_groups_[g].params();
    TORCH_CHECK_VALUE(indices.size() == params.size(), "loaded state dict has ", indices.size(),
                      " parameters in group ", g, ", the optimizer ", params.size());
    auto fresh = param_groups_[g].options().clone();
    auto& options = static_cast<Options&>(*fresh);
    options.extras.clear();
    for (const auto& item : saved) {
      const std::string& name = item.key().toStringRef();
      if (name == "params") continue;
      if (schema().find(name) != nullptr) {
        options.set(name, item.value());
      } else {
        options.extras[name] = item.value();
      }
    }
    options.check();
    new_options.push_back(std::move(fresh));
    for (size_t i = 0; i < params.size(); ++i) {
      TORCH_CHECK_VALUE(indices[i].isInt(), "state_dict: 'params' of group ", g, " holds something else than indices");
      listed.insert(indices[i].toInt());
      if (!state.contains(indices[i])) continue;
      auto made = std::make_unique<ParamState>();
      TORCH_CHECK_VALUE(state.at(indices[i]).isGenericDict(), "state_dict: the state of parameter ", indices[i].toInt(),
                        " is not a dict");
      for (const auto& item : state.at(indices[i]).toGenericDict()) {
        const std::string& name = item.key().toStringRef();
        made->tensors[name] = adopt(schema(), name, item.value(), params[i]);
      }
      check_state(params[i], options, made->tensors);
      new_state.emplace_back(params[i], std::move(made));
    }
  }
  for (const auto& item : state) {
    const c10::IValue& index = item.key();
    const bool digits = index.isString() && !index.toStringRef().empty() &&
                        index.toStringRef().find_first_not_of("0123456789") == std::string::npos;
    TORCH_CHECK_VALUE(!digits && (!index.isInt() || listed.count(index.toInt()) != 0),
                      "loaded state dict has state of parameter ", index, ", which none of its groups lists");
  }
  std::vector<const Options*> options;
  options.reserve(new_options.size());
  for (const auto& item : new_options) options.push_back(&options_of(*item));
  check_loaded(options, [&](const at::Tensor& param) -> const StateTensors* {
    const auto found =
        std::find_if(new_state.begin(), new_state.end(), [&](const auto& item) { return item.first.is_same(param); });
    return found == new_state.end() ? nullptr : &found->second->tensors;
  });
  state_.clear();
  for (auto& [param, made] : new_state) state_[param.unsafeGetTensorImpl()] = std::move(made);
  for (size_t g = 0; g < new_options.size(); ++g) param_groups_[g].set_options(std::move(new_options[g]));
  state_replaced();
}

void OptimizerBase::save_state_dict(const std::string& path) const { core::write_state_dict(state_dict(), path); }

void OptimizerBase::load_state_dict(const std::string& path) { load_state_dict(core::read_state_dict(path)); }

// Layout of the native archive: optimizer, format_version, groups/<g>/<option>, state/<index>/<name>.
void OptimizerBase::save(torch::serialize::OutputArchive& archive) const {
  archive.write("optimizer", c10::IValue(schema().optimizer));
  archive.write("format_version", c10::IValue(schema().format_version));
  torch::serialize::OutputArchive groups(archive.compilation_unit()), state(archive.compilation_unit());
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    torch::serialize::OutputArchive group(archive.compilation_unit());
    group_options(g).serialize(group);
    group.write("size", c10::IValue(static_cast<int64_t>(param_groups_[g].params().size())));
    groups.write(std::to_string(g), group);
  }
  for (const Entry& entry : entries()) {
    const auto it = state_.find(entry.param.unsafeGetTensorImpl());
    if (it == state_.end()) continue;
    torch::serialize::OutputArchive tensors(archive.compilation_unit());
    it->second->serialize(tensors);
    state.write(std::to_string(entry.ordinal), tensors);
  }
  archive.write("groups", groups);
  archive.write("state", state);
}

void OptimizerBase::load(torch::serialize::InputArchive& archive) {
  c10::IValue name, version;
  TORCH_CHECK_VALUE(archive.try_read("optimizer", name) && archive.try_read("format_version", version),
                    "this archive was not written by an optimizer of torch_ext");
  auto dict = any_dict(c10::StringType::get());
  auto about = any_dict(c10::StringType::get());
  about.insert("optimizer", name);
  about.insert("format_version", version);
  dict.insert("torch_ext", about);
  torch::serialize::InputArchive groups, states;
  archive.read("groups", groups);
  archive.read("state", states);
  c10::impl::GenericList group_list(c10::AnyType::get());
  int64_t next = 0;
  for (size_t g = 0; g < groups.keys().size(); ++g) {
    torch::serialize::InputArchive saved;
    groups.read(std::to_string(g), saved);
    auto group = any_dict(c10::StringType::get());
    c10::impl::GenericList indices(c10::AnyType::get());
    for (const std::string& key : saved.keys()) {
      c10::IValue value;
      saved.read(key, value);
      if (key != "size") {
        group.insert(key, value);
        continue;
      }
      for (int64_t i = 0; i < value.toInt(); ++i) indices.push_back(c10::IValue(next++));
    }
    group.insert("params", indices);
    group_list.push_back(group);
  }
  auto state = any_dict(c10::IntType::get());
  for (const std::string& key : states.keys()) {
    torch::serialize::InputArchive saved;
    states.read(key, saved);
    ParamState tensors;
    tensors.serialize(saved);
    auto entry = any_dict(c10::StringType::get());
    for (const auto& [state_name, tensor] : tensors.tensors) entry.insert(state_name, tensor);
    state.insert(static_cast<int64_t>(std::stoll(key)), entry);
  }
  dict.insert("param_groups", group_list);
  dict.insert("state", state);
  load_state_dict(dict);
}

}  // namespace torch_ext::optim
