#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/torch.h>
#include <torch_ext/optim/alflb.h>

#include <limits>
#include <memory>
#include <utility>

#include "optim/alflb/alflb_op.h"

namespace torch_ext::optim {
namespace {

// Groups without options may be written as parameters only; the base class fills them in.
std::vector<torch::optim::OptimizerParamGroup> one_group(std::vector<at::Tensor> params) {
  return {torch::optim::OptimizerParamGroup(std::move(params))};
}

std::vector<at::Tensor> biases_of(const std::vector<moe::MoERouter>& routers) {
  std::vector<at::Tensor> biases;
  biases.reserve(routers.size());
  for (const moe::MoERouter& router : routers) biases.push_back(router->expert_bias);
  return biases;
}

std::vector<moe::MoERouter> routers_in(const torch::nn::Module& model) {
  std::vector<moe::MoERouter> routers;
  const auto add = [&](const std::shared_ptr<torch::nn::Module>& module) {
    auto router = std::dynamic_pointer_cast<moe::MoERouterImpl>(module);
    if (router == nullptr) return;
    for (const moe::MoERouter& known : routers) {
      if (known.get() == router.get()) return;  // one that two modules share
    }
    routers.emplace_back(std::move(router));
  };
  // Asked for by itself only if it is one: a module on the stack has no shared pointer.
  if (dynamic_cast<const moe::MoERouterImpl*>(&model) != nullptr) {
    add(const_cast<torch::nn::Module&>(model).shared_from_this());  // NOLINT: torch's holders are mutable
  }
  for (const auto& module : model.modules(/*include_self=*/false)) add(module);
  TORCH_CHECK_VALUE(!routers.empty(), kAlflbName,
                    ": the module has no MoERouter; for the routers of another library take ",
                    "ALFLB::from_buffers(model, \"name of the bias\")");
  return routers;
}

}  // namespace

const Schema& ALFLB::static_schema() {
  using Type = Field::Type;
  using DType = StateField::DType;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  static const Schema schema{
      kAlflbName,
      /*format_version=*/1,
      {
          {"lr", Type::kFloat, 1e-3, 0, kInf, false, true},
          {"lr_power", Type::kFloat, 0.0, 0, kInf, false, true},
          {"rule", Type::kString, "sign", -kInf, kInf, false, false, {"sign", "proportional", "quantile", "momentum"}},
          {"norm", Type::kString, "tokens", -kInf, kInf, false, false, {"tokens", "load"}},
          {"center", Type::kBool, true},
          {"ema", Type::kFloat, 0.0, 0, 1},
          {"momentum", Type::kFloat, 0.5, 0, 1, false, true},
          {"kappa", Type::kFloat, 2.0, 0, kInf, true, true},
          {"qb_bins", Type::kInt, int64_t{1000}, 1, kInf},
      },
      {
          {"step", DType::kFloat32},
          {"updates", DType::kInt64},
          {"last_load", DType::kInt64},
          {"momentum_buffer", DType::kFloat32},
          {"global_skipped", DType::kInt64},
      }};
  return schema;
}

ALFLBOptions::ALFLBOptions() : OptionsOf(ALFLB::static_schema()) {}
ALFLBOptions::ALFLBOptions(double lr) : ALFLBOptions() { this->lr(lr); }

ALFLB::ALFLB(const std::vector<torch::optim::OptimizerParamGroup>& groups, ALFLBOptions defaults)
    : OptimizerBase(groups, std::make_unique<ALFLBOptions>(std::move(defaults))) {
  for (const Entry& entry : entries()) alflb_check_bias(entry.param, static_cast<size_t>(entry.ordinal));
}

ALFLB::ALFLB(std::vector<at::Tensor> biases, ALFLBOptions defaults)
    : ALFLB(one_group(std::move(biases)), std::move(defaults)) {}

ALFLB::ALFLB(const std::vector<moe::MoERouter>& routers, ALFLBOptions defaults)
    : ALFLB(one_group(biases_of(routers)), std::move(defaults)) {
  for (const moe::MoERouter& router : routers) {
    Layer layer;
    layer.bias = router->expert_bias;
    layer.router = router;
    layers_.push_back(std::move(layer));
  }
  for (const Entry& entry : entries()) prepare(layer_of(entry.param), group_options(entry.group), /*fresh=*/true);
}

ALFLB::ALFLB(const torch::nn::Module& model, ALFLBOptions defaults) : ALFLB(routers_in(model), std::move(defaults)) {}

ALFLB ALFLB::from_buffers(const torch::nn::Module& model, const std::string& name, ALFLBOptions defaults) {
  std::vector<at::Tensor> biases;
  for (const auto& item : model.named_buffers()) {
    const std::string& key = item.key();
    const bool ends =
        key.size() > name.size() && key.compare(key.size() - name.size() - 1, std::string::npos, "." + name) == 0;
    if (key == name || ends) biases.push_back(item.value());
  }
  TORCH_CHECK_VALUE(!biases.empty(), kAlflbName, ": the model has no buffer named '", name, "'");
  return ALFLB(std::move(biases), std::move(defaults));
}

ALFLB::Layer& ALFLB::layer_of(const at::Tensor& bias) {
  for (Layer& layer : layers_) {
    if (layer.bias.is_same(bias)) return layer;
  }
  Layer layer;
  layer.bias = bias;
  layers_.push_back(std::move(layer));
  return layers_.back();
}

// Loads and, for the quantile rule, the histogram, where they are missing or on another device; `fresh` also takes the
// range of the histogram anew from the bias.
void ALFLB::prepare(Layer& layer, const Options& options, bool fresh) {
  const at::Tensor& bias = layer.bias;
  if (layer.router) {
    const auto& router = *layer.router;
    layer.load = router.load;
    layer.histogram = router.quantile_histogram;
    layer.bounds = router.quantile_bounds;
    layer.top_k = router.options.route().top_k();
  }
  if (!layer.load.defined()) layer.load = at::zeros({bias.numel()}, bias.options().dtype(at::kLong));
  if (layer.load.device() != bias.device()) layer.load = layer.load.to(bias.device());
  const bool quantile = options.get("rule").toStringRef() == "quantile";
  const int64_t bins = options.get("qb_bins").toInt();
  const bool fits = layer.histogram.defined() && layer.histogram.device() == bias.device() &&
                    layer.histogram.numel() == bias.numel() * bins;
  if (!quantile) {
    layer.histogram = layer.bounds = at::Tensor();
  } else if (fresh || !fits) {
    alflb_make_histogram(bias, bins, layer.histogram, layer.bounds);
  }
  if (layer.router) {
    layer.router->quantile_histogram = layer.histogram;
    layer.router->quantile_bounds = layer.bounds;
  }
}

// A router may have replaced its bias, when it went to another device: state and groups follow.
void ALFLB::follow_routers() {
  for (Layer& layer : layers_) {
    if (!layer.router || layer.router->expert_bias.is_same(layer.bias)) continue;
    const at::Tensor now = layer.router->expert_bias;
    for (auto& group : param_groups_) {
      for (at::Tensor& param : group.params()) {
        if (param.is_same(layer.bias)) param = now;
      }
    }
    if (const auto found = state_.find(layer.bias.unsafeGetTensorImpl()); found != state_.end()) {
      auto moved = std::move(found->second);
      state_.erase(found);
      state_[now.unsafeGetTensorImpl()] = std::move(moved);
    }
    layer.bias = now;
  }
}

void ALFLB::reduce(const std::vector<at::Tensor>& counts) {
  if (!reduce_) return;
  std::vector<at::Tensor> sums = counts;
  reduce_(sums);
  for (size_t i = 0; i < counts.size(); ++i) {
    TORCH_CHECK_TYPE(sums[i].scalar_type() == at::kLong, kAlflbName,
                     ": counts of all processes are summed: set_reduce(torch_ext::sum_over(group))");
    if (!sums[i].is_same(counts[i])) counts[i].copy_(sums[i]);
  }
}

at::Tensor ALFLB::step(LossClosure closure) {
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode enabled(true);
    loss = closure();
    if (loss.defined()) loss = loss.detach();
  }
  const at::NoGradGuard no_grad;
  follow_routers();
  std::vector<AlflbLayers> groups(param_groups_.size());
  std::vector<at::Tensor> counts;
  for (const Entry& entry : entries()) {
    const Options& options = group_options(entry.group);
    Layer& layer = layer_of(entry.param);
    alflb_check_bias(entry.param, static_cast<size_t>(entry.ordinal));
    prepare(layer, options, /*fresh=*/false);
    StateTensors& state = state_of(entry.param).tensors;
    alflb_init_state(entry.param, options, state);
    AlflbLayers& to = groups[entry.group];
    to.biases.push_back(entry.param);
    to.loads.push_back(layer.load);
    to.last_loads.push_back(state.find("last_load")->second);
    to.steps.push_back(state.find("step")->second);
    to.updates.push_back(state.find("updates")->second);
    const auto momentum = state.find("momentum_buffer");
    to.momenta.push_back(momentum == state.end() ? at::Tensor() : momentum->second);
    to.histograms.push_back(layer.histogram);
    to.bounds.push_back(layer.bounds);
    to.top_k.push_back(layer.top_k);
    counts.push_back(layer.load);
    if (layer.histogram.defined()) counts.push_back(layer.histogram);
  }
  reduce(counts);
  std::vector<const Options*> options;
  for (size_t g = 0; g < groups.size(); ++g) options.push_back(&group_options(g));
  alflb_apply(groups, options, std::nullopt, global_counter("global_skipped"));
  return loss;
}

void ALFLB::discard() {
  const at::NoGradGuard no_grad;
  follow_routers();
  for (const Entry& entry : entries()) {
    Layer& layer = layer_of(entry.param);
    prepare(layer, group_options(entry.group), /*fresh=*/false);
    layer.load.zero_();
    if (layer.histogram.defined()) layer.histogram.zero_();
  }
  global_counter("global_skipped").add_(1);
}

std::vector<at::Tensor> ALFLB::loads() {
  follow_routers();
  std::vector<at::Tensor> result;
  for (const Entry& entry : entries()) {
    Layer& layer = layer_of(entry.param);
    prepare(layer, group_options(entry.group), /*fresh=*/false);
    result.push_back(layer.load);
  }
  return result;
}

void ALFLB::record(size_t layer, const at::Tensor& ids) {
  const std::vector<at::Tensor> all = loads();
  TORCH_CHECK_VALUE(layer < all.size(), kAlflbName, ": no layer ", layer, ", there are ", all.size());
  TORCH_CHECK_VALUE(ids.dim() >= 1, "record: ids must be [..., K]");
  alflb_record_(all[layer], ids);
  layer_of(entries()[layer].param).top_k = ids.size(-1);
}

std::vector<LoadReport> ALFLB::report(bool pending) {
  const std::vector<at::Tensor> now = loads();
  std::vector<LoadReport> result;
  for (const Entry& entry : entries()) {
    const Layer& layer = layer_of(entry.param);
    const auto found = state_.find(entry.param.unsafeGetTensorImpl());
    at::Tensor load = now[static_cast<size_t>(entry.ordinal)];
    if (!pending && found != state_.end()) {
      const auto& state = static_cast<const ParamState&>(*found->second);
      if (state.has("last_load")) load = state.at("last_load");
    }
    result.push_back(load_report(load, entry.param, layer.top_k));
  }
  return result;
}

void ALFLB::check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const {
  alflb_check_state(param, options, state);
}

void ALFLB::state_replaced() {
  follow_routers();
  for (const Entry& entry : entries()) prepare(layer_of(entry.param), group_options(entry.group), /*fresh=*/true);
}

}  // namespace torch_ext::optim
