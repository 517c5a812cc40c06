#include <ATen/ops/index_copy.h>
#include <ATen/ops/layer_norm.h>
#include <torch/nn/functional.h>
#include <torch_ext/nn/eggroll.h>
#include <torch_ext/ops/eggroll.h>

#include <string>
#include <utility>
#include <variant>

#include "core/check.h"

namespace torch_ext::nn {
namespace {

using optim::Population;

void check_members(const char* layer, const at::Tensor& input, const Population& population) {
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(0) == population.size(), layer,
                    ": dimension 0 of the input is the member: expected ", population.size(), ", got shape ",
                    input.sizes());
}

// `param` must be perturbed in this way if it is perturbed at all.
void check_kind(const char* layer, const char* name, const at::Tensor& param, bool matrix,
                const Population& population) {
  const optim::PopulationParam* found = param.defined() ? population.find(param) : nullptr;
  if (found == nullptr) return;
  TORCH_CHECK_VALUE((found->kind != "vector") == matrix, "Invalid kind: ", layer, " perturbs its ", name, " as a \"",
                    matrix ? "matrix" : "vector", "\", parameter ", found->ordinal, " is in a group with kind=\"",
                    found->kind, "\"");
}

// Members without noise see the plain layer: their rows of `y` are computed again.
template <typename Plain>
at::Tensor with_baseline(const at::Tensor& y, const at::Tensor& x, const Population& population, const Plain& plain) {
  if (population.baseline() == 0) return y;
  const at::Tensor rows = population.unperturbed_rows().to(x.device());
  if (rows.numel() == 0) return y;
  return at::index_copy(y, 0, rows, plain(x.index_select(0, rows)));
}

// theta of every member, with dimensions between the member and its own so that it meets [members, ..., *shape].
at::Tensor member_vectors(const at::Tensor& theta, const at::Tensor& x, const ops::EggrollNoise& noise,
                          int64_t ordinal) {
  if (ordinal < 0) return theta;
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1);
  shape[0] = x.size(0);
  for (int64_t d = 0; d < theta.dim(); ++d) shape[shape.size() - static_cast<size_t>(theta.dim() - d)] = theta.size(d);
  return ops::eggroll_vector(theta, x.size(0), noise, ordinal).view(shape);
}

// Equal zeros on both sides, as torch's "valid" and "same" mean them; nothing if they are not equal.
std::optional<std::vector<int64_t>> padding_of(const torch::nn::Conv2dImpl& layer) {
  const auto& o = layer.options;
  if (const auto* numbers = std::get_if<torch::ExpandingArray<2>>(&o.padding())) {
    return std::vector<int64_t>((*numbers)->begin(), (*numbers)->end());
  }
  std::vector<int64_t> padding(2, 0);
  if (std::holds_alternative<torch::enumtype::kValid>(o.padding())) return padding;
  for (size_t d = 0; d < 2; ++d) {
    const int64_t total = o.dilation()->at(d) * (o.kernel_size()->at(d) - 1);
    if (total % 2 != 0) return std::nullopt;
    padding[d] = total / 2;
  }
  return padding;
}

// The twin of a layer, or the layer itself.
torch::nn::AnyModule twin(const torch::nn::AnyModule& any, bool convert) {
  const auto module = any.ptr();
  const bool already = dynamic_cast<optim::PopulationLayer*>(module.get()) != nullptr;
  if (convert == already) return any;
  const auto finish = [&](auto made) {
    made->train(module->is_training());
    return torch::nn::AnyModule(made);
  };
  if (auto* linear = module->as<torch::nn::LinearImpl>()) {
    return convert ? finish(std::make_shared<EggrollLinearImpl>(*linear))
                   : finish(std::make_shared<torch::nn::LinearImpl>(*linear));
  }
  if (auto* embedding = module->as<torch::nn::EmbeddingImpl>()) {
    return convert ? finish(std::make_shared<EggrollEmbeddingImpl>(*embedding))
                   : finish(std::make_shared<torch::nn::EmbeddingImpl>(*embedding));
  }
  if (auto* norm = module->as<torch::nn::LayerNormImpl>()) {
    return convert ? finish(std::make_shared<EggrollLayerNormImpl>(*norm))
                   : finish(std::make_shared<torch::nn::LayerNormImpl>(*norm));
  }
  if (auto* conv = module->as<torch::nn::Conv2dImpl>()) {
    return convert ? finish(std::make_shared<EggrollConv2dImpl>(*conv))
                   : finish(std::make_shared<torch::nn::Conv2dImpl>(*conv));
  }
  return any;
}

torch::nn::Sequential exchanged(const torch::nn::Sequential& model, bool convert) {
  torch::nn::Sequential result;
  size_t i = 0;
  for (const auto& item : model->named_children()) {
    result->push_back(item.key(), twin(*(model->begin() + static_cast<std::ptrdiff_t>(i++)), convert));
  }
  result->train(model->is_training());
  return result;
}

template <typename Twin, typename Plain>
std::shared_ptr<torch::nn::Module> cloned(const Plain& layer, const std::optional<torch::Device>& device) {
  const auto copy = layer.Plain::clone(device);
  return std::make_shared<Twin>(static_cast<const Plain&>(*copy));
}

}  // namespace

at::Tensor EggrollLinearImpl::forward(const at::Tensor& x) {
  const auto& pop = population();
  if (pop == nullptr) return torch::nn::LinearImpl::forward(x);
  check_members("EggrollLinear", x, *pop);
  const at::Tensor y = ops::eggroll_linear(x, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt,
                                           pop->noise(), pop->ordinal(weight), pop->ordinal(bias));
  return with_baseline(y, x, *pop, [&](const at::Tensor& rows) { return torch::nn::LinearImpl::forward(rows); });
}

void EggrollLinearImpl::check(const Population& population) const {
  check_kind("EggrollLinear", "weight", weight, /*matrix=*/true, population);
  check_kind("EggrollLinear", "bias", bias, /*matrix=*/false, population);
}

at::Tensor EggrollEmbeddingImpl::forward(const at::Tensor& indices) {
  const auto& pop = population();
  if (pop == nullptr) return torch::nn::EmbeddingImpl::forward(indices);
  check_members("EggrollEmbedding", indices, *pop);
  const at::Tensor y = ops::eggroll_embedding(indices, weight, pop->noise(), pop->ordinal(weight));
  return with_baseline(y, indices, *pop,
                       [&](const at::Tensor& rows) { return torch::nn::EmbeddingImpl::forward(rows); });
}

void EggrollEmbeddingImpl::check(const Population& population) const {
  check_kind("EggrollEmbedding", "weight", weight, /*matrix=*/true, population);
  TORCH_CHECK_VALUE(!options.max_norm().has_value(),
                    "EggrollEmbedding: max_norm changes the weight while reading it and is not supported");
}

at::Tensor EggrollLayerNormImpl::forward(const at::Tensor& x) {
  const auto& pop = population();
  if (pop == nullptr) return torch::nn::LayerNormImpl::forward(x);
  check_members("EggrollLayerNorm", x, *pop);
  at::Tensor y = at::layer_norm(x, options.normalized_shape(), {}, {}, options.eps());
  if (weight.defined()) y = y * member_vectors(weight, x, pop->noise(), pop->ordinal(weight));
  if (bias.defined()) y = y + member_vectors(bias, x, pop->noise(), pop->ordinal(bias));
  return with_baseline(y, x, *pop, [&](const at::Tensor& rows) { return torch::nn::LayerNormImpl::forward(rows); });
}

void EggrollLayerNormImpl::check(const Population& population) const {
  check_kind("EggrollLayerNorm", "weight", weight, /*matrix=*/false, population);
  check_kind("EggrollLayerNorm", "bias", bias, /*matrix=*/false, population);
}

at::Tensor EggrollConv2dImpl::forward(const at::Tensor& x) {
  const auto& pop = population();
  if (pop == nullptr) return torch::nn::Conv2dImpl::forward(x);
  check_members("EggrollConv2d", x, *pop);
  const at::Tensor y = ops::eggroll_conv2d(x, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt,
                                           pop->noise(), pop->ordinal(weight), pop->ordinal(bias), *options.stride(),
                                           padding_of(*this).value_or(std::vector<int64_t>{0, 0}), *options.dilation());
  return with_baseline(y, x, *pop, [&](const at::Tensor& rows) {
    const at::Tensor flat = rows.dim() == 5 ? rows.flatten(0, 1) : rows;
    const at::Tensor plain = torch::nn::Conv2dImpl::forward(flat);
    return rows.dim() == 5 ? plain.unflatten(0, {rows.size(0), rows.size(1)}) : plain;
  });
}

void EggrollConv2dImpl::check(const Population& population) const {
  check_kind("EggrollConv2d", "weight", weight, /*matrix=*/true, population);
  check_kind("EggrollConv2d", "bias", bias, /*matrix=*/false, population);
  TORCH_CHECK_VALUE(options.groups() == 1, "EggrollConv2d: groups=", options.groups(), " is not supported, only 1");
  TORCH_CHECK_VALUE(std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()) && padding_of(*this),
                    "EggrollConv2d: padding must be zeros, as many on both sides");
}

std::shared_ptr<torch::nn::Module> EggrollLinearImpl::clone(const std::optional<torch::Device>& device) const {
  return cloned<EggrollLinearImpl, torch::nn::LinearImpl>(*this, device);
}
std::shared_ptr<torch::nn::Module> EggrollEmbeddingImpl::clone(const std::optional<torch::Device>& device) const {
  return cloned<EggrollEmbeddingImpl, torch::nn::EmbeddingImpl>(*this, device);
}
std::shared_ptr<torch::nn::Module> EggrollLayerNormImpl::clone(const std::optional<torch::Device>& device) const {
  return cloned<EggrollLayerNormImpl, torch::nn::LayerNormImpl>(*this, device);
}
std::shared_ptr<torch::nn::Module> EggrollConv2dImpl::clone(const std::optional<torch::Device>& device) const {
  return cloned<EggrollConv2dImpl, torch::nn::Conv2dImpl>(*this, device);
}

torch::nn::Sequential eggroll_convert(const torch::nn::Sequential& model) { return exchanged(model, true); }
torch::nn::Sequential eggroll_revert(const torch::nn::Sequential& model) { return exchanged(model, false); }

}  // namespace torch_ext::nn
