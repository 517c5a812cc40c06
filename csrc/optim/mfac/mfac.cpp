#include <ATen/core/grad_mode.h>
#include <torch_ext/optim/mfac.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "core/check.h"
#include "core/state_dict_file.h"
#include "optim/base/closure.h"
#include "optim/mfac/mfac_step.h"

namespace torch_ext::optim {
namespace {

// Groups without options may be written as parameters only; the base class fills them in.
std::vector<torch::optim::OptimizerParamGroup> one_group(std::vector<at::Tensor> params) {
  return {torch::optim::OptimizerParamGroup(std::move(params))};
}

void check_combinations(const Options& options) {
  const std::string& format = options.get("window_format").toStringRef();
  TORCH_CHECK_VALUE(!options.get("error_feedback").toBool() || (format != "float32" && format != "float64"),
                    "Invalid error_feedback: ", format,
                    " loses nothing that could be fed back (MFAC takes it with "
                    "bfloat16 and int8; topk always has it)");
  const auto device = options.get("window_device").toOptional<std::string>();
  if (!device.has_value()) return;
  bool known = true;
  try {
    const at::Device parsed(*device);
    known = parsed.is_cpu() || parsed.is_cuda();
  } catch (const c10::Error&) {
    known = false;
  }
  TORCH_CHECK_VALUE(known, "Invalid window_device: '", *device, "' (MFAC knows \"cpu\", \"cuda\", \"cuda:1\" ...)");
}

}  // namespace

const Schema& MFAC::static_schema() {
  using Type = Field::Type;
  using DType = StateField::DType;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const auto window = [](const char* name) {
    return StateField{name, DType::kStored, /*on_cpu=*/false, /*shared=*/true};
  };
  static const Schema schema{
      kMFAC,
      /*format_version=*/1,
      {
          {"lr", Type::kFloat, 1e-3, 0, kInf, false, true},
          {"momentum", Type::kFloat, 0.0, 0, 1, false, true},
          {"weight_decay", Type::kFloat, 0.0, 0, kInf, false, true},
          {"dampening", Type::kOptionalFloat, c10::IValue(), 0, 1, false, true},
          {"decoupled_weight_decay", Type::kBool, false},
          {"num_grads", Type::kInt, int64_t{1024}, 1, kInf, false, false, {}, /*global=*/true},
          {"damping", Type::kFloat, 1e-5, 0, kInf, true, true, {}, /*global=*/true},
          {"window_format",
           Type::kString,
           "float32",
           -kInf,
           kInf,
           false,
           false,
           {"float32", "float64", "bfloat16", "int8", "topk"},
           /*global=*/true},
          {"topk", Type::kFloat, 0.01, 0, 1, true, false, {}, /*global=*/true},
          {"error_feedback", Type::kBool, false, -kInf, kInf, false, false, {}, /*global=*/true},
          {"warmup_scaling", Type::kBool, false, -kInf, kInf, false, false, {}, /*global=*/true},
          {"warmup_steps", Type::kInt, int64_t{0}, 0, kInf, false, false, {}, /*global=*/true},
          {"blocks", Type::kString, "global", -kInf, kInf, false, false, {"global", "per_group"}, /*global=*/true},
          {"window_device", Type::kOptionalString, c10::IValue(), -kInf, kInf, false, false, {}, /*global=*/true},
          {"maximize", Type::kBool, false, -kInf, kInf, false, false, {}, /*global=*/true},
      },
      {
          {"step", DType::kFloat32},
          {"momentum_buffer", DType::kArithmetic},
          window("window_rows"),
          window("window_scales"),
          window("window_indices"),
          window("window_error"),
          window("window_gram"),
          window("window_factor"),
          window("window_ring"),
          {"window_damping", DType::kFloat64, /*on_cpu=*/true, /*shared=*/true},
          {"window_layout", DType::kInt64, /*on_cpu=*/true, /*shared=*/true},
          {"global_skipped", DType::kInt64},
      },
      check_combinations};
  return schema;
}

MFACOptions::MFACOptions() : OptionsOf(MFAC::static_schema()) {}
MFACOptions::MFACOptions(double lr) : MFACOptions() { this->lr(lr); }

MFAC::MFAC(const std::vector<torch::optim::OptimizerParamGroup>& groups, MFACOptions defaults)
    : OptimizerBase(groups, std::make_unique<MFACOptions>(std::move(defaults))) {}

MFAC::MFAC(std::vector<at::Tensor> params, MFACOptions defaults)
    : MFAC(one_group(std::move(params)), std::move(defaults)) {}

// The windows with their parameters, those without columns left out; `values` has one tensor per parameter.
std::vector<MFACBlock> MFAC::blocks(const std::vector<at::Tensor>& values, const std::vector<const Options*>& options,
                                    const StateLookup& state) const {
  const Options& shared = options.empty() ? options_of(*defaults_) : *options[0];
  const bool per_group = shared.get("blocks").toStringRef() == "per_group";
  std::vector<MFACBlock> result(per_group ? param_groups_.size() : 1);
  for (const Entry& entry : entries()) {
    if (!mfac_has_columns(entry.param)) continue;
    MFACBlock& block = result[per_group ? entry.group : 0];
    block.shared = &shared;
    block.params.push_back(entry.param);
    block.ordinals.push_back(entry.ordinal);
    block.grads.push_back(values[static_cast<size_t>(entry.ordinal)]);
    block.options.push_back(options[entry.group]);
    const StateTensors* tensors = state(entry.param);
    block.states.push_back(tensors == nullptr ? StateTensors() : *tensors);
  }
  const auto empty = [](const MFACBlock& block) { return mfac_columns(block.params) == 0; };
  result.erase(std::remove_if(result.begin(), result.end(), empty), result.end());
  return result;
}

std::vector<MFACBlock> MFAC::blocks(const std::vector<at::Tensor>& values) const {
  std::vector<const Options*> options;
  for (size_t g = 0; g < param_groups_.size(); ++g) options.push_back(&group_options(g));
  return blocks(values, options, [this](const at::Tensor& param) -> const StateTensors* {
    const auto found = state_.find(param.unsafeGetTensorImpl());
    return found == state_.end() ? nullptr : &static_cast<const ParamState&>(*found->second).tensors;
  });
}

void MFAC::check_loaded(const std::vector<const Options*>& options, const StateLookup& state) const {
  for (const MFACBlock& block : blocks(std::vector<at::Tensor>(entries().size()), options, state)) {
    mfac_check_columns(block);
  }
}

at::Tensor MFAC::step(LossClosure closure) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> params, values;
  std::vector<int64_t> ordinals;
  std::ignore = first_param();
  for (const Entry& entry : entries()) {
    values.emplace_back();
    if (!entry.param.requires_grad()) continue;
    params.push_back(entry.param);
    ordinals.push_back(entry.ordinal);
  }
  const Evaluation found = first_order_gradients(kMFAC, closure, params, ordinals);
  std::vector<at::Tensor> present;
  for (const at::Tensor& grad : found.grads) {
    if (grad.defined()) present.push_back(grad);
  }
  if (present.empty()) return found.loss;
  if (reduce_) reduce_(present);
  auto next = present.begin();
  for (size_t i = 0; i < params.size(); ++i) {
    if (found.grads[i].defined()) values[static_cast<size_t>(ordinals[i])] = *next++;
  }
  apply(values);
  return found.loss;
}

// Writes back the states that the windows' preparation has made or moved.
void MFAC::keep(const std::vector<MFACBlock>& blocks) {
  for (const MFACBlock& block : blocks) {
    for (size_t i = 0; i < block.changed.size(); ++i) {
      if (block.changed[i] != 0) state_of(block.params[i]).tensors = block.states[i];
    }
  }
}

void MFAC::apply(const std::vector<at::Tensor>& grads) {
  std::vector<MFACBlock> all = blocks(grads);
  all.erase(std::remove_if(all.begin(), all.end(), [](const auto& block) { return !mfac_has_gradients(block); }),
            all.end());
  if (all.empty()) return;
  for (MFACBlock& block : all) mfac_prepare(block, shards_);
  keep(all);
  MFACInputs inputs;
  inputs.skipped = global_counter("global_skipped");
  inputs.shards = shards_;
  mfac_step(all, inputs);
}

std::vector<at::Tensor> MFAC::precondition(const std::vector<at::Tensor>& x) {
  std::vector<at::Tensor> params;
  for (const Entry& entry : entries()) params.push_back(entry.param);
  mfac_check_vectors(params, x);
  std::vector<at::Tensor> result(x.size());
  std::vector<MFACBlock> all = blocks(x);
  for (MFACBlock& block : all) {
    if (block.states[0].count("window_rows") != 0) mfac_ready_window(block, shards_);
    const std::vector<at::Tensor> part = mfac_precondition(block, shards_);
    for (size_t i = 0; i < part.size(); ++i) result[static_cast<size_t>(block.ordinals[i])] = part[i];
  }
  keep(all);
  return result;
}

void MFAC::set_damping(double damping) {
  static_cast<Options&>(*defaults_).set("damping", damping);
  for (auto& group : param_groups_) static_cast<Options&>(group.options()).set("damping", damping);
}

int64_t MFAC::window_count() const { return mfac_window_count(blocks(std::vector<at::Tensor>(entries().size()))); }

int64_t MFAC::memory_bytes() const {
  return mfac_memory_bytes(blocks(std::vector<at::Tensor>(entries().size())), shards_.count);
}

c10::IValue MFAC::state_dict(bool include_window) const {
  c10::IValue dict = OptimizerBase::state_dict();
  if (include_window) return dict;
  for (const auto& item : dict.toGenericDict().at("state").toGenericDict()) {
    const auto state = item.value().toGenericDict();
    for (const StateField& field : schema().state) {
      if (mfac_is_window(field.name) && state.contains(field.name)) std::ignore = state.erase(field.name);
    }
  }
  return dict;
}

void MFAC::save_state_dict(const std::string& path, bool include_window) const {
  core::write_state_dict(state_dict(include_window), path);
}

void MFAC::check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const {
  mfac_check_state(param, options, state);
}

}  // namespace torch_ext::optim
