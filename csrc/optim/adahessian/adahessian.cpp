#include <ATen/core/grad_mode.h>
#include <torch_ext/optim/adahessian.h>

#include <algorithm>
#include <utility>

#include "optim/adahessian/adahessian_derivatives.h"
#include "optim/adahessian/adahessian_op.h"

namespace torch_ext::optim {
namespace {

// Groups without options may be written as parameters only; the base class fills them in.
std::vector<torch::optim::OptimizerParamGroup> one_group(std::vector<at::Tensor> params) {
  return {torch::optim::OptimizerParamGroup(std::move(params))};
}

void check_combinations(const Options& options) {
  TORCH_CHECK_VALUE(options.get("linear_averaging").toStringRef() != "block" || options.get("block_size").toInt() >= 1,
                    "Invalid block_size: linear_averaging=\"block\" needs block_size >= 1");
}

}  // namespace

const Schema& AdaHessian::static_schema() {
  using Type = Field::Type;
  using DType = StateField::DType;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  static const Schema schema{
      "AdaHessian",
      /*format_version=*/1,
      {
          {"lr", Type::kFloat, 0.15, 0, kInf, false, true},
          {"betas", Type::kFloatPair, c10::ivalue::Tuple::create(0.9, 0.999), 0, 1, false, true},
          {"eps", Type::kFloat, 1e-4, 0, kInf, false, true},
          {"weight_decay", Type::kFloat, 0.0, 0, kInf, false, true},
          {"hessian_power", Type::kFloat, 1.0, 0, 1},
          {"n_samples", Type::kInt, int64_t{1}, 1, kInf, false, false, {}, /*global=*/true},
          {"update_each", Type::kInt, int64_t{1}, 1, kInf, false, false, {}, /*global=*/true},
          {"linear_averaging", Type::kString, "none", -kInf, kInf, false, false, {"none", "row", "block"}},
          {"block_size", Type::kInt, int64_t{0}, 0, kInf},
          {"average_conv", Type::kBool, true},
          {"averaging", Type::kString, "abs_mean", -kInf, kInf, false, false, {"abs_mean", "signed_mean"}},
          {"max_update", Type::kOptionalFloat, c10::IValue(), 0, kInf, true, false},
          {"hvp",
           Type::kString,
           "double_backward",
           -kInf,
           kInf,
           false,
           false,
           {"double_backward", "finite_difference"},
           /*global=*/true},
          {"seed", Type::kInt, int64_t{0}, -kInf, kInf, false, false, {}, /*global=*/true},
          {"maximize", Type::kBool, false},
      },
      {
          {"step", DType::kFloat32},
          {"exp_avg", DType::kArithmetic},
          {"exp_hessian_diag_sq", DType::kArithmetic},
          {"bias_products", DType::kFloat64},
          {"global_calls", DType::kInt64, /*on_cpu=*/true},
          {"global_skipped", DType::kInt64},
      },
      check_combinations};
  return schema;
}

AdaHessianOptions::AdaHessianOptions() : OptionsOf(AdaHessian::static_schema()) {}
AdaHessianOptions::AdaHessianOptions(double lr) : AdaHessianOptions() { this->lr(lr); }

AdaHessian::AdaHessian(const std::vector<torch::optim::OptimizerParamGroup>& groups, AdaHessianOptions defaults)
    : OptimizerBase(groups, std::make_unique<AdaHessianOptions>(std::move(defaults))) {}

AdaHessian::AdaHessian(std::vector<at::Tensor> params, AdaHessianOptions defaults)
    : AdaHessian(one_group(std::move(params)), std::move(defaults)) {}

// Who takes part in the next step, and what it has to differentiate.
struct AdaHessian::Plan {
  std::vector<Entry> entries;
  AdaHessianRequest request;
};

AdaHessian::Plan AdaHessian::plan(bool external) const {
  const Options& options = options_of(*defaults_);
  const Options& first = param_groups_.empty() ? options : group_options(0);
  const int64_t calls = global_value("global_calls"), update_each = first.get("update_each").toInt();
  Plan plan;
  AdaHessianRequest& request = plan.request;
  request.refresh = external || calls % update_each == 0;
  request.finite_difference = first.get("hvp").toStringRef() == "finite_difference";
  request.probes = {first.get("n_samples").toInt(), first.get("seed").toInt(), calls / update_each, {}, nullptr};
  request.scaler_unscaled = false;
  request.magnitude_only = true;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    if (group_options(g).get("averaging").toStringRef() == "signed_mean") request.magnitude_only = false;
  }
  auto all = entries();
  request.n_params = all.size();
  for (Entry& entry : all) {
    if (!entry.param.requires_grad()) continue;
    request.params.push_back(entry.param);
    request.probes.ordinals.push_back(entry.ordinal);
    plan.entries.push_back(std::move(entry));
  }
  return plan;
}

bool AdaHessian::is_second_order() const {
  const AdaHessianRequest request = plan(/*external=*/false).request;
  return request.refresh && !request.finite_difference;
}

at::Tensor AdaHessian::step(LossClosure closure) {
  AdaHessianInputs inputs;
  inputs.closure = std::move(closure);
  return step(inputs);
}

at::Tensor AdaHessian::step(LossClosure closure, LossClosure curvature_closure) {
  AdaHessianInputs inputs;
  inputs.closure = std::move(closure);
  inputs.curvature_closure = std::move(curvature_closure);
  return step(inputs);
}

at::Tensor AdaHessian::step(const AdaHessianInputs& inputs) {
  const at::NoGradGuard no_grad;
  if (inputs.loss_scale.has_value()) adahessian_check_loss_scale(*inputs.loss_scale);
  Plan now = plan(!inputs.hessian.empty());
  if (!sums_.grads.empty()) {
    TORCH_CHECK(!inputs.closure && !inputs.curvature_closure && inputs.hessian.empty(),
                "AdaHessian: accumulate() was called: step() takes its sums and no closure");
    Sums sums = std::exchange(sums_, {});
    adahessian_check_same_params(sums.params, now.request.params);
    now.request.refresh = !sums.curvature.empty();  // accumulate() has decided
    apply(now, std::move(sums.grads), std::move(sums.curvature), inputs);
    return {};
  }
  if (!inputs.hessian.empty()) now.request.hessian = inputs.hessian;
  now.request.closure = inputs.closure;
  now.request.curvature_closure = inputs.curvature_closure;
  now.request.probes.workspace = &probes_;
  AdaHessianDerivatives found = adahessian_derivatives(now.request);
  apply(now, std::move(found.grads), std::move(found.curvature), inputs);
  return found.loss;
}

void AdaHessian::accumulate(const at::Tensor& loss, double weight) {
  Sums before = std::exchange(sums_, {});  // a micro-batch that throws discards the unfinished sums with it
  const AdaHessianRequest request = plan(/*external=*/false).request;
  if (!before.grads.empty()) adahessian_check_same_params(before.params, request.params);
  AdaHessianSums sums{std::move(before.grads), std::move(before.curvature)};
  adahessian_accumulate(sums, request, loss, weight);
  sums_ = {request.params, std::move(sums.grads), std::move(sums.curvature)};
}

void AdaHessian::apply(const Plan& plan, std::vector<at::Tensor> grads, std::vector<at::Tensor> curvature,
                       const AdaHessianInputs& inputs) {
  std::vector<at::Tensor> all;
  std::vector<AdaHessianLists> groups(param_groups_.size());
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    if (grads[i].defined()) all.push_back(grads[i]);
  }
  if (all.empty()) return;
  for (const at::Tensor& tensor : curvature) all.push_back(tensor);
  if (reduce_) {
    reduce_(all);
    auto next = all.begin();
    for (at::Tensor& grad : grads) {
      if (grad.defined()) grad = *next++;
    }
    for (at::Tensor& tensor : curvature) tensor = *next++;
  }
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    if (!grads[i].defined()) continue;
    const Entry& entry = plan.entries[i];
    StateTensors& state = state_of(entry.param).tensors;
    auto bias = state.find("bias_products");
    if (bias == state.end() || bias->second.device() != entry.param.device()) {
      adahessian_init_state(entry.param, group_options(entry.group), entry.ordinal, state);
      bias = state.find("bias_products");
    }
    AdaHessianLists& lists = groups[entry.group];
    lists.params.push_back(entry.param);
    lists.grads.push_back(grads[i]);
    if (plan.request.refresh) lists.curvature.push_back(curvature[i]);
    lists.exp_avg.push_back(state.find("exp_avg")->second);
    lists.exp_hessian_diag_sq.push_back(state.find("exp_hessian_diag_sq")->second);
    lists.steps.push_back(state.find("step")->second);
    lists.bias_products.push_back(bias->second);
  }
  std::vector<const Options*> options;
  for (size_t g = 0; g < groups.size(); ++g) options.push_back(&group_options(g));
  const AdaHessianScaling scaling{std::nullopt, inputs.loss_scale.value_or(1.0), /*grads_unscaled=*/false,
                                  /*external_curvature=*/!inputs.hessian.empty()};
  adahessian_apply(groups, options, all, std::nullopt, global_counter("global_skipped"), plan.request.refresh, scaling);
  global_counter("global_calls").add_(1);
}

void AdaHessian::check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const {
  adahessian_check_state(param, options, state);
}

}  // namespace torch_ext::optim
