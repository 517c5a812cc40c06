// Layers that compute what every member of a population does with their weights (EGGROLL, arXiv:2511.16652).
//
// They are torch's layers: same options, same parameters under the same names, and without a population the very same
// output. While a guard of Population::applied_to lives, dimension 0 of the input is the member: row i goes through
// W + s sigma E of member population.begin() + i. What stands between them must treat dimension 0 so as well:
// activations, dropout and pooling do, BatchNorm and Flatten(1) do not.
//
//   torch::nn::Sequential model = torch_ext::nn::eggroll_convert(plain);      // shares every parameter with `plain`
//   struct Net : torch::nn::Module { torch_ext::nn::EggrollLinear fc{nullptr}; ... };   // or use them as members
#pragma once

#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch_ext/export.h>
#include <torch_ext/optim/population.h>

#include <memory>
#include <optional>
#include <vector>

namespace torch_ext::nn {

// [members, ..., in_features] -> [members, ..., out_features].
class TORCH_EXT_API EggrollLinearImpl : public torch::nn::LinearImpl, public optim::PopulationLayer {
 public:
  using torch::nn::LinearImpl::LinearImpl;
  // Shares the layer's parameters.
  explicit EggrollLinearImpl(const torch::nn::LinearImpl& layer) : torch::nn::LinearImpl(layer) {}
  explicit EggrollLinearImpl(const torch::nn::Linear& layer) : EggrollLinearImpl(*layer) {}
  at::Tensor forward(const at::Tensor& x);
  std::vector<at::Tensor> perturbed() const override { return {weight, bias}; }
  void check(const optim::Population& population) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(EggrollLinear);

// Indices [members, ...] -> [members, ..., embedding_dim].
class TORCH_EXT_API EggrollEmbeddingImpl : public torch::nn::EmbeddingImpl, public optim::PopulationLayer {
 public:
  using torch::nn::EmbeddingImpl::EmbeddingImpl;
  explicit EggrollEmbeddingImpl(const torch::nn::EmbeddingImpl& layer) : torch::nn::EmbeddingImpl(layer) {}
  explicit EggrollEmbeddingImpl(const torch::nn::Embedding& layer) : EggrollEmbeddingImpl(*layer) {}
  at::Tensor forward(const at::Tensor& indices);
  std::vector<at::Tensor> perturbed() const override { return {weight}; }
  // Also refuses max_norm, which changes the weight while reading it.
  void check(const optim::Population& population) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(EggrollEmbedding);

// [members, ..., *normalized_shape], gain and bias perturbed as vectors.
class TORCH_EXT_API EggrollLayerNormImpl : public torch::nn::LayerNormImpl, public optim::PopulationLayer {
 public:
  using torch::nn::LayerNormImpl::LayerNormImpl;
  explicit EggrollLayerNormImpl(const torch::nn::LayerNormImpl& layer) : torch::nn::LayerNormImpl(layer) {}
  explicit EggrollLayerNormImpl(const torch::nn::LayerNorm& layer) : EggrollLayerNormImpl(*layer) {}
  at::Tensor forward(const at::Tensor& x);
  std::vector<at::Tensor> perturbed() const override { return {weight, bias}; }
  void check(const optim::Population& population) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(EggrollLayerNorm);

// [members, channels, height, width] or [members, batch, channels, height, width]; one group, padding by zeros.
class TORCH_EXT_API EggrollConv2dImpl : public torch::nn::Conv2dImpl, public optim::PopulationLayer {
 public:
  using torch::nn::Conv2dImpl::Conv2dImpl;
  explicit EggrollConv2dImpl(const torch::nn::Conv2dImpl& layer) : torch::nn::Conv2dImpl(layer) {}
  explicit EggrollConv2dImpl(const torch::nn::Conv2d& layer) : EggrollConv2dImpl(*layer) {}
  at::Tensor forward(const at::Tensor& x);
  std::vector<at::Tensor> perturbed() const override { return {weight, bias}; }
  // Also refuses groups, other padding than zeros and padding="same" that is not the same on both sides.
  void check(const optim::Population& population) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(EggrollConv2d);

// A container with the same modules in which every Linear, Embedding, LayerNorm and Conv2d is its Eggroll twin sharing
// its parameters; the other way for eggroll_revert. (A member of a C++ module cannot be
// exchanged from outside: give such modules Eggroll layers from the start.)
TORCH_EXT_API torch::nn::Sequential eggroll_convert(const torch::nn::Sequential& model);
TORCH_EXT_API torch::nn::Sequential eggroll_revert(const torch::nn::Sequential& model);

}  // namespace torch_ext::nn
