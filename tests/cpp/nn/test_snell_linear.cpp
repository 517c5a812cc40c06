#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/nn/snell_linear.h>
#include <torch_ext/ops/snell.h>

#include "support/check.h"

namespace torch_ext::nn {
namespace {

using test::equal_bits;
using test::expect_error;
using test::relative_error;

SnellOptions small() { return SnellOptions(12, 10).rank(4).sparsity(0.5).seed(3); }

TEST(SnellLinear, IsTheFrozenLayerAndTheBranch) {
  torch::nn::Linear linear(12, 10);
  SnellLinear layer(linear, SnellOptions().rank(4).sparsity(0.5).seed(3));
  const at::Tensor x = torch::randn({2, 3, 12});
  const auto [y, t] = ops::snell_linear(x, layer->lora_in, layer->lora_out, 0.1, 0.5);
  EXPECT_TRUE(equal_bits(layer(x), linear(x) + y));
  EXPECT_TRUE(layer->weight.is_same(linear->weight));
  EXPECT_FALSE(linear->weight.requires_grad());
  layer(x).sum().backward();
  EXPECT_TRUE(layer->lora_in.grad().defined() && layer->lora_out.grad().defined());
  std::vector<std::string> names;
  for (const auto& item : layer->named_parameters()) names.push_back(item.key());
  EXPECT_EQ(names, (std::vector<std::string>{"weight", "bias", "lora_in", "lora_out"}));
  const SnellLinear alone(small().bias(false));
  EXPECT_FALSE(alone->bias.defined());
  EXPECT_TRUE(equal_bits(alone->lora_in, layer->lora_in));  // one seed, one initialisation
}

TEST(SnellLinear, InitialFactorsAreUniformAndFillTheirRange) {
  const SnellLinear layer(SnellOptions(1000, 400).rank(16).seed(7));
  const double bound = 1 / std::sqrt(8000.0);
  EXPECT_LT(layer->lora_in.abs().max().item<double>(), bound);
  EXPECT_GT(layer->lora_in.abs().max().item<double>(), 0.99 * bound);
  EXPECT_LT(std::abs(layer->lora_in.mean().item<double>()), 0.03 * bound);
  EXPECT_NEAR(layer->lora_in.std().item<double>(), bound / std::sqrt(3.0), 0.02 * bound);
  const SnellLinear other(SnellOptions(1000, 400).rank(16).seed(8));
  EXPECT_FALSE(equal_bits(layer->lora_in, other->lora_in));
}

TEST(SnellLinear, N4MergedEqualsUnmerged) {
  for (const bool from_zero : {false, true}) {
    SnellLinear layer(small().start_from_zero(from_zero));
    const at::Tensor x = torch::randn({5, 12}), weight = layer->weight.clone();
    {
      const at::NoGradGuard no_grad;
      layer->lora_in.mul_(3);
    }
    const at::Tensor y = layer(x);
    const torch::nn::Linear plain = layer->to_linear();
    layer->merge();
    layer->merge();
    EXPECT_LT(relative_error(layer(x), y), 1e-6);
    EXPECT_LT(relative_error(torch::nn::Linear(plain)->forward(x), y), 1e-6);
    {
      const at::NoGradGuard no_grad;
      layer->lora_in.mul_(2);  // unmerge subtracts what was merged
    }
    layer->unmerge();
    layer->unmerge();
    EXPECT_LT(relative_error(layer->weight, weight), 1e-6);
  }
}

TEST(SnellLinear, StartsFromZeroWithAGradient) {
  torch::nn::Linear linear(12, 10);
  SnellLinear layer(linear, SnellOptions().rank(4).start_from_zero(true));
  const at::Tensor x = torch::randn({5, 12});
  EXPECT_TRUE(torch::allclose(layer(x), linear(x), 0, 1e-7));
  layer(x).square().sum().backward();
  EXPECT_GT(layer->lora_in.grad().abs().max().item<double>(), 0);
}

TEST(SnellLinear, SavesAndLoads) {
  SnellLinear from(small().start_from_zero(true)), to(SnellOptions(12, 10).rank(4).sparsity(0.1).seed(5));
  {
    const at::NoGradGuard no_grad;
    from->lora_in.mul_(2);
  }
  std::stringstream stream;
  torch::save(from, stream);
  torch::load(to, stream);
  EXPECT_EQ(to->sparsity(), 0.5);
  const at::Tensor x = torch::randn({5, 12});
  EXPECT_TRUE(equal_bits(to(x), from(x)));
  from->merge();
  std::stringstream other;
  expect_error<c10::Error>([&] { torch::save(from, other); }, "call unmerge() first");
}

TEST(SnellLinear, BadOptions) {
  const auto make = [](const SnellOptions& options) { return [options] { const SnellLinear layer(options); }; };
  expect_error<c10::ValueError>(make(small().rank(7)), "SnellLinear: rank must be a positive multiple of 2, got 7");
  expect_error<c10::ValueError>(make(small().rank(0)), "rank must be");
  expect_error<c10::ValueError>(make(small().sparsity(1)), "SnellLinear: sparsity must be in [0, 1), got 1");
  expect_error<c10::ValueError>(make(small().dropout(1)), "dropout must be in [0, 1)");
  expect_error<c10::ValueError>(make(small().sparsifier("top")), "sparsifier must be");
  expect_error<c10::ValueError>(make(SnellOptions(0, 4)), "in_features and out_features must be positive");
  SnellLinear layer(small());
  expect_error<c10::ValueError>([&] { layer->set_sparsity(-1); }, "sparsity must be");
  EXPECT_EQ(layer->sparsity(), 0.5);
}

TEST(SnellBudget, FollowsTheCubicLawAndTheScores) {
  SnellBudgetOptions options(10);
  options.initial(0).target(0.8).init_warmup(2).final_warmup(2);
  const std::vector<int64_t> entries{100, 300};
  EXPECT_EQ(snell_budget_split({1, 3}, entries, 2, options), (std::vector<double>{0, 0}));
  const auto half = snell_budget_split({1, 3}, entries, 5, options);  // progress 1/2: sparsity .8 (1 - 1/8)
  EXPECT_NEAR(half[0], 0.7, 1e-12);
  EXPECT_NEAR(half[1], 0.7, 1e-12);
  // 80 entries in the end; the first layer's share is at most its 100.
  const auto last = snell_budget_split({3, 1}, entries, 9, options);
  EXPECT_NEAR(last[0], 0.4, 1e-12);
  EXPECT_NEAR(last[1], 1 - 20.0 / 300, 1e-12);
  // 220 entries would be 165 and 55: 65 of the first go to the second.
  const auto full = snell_budget_split({3, 1}, entries, 9, SnellBudgetOptions(options).target(0.45));
  EXPECT_NEAR(full[0], 0, 1e-12);
  EXPECT_NEAR(full[1], 1 - 120.0 / 300, 1e-12);
  // An unimportant layer keeps one entry; without any score all are alike.
  EXPECT_NEAR(snell_budget_split({1, 0}, entries, 9, options)[1], 1 - 1.0 / 300, 1e-12);
  EXPECT_NEAR(snell_budget_split({0, 0}, entries, 9, options)[0], 0.8, 1e-12);
}

TEST(SnellBudget, SetsTheSparsityOfItsLayers) {
  std::vector<SnellLinear> layers{SnellLinear(small()), SnellLinear(small().seed(4))};
  SnellBudget budget(layers, SnellBudgetOptions(4).target(0.5));
  EXPECT_EQ(layers[0]->sparsity(), 0.01);
  for (int i = 0; i < 4; ++i) {
    for (auto& layer : layers) {
      layer->zero_grad();
      layer(torch::randn({5, 12})).square().sum().backward();
    }
    budget.step();
  }
  EXPECT_NEAR((layers[0]->sparsity() + layers[1]->sparsity()) / 2, 0.5, 1e-9);
  EXPECT_NE(layers[0]->sparsity(), layers[1]->sparsity());
  expect_error<c10::ValueError>([] { SnellBudget({}, SnellBudgetOptions(4)); }, "there is no SnellLinear layer");
  expect_error<c10::ValueError>([&] { SnellBudget(layers, SnellBudgetOptions(4).target(1)); }, "target must be");
  expect_error<c10::ValueError>([&] { SnellBudget(layers, SnellBudgetOptions(4).init_warmup(4)); }, "total_steps (4)");
}

}  // namespace
}  // namespace torch_ext::nn
