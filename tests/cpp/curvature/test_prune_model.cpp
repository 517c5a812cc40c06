#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/obs_prune.h>
#include <torch_ext/curvature/prune_model.h>

#include <limits>
#include <stdexcept>

#include "support/check.h"

namespace torch_ext::curvature {
namespace {

using test::clones;
using test::equal_bits;
using test::expect_error;

struct Net : torch::nn::Module {
  Net() {
    torch::manual_seed(0);
    first = register_module("first", torch::nn::Linear(6, 8));
    drop = register_module("drop", torch::nn::Dropout(0.5));
    second = register_module("second", torch::nn::Linear(8, 3));
    drop->eval();  // a mixture of flags
  }
  at::Tensor forward(const at::Tensor& x) { return second(drop(torch::tanh(first(x)))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
  torch::nn::Dropout drop{nullptr};
};

// Calls count from 1; at call `bad` the gradient of first.weight alone is NaN, or the loss throws.
struct Loss {
  Net& model;
  int bad = 0;
  bool throws = false;
  int calls = 0;
  at::Tensor operator()() {
    ++calls;
    const at::Tensor x = torch::arange(30, at::kFloat).view({5, 6}).add(calls).sin(), y = torch::arange(5) % 3;
    const at::Tensor loss = torch::nn::functional::cross_entropy(model.forward(x), y);
    if (calls != bad) return loss;
    if (throws) throw std::runtime_error("no data");
    return loss + (model.first->weight * std::numeric_limits<float>::quiet_NaN()).sum() * 0;
  }
};

PruneModelOptions options(int64_t num_grads = 4) {
  PruneModelOptions result;
  result.num_grads = num_grads;
  result.damping = 1e-3;
  return result;
}

int64_t zeros(const at::Tensor& tensor) { return tensor.eq(0).sum().item<int64_t>(); }

TEST(PruneModel, PrunesTheWeightsOfAllLayersWithExactlyMGradients) {
  for (const int64_t m : {1, 4}) {
    for (const int64_t rounds : {1, 3}) {
      Net net;
      Loss loss{net};
      PruneModelOptions with = options(m);
      with.recomputations = rounds;
      int64_t last = 0;
      with.progress = [&](int64_t done, int64_t total) {
        EXPECT_EQ(done, ++last);
        EXPECT_EQ(total, m * rounds);
      };
      const auto result = prune_model(
          net, [&] { return loss(); }, 0.5, with);
      EXPECT_EQ(loss.calls, m * rounds);
      EXPECT_EQ(result.names, (std::vector<std::string>{"first.weight", "second.weight"}));
      EXPECT_EQ(zeros(net.first->weight) + zeros(net.second->weight), 36);
      EXPECT_EQ(result.total_sparsity, 0.5);
      EXPECT_TRUE(equal_bits(result.masks[0], net.first->weight.ne(0)));
      EXPECT_EQ(zeros(net.first->bias) + zeros(net.second->bias), 0);
      EXPECT_FALSE(net.first->weight.grad().defined());
      EXPECT_GT(result.predicted_loss_increase.item<double>(), 0);
      EXPECT_TRUE(net.is_training() && net.second->is_training());
      EXPECT_FALSE(net.drop->is_training());
    }
  }
}

TEST(PruneModel, MagnitudeNeedsNoGradient) {
  Net net;
  PruneModelOptions with;
  with.method = "magnitude";
  const auto before = torch::cat({net.first->weight.detach().view({-1}), net.second->weight.detach().view({-1})}).abs();
  const auto result = prune_model(net, {}, 0.25, with);
  const double threshold = std::get<0>(before.kthvalue(18)).item<double>();
  EXPECT_TRUE(equal_bits(result.masks[0].view({-1}), before.narrow(0, 0, 48).gt(threshold)));
  EXPECT_FALSE(result.predicted_loss_increase.defined());
}

TEST(PruneModel, GoesOnFromMasks) {
  Net net;
  Loss loss{net};
  PruneModelOptions with = options();
  const auto first = prune_model(
      net, [&] { return loss(); }, 0.5, with);
  with.masks = first.masks;
  const auto second = prune_model(
      net, [&] { return loss(); }, 0.75, with);
  EXPECT_EQ(second.total_sparsity, 0.75);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_FALSE(second.masks[i].logical_and(first.masks[i].logical_not()).any().item<bool>());
  }
  with.masks = second.masks;
  expect_error<c10::ValueError>(
      [&] {
        prune_model(
            net, [&] { return loss(); }, 0.5, with);
      },
      "masks only grow");
}

TEST(PruneModel, AFailureLeavesEverythingAsItWas) {
  for (const int bad : {3, 6}) {  // in the first round, and after one that has pruned
    for (const bool throws : {false, true}) {
      Net net;
      Loss loss{net, bad, throws};
      const auto before = clones(net.parameters());
      PruneModelOptions with = options();
      with.recomputations = 2;
      const auto run = [&] {
        prune_model(
            net, [&] { return loss(); }, 0.5, with);
      };
      if (throws) {
        expect_error<std::runtime_error>(run, "no data");
      } else {
        expect_error<c10::ValueError>(run, "of parameter 'first.weight' holds NaN or infinity; the weights are unchan");
      }
      EXPECT_TRUE(equal_bits(clones(net.parameters()), before));
      EXPECT_TRUE(net.is_training());
      EXPECT_FALSE(net.drop->is_training());
    }
  }
}

TEST(PruneModel, MasksHoldInTrainingUntilRemoved) {
  Net net;
  Loss loss{net};
  torch::optim::SGD optimizer(net.parameters(), torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.1));
  const auto step = [&] {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  };
  step();  // momentum knows the weights that will be pruned
  const auto result = prune_model(
      net, [&] { return loss(); }, 0.6, options());
  PruneMasks masks(prunable_weights(net), result.masks);
  for (int i = 0; i < 3; ++i) {
    step();
    masks.apply();
    EXPECT_TRUE(equal_bits(net.first->weight.ne(0), result.masks[0]));
    EXPECT_EQ(net.first->weight.grad().masked_select(result.masks[0].logical_not()).ne(0).sum().item<int64_t>(), 0);
  }
  masks.remove();
  step();
  EXPECT_EQ(zeros(net.first->weight), 0);
}

TEST(PruneModel, BadInput) {
  Net net;
  Loss loss{net};
  const auto run = [&](PruneModelOptions with) {
    prune_model(
        net, [&] { return loss(); }, 0.5, with);
  };
  PruneModelOptions with = options(0);
  expect_error<c10::ValueError>([&] { run(with); }, "num_grads must be at least 1");
  with = options();
  with.method = "best";
  expect_error<c10::ValueError>([&] { run(with); }, "got \"best\"");
  with = options();
  with.damping = -1;
  expect_error<c10::ValueError>([&] { run(with); }, "damping must be positive, got -1");
  expect_error<c10::ValueError>(
      [&] {
        prune_model(
            NamedWeights(), [&] { return loss(); }, 0.5);
      },
      "no trainable");
  const auto other = [&] { return net.second->weight.sum(); };
  expect_error<c10::ValueError>([&] { prune_model(net, other, 0.5, options()); },
                                "'first.weight' does not enter any of the 4 losses");
  expect_error<c10::TypeError>([&] { PruneMasks({{"w", net.first->weight}}, {torch::ones({8, 6})}); }, "must be bool");
}

}  // namespace
}  // namespace torch_ext::curvature
