#include <ATen/core/grad_mode.h>
#include <torch_ext/optim/mezo.h>

#include <limits>
#include <utility>

#include "core/check.h"
#include "optim/mezo/mezo_step.h"

namespace torch_ext::optim {
namespace {

// Groups without options may be written as parameters only; the base class fills them in.
std::vector<torch::optim::OptimizerParamGroup> one_group(std::vector<at::Tensor> params) {
  return {torch::optim::OptimizerParamGroup(std::move(params))};
}

}  // namespace

const Schema& MeZO::static_schema() {
  using Type = Field::Type;
  using DType = StateField::DType;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  static const Schema schema{"MeZO",
                             /*format_version=*/1,
                             {
                                 {"lr", Type::kFloat, 1e-6, 0, kInf, false, true},
                                 {"eps", Type::kFloat, 1e-3, 0, kInf, true, true, {}, /*global=*/true},
                                 {"weight_decay", Type::kFloat, 0.0, 0, kInf, false, true},
                                 {"seed", Type::kInt, int64_t{0}, -kInf, kInf, false, false, {}, /*global=*/true},
                                 {"maximize", Type::kBool, false, -kInf, kInf, false, false, {}, /*global=*/true},
                             },
                             {
                                 {"step", DType::kFloat32},
                                 {"global_calls", DType::kInt64, /*on_cpu=*/true},
                                 {"global_skipped", DType::kInt64},
                             }};
  return schema;
}

MeZOOptions::MeZOOptions() : OptionsOf(MeZO::static_schema()) {}
MeZOOptions::MeZOOptions(double lr) : MeZOOptions() { this->lr(lr); }

MeZO::MeZO(const std::vector<torch::optim::OptimizerParamGroup>& groups, MeZOOptions defaults)
    : OptimizerBase(groups, std::make_unique<MeZOOptions>(std::move(defaults))) {}

MeZO::MeZO(std::vector<at::Tensor> params, MeZOOptions defaults)
    : MeZO(one_group(std::move(params)), std::move(defaults)) {}

at::Tensor MeZO::step(LossClosure closure) {
  const at::NoGradGuard no_grad;
  first_param();
  const Options& shared = group_options(0);
  std::vector<MezoTarget> targets;
  for (const Entry& entry : entries()) {
    if (!entry.param.requires_grad()) continue;
    mezo_check_param(entry.param, entry.ordinal);
    const Options& options = group_options(entry.group);
    targets.push_back(
        {entry.param, entry.ordinal, options.get("lr").toDouble(), options.get("weight_decay").toDouble(), {}});
  }
  const MezoNoise noise{shared.get("seed").toInt(), global_value("global_calls"), shared.get("eps").toDouble()};
  const MezoLosses losses = mezo_losses(targets, noise, shared.get("maximize").toBool(), closure, reduce_);
  for (MezoTarget& target : targets) {
    StateTensors& state = state_of(target.param).tensors;
    mezo_init_state(target.param, state);
    target.step = state.at("step");
  }
  mezo_update(targets, noise, losses.slope, global_counter("global_skipped"));
  global_counter("global_calls").add_(1);
  return losses.mean;
}

void MeZO::check_state(const at::Tensor& param, const Options&, const StateTensors& state) const {
  mezo_check_state(param, state);
}

}  // namespace torch_ext::optim
