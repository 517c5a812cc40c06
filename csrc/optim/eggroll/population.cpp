#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/nn/module.h>
#include <torch_ext/optim/population.h>

#include <algorithm>
#include <set>

#include "core/check.h"
#include "optim/eggroll/eggroll_op.h"

namespace torch_ext::optim {
namespace {

void check_bounds(const ops::EggrollNoise& noise, int64_t size) {
  TORCH_CHECK_VALUE(noise.member_begin >= 0 && size >= 1, kEggroll,
                    ": a population needs begin >= 0 and a member, got [", noise.member_begin, ", ",
                    noise.member_begin + size, ")");
  TORCH_CHECK_VALUE(!noise.antithetic || (noise.member_begin % 2 == 0 && size % 2 == 0), kEggroll,
                    ": members are asked for in pairs, so begin and end must be even, got [", noise.member_begin, ", ",
                    noise.member_begin + size, ")");
}

}  // namespace

Population::Population(ops::EggrollNoise noise, int64_t size, std::vector<PopulationParam> params, int64_t baseline)
    : noise_(std::move(noise)), size_(size), baseline_(baseline), params_(std::move(params)) {
  check_bounds(noise_, size_);
  ops::check_eggroll_noise(kEggroll, noise_);
}

const PopulationParam* Population::find(const at::Tensor& param) const {
  const auto found =
      std::find_if(params_.begin(), params_.end(), [&](const auto& p) { return p.param.is_same(param); });
  return found == params_.end() ? nullptr : &*found;
}

int64_t Population::ordinal(const at::Tensor& param) const {
  const PopulationParam* found = param.defined() ? find(param) : nullptr;
  return found == nullptr ? -1 : found->ordinal;
}

at::Tensor Population::unperturbed_rows() const {
  std::vector<int64_t> rows;
  for (int64_t i = 0; baseline_ > 0 && i < size_; ++i) {
    if ((begin() + i) % baseline_ < 2) rows.push_back(i);
  }
  at::Tensor result = at::empty({static_cast<int64_t>(rows.size())}, at::kLong);
  std::copy(rows.begin(), rows.end(), result.data_ptr<int64_t>());
  return result;
}

Population::Guard Population::applied_to(const std::vector<torch::nn::Module*>& modules) const {
  const auto shared = std::make_shared<const Population>(*this);
  // Layers with the modules that keep them alive.
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, PopulationLayer*>> layers;
  std::set<const void*> covered;
  const auto add = [&](torch::nn::Module& module, std::shared_ptr<torch::nn::Module> owner) {
    auto* const layer = dynamic_cast<PopulationLayer*>(&module);
    if (layer == nullptr) return;
    layer->check(*this);
    for (const at::Tensor& param : layer->perturbed()) {
      if (param.defined()) covered.insert(param.unsafeGetTensorImpl());
    }
    layers.emplace_back(std::move(owner), layer);
  };
  for (torch::nn::Module* root : modules) {
    add(*root, nullptr);  // may stand on the stack: nobody else keeps it
    for (const auto& module : root->modules(/*include_self=*/false)) add(*module, module);
  }
  for (const PopulationParam& p : params_) {
    TORCH_CHECK_VALUE(covered.count(p.param.unsafeGetTensorImpl()) != 0, kEggroll, ": ",
                      core::describe("parameter", static_cast<size_t>(p.ordinal), p.param),
                      " is in no Eggroll layer of this model, so it would be updated without having been perturbed: "
                      "convert the model with eggroll_convert, evaluate with member(i), or do not pass this parameter "
                      "to the optimizer");
  }
  std::vector<std::shared_ptr<const Population>> before;
  for (const auto& [module, layer] : layers) {
    before.push_back(layer->population());
    layer->set_population(shared);
  }
  return Guard([layers = std::move(layers), before = std::move(before)] {
    for (size_t i = layers.size(); i-- > 0;) layers[i].second->set_population(before[i]);
  });
}

std::vector<at::Tensor> Population::perturb(int64_t i) const {
  TORCH_CHECK_INDEX(i >= 0 && i < size_, kEggroll, ": member ", i, " of a population of ", size_);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> saved, tensors;
  std::vector<int64_t> ordinals;
  std::vector<std::string> kinds;
  for (const PopulationParam& p : params_) {
    saved.push_back(p.param.detach().clone());
    tensors.push_back(p.param.detach());
    ordinals.push_back(p.ordinal);
    kinds.push_back(p.kind);
  }
  ops::EggrollNoise noise = noise_;
  noise.member_begin += i;
  const bool plain = baseline_ > 0 && noise.member_begin % baseline_ < 2;
  if (!plain && !tensors.empty()) ops::eggroll_perturb_(tensors, ordinals, kinds, noise);
  return saved;
}

void Population::restore(const std::vector<at::Tensor>& saved) const {
  const at::NoGradGuard no_grad;
  for (size_t k = 0; k < saved.size(); ++k) params_[k].param.detach().copy_(saved[k]);
}

Population::Guard Population::member(int64_t i) const {
  return Guard([self = *this, saved = perturb(i)] { self.restore(saved); });
}

}  // namespace torch_ext::optim
