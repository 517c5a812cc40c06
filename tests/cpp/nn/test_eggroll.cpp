// The layers of a population against what they replace: every member's plain layer, one member at a time.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/nn/eggroll.h>
#include <torch_ext/optim/eggroll.h>

#include <memory>
#include <string>
#include <vector>

#include "support/check.h"

namespace torch_ext::nn {
namespace {

using optim::Eggroll;
using optim::EggrollOptions;
using optim::Population;
using optim::PopulationLayer;
using test::clones;
using test::equal_bits;
using test::expect_error;

TEST(EggrollLayers, TwinsAreTheirLayersMemberByMember) {
  torch::manual_seed(0);
  torch::nn::Sequential plain(torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 3, 3).padding(1)), torch::nn::ReLU(),
                              torch::nn::Flatten(torch::nn::FlattenOptions().start_dim(1)),
                              torch::nn::LayerNorm(torch::nn::LayerNormOptions({48})), torch::nn::Linear(48, 5));
  plain->to(at::kDouble);
  auto model = eggroll_convert(plain);
  EXPECT_EQ(model->parameters().size(), 6u);
  for (size_t i = 0; i < 6; ++i) EXPECT_TRUE(model->parameters()[i].is_same(plain->parameters()[i]));
  for (const std::string shaping : {"zscore", "baseline"}) {
    Eggroll optimizer(model->parameters(), EggrollOptions().sigma(0.2).rank(2).population(8).shaping(shaping));
    const at::Tensor x = torch::randn({8, 2, 4, 4}, at::kDouble);
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(equal_bits(model->forward(x), plain->forward(x)));
    const Population pop = optimizer.ask();
    at::Tensor y;
    {
      const auto guard = pop.applied_to(model);
      y = model->forward(x);
    }
    const auto start = clones(plain->parameters());
    for (int64_t i = 0; i < 8; ++i) {
      const auto guard = pop.member(i);
      EXPECT_LT(test::relative_error(y[i], plain->forward(x.slice(0, i, i + 1))[0]), 1e-11) << i;
    }
    EXPECT_TRUE(equal_bits(clones(plain->parameters()), start));
  }
  torch::nn::Embedding table(11, 4);
  EggrollEmbedding embedding(table);
  Eggroll optimizer(embedding->parameters(), EggrollOptions().sigma(0.2).population(4));
  const at::Tensor ids = torch::randint(11, {4, 3}, at::kLong);
  const Population pop = optimizer.ask();
  const torch::NoGradGuard no_grad;
  at::Tensor y;
  {
    const auto guard = pop.applied_to(embedding);
    y = embedding->forward(ids);
  }
  for (int64_t i = 0; i < 4; ++i) {
    const auto guard = pop.member(i);
    EXPECT_LT(test::relative_error(y[i], table->forward(ids[i])), 1e-5);
  }
  const auto copy = std::dynamic_pointer_cast<EggrollEmbeddingImpl>(embedding->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_FALSE(copy->weight.is_same(table->weight));
  EXPECT_TRUE(equal_bits(copy->weight, table->weight));
  const auto back = eggroll_revert(model);
  EXPECT_EQ(dynamic_cast<PopulationLayer*>(back->children().back().get()), nullptr);
}

// A module of the user's own, on the stack, with twins as members.
struct Net : torch::nn::Module {
  Net()
      : first(register_module("first", EggrollLinear(3, 4))), last(register_module("last", torch::nn::Linear(4, 2))) {}
  at::Tensor forward(const at::Tensor& x) { return last->forward(first->forward(x).relu()); }
  EggrollLinear first;
  torch::nn::Linear last;
};

TEST(EggrollLayers, GuardsSayWhatIsMissing) {
  Net net;
  Eggroll all(net.parameters(), EggrollOptions().population(4));
  expect_error<c10::ValueError>([&] { const auto guard = all.ask().applied_to(net); },
                                "parameter 2 (shape [2, 4]) is in no Eggroll layer of this model");
  Eggroll some(net.first->parameters(), EggrollOptions().population(4));
  const Population pop = some.ask();
  {
    const auto guard = pop.applied_to(net);
    EXPECT_EQ(net.forward(torch::zeros({4, 3})).sizes(), (std::vector<int64_t>{4, 2}));
    expect_error<c10::ValueError>([&] { net.forward(torch::zeros({3, 3})); }, "expected 4, got shape [3, 3]");
  }
  EXPECT_EQ(net.first->population(), nullptr);
  expect_error<c10::IndexError>([&] { const auto guard = pop.member(4); }, "member 4 of a population of 4");
  EXPECT_EQ(net.forward(torch::zeros({3, 3})).size(0), 3);
}

}  // namespace
}  // namespace torch_ext::nn
