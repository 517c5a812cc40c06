// MeZO as a C++ optimizer; what both languages share is tested from Python.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/ops/eggroll.h>
#include <torch_ext/optim/mezo.h>

#include <limits>
#include <vector>

#include "optim/mezo/mezo_step.h"
#include "support/check.h"

namespace torch_ext::optim {
namespace {

using test::clones;
using test::equal_bits;
using test::expect_error;
using test::ThreadCount;

// Sizes from far below to far above the perturbation, zeros of both signs and what is not finite.
at::Tensor values_of(at::ScalarType dtype) {
  torch::manual_seed(0);
  const at::Tensor sizes = at::pow(2.0, torch::rand({200001}, at::kDouble) * 40 - 30);
  at::Tensor p = (sizes * torch::randn({200001}, at::kDouble).sign()).to(dtype);
  const double inf = std::numeric_limits<double>::infinity();
  p.slice(0, 0, 5).copy_(torch::tensor({0.0, -0.0, inf, -inf, inf - inf}, at::kDouble));
  return p;
}

TEST(MeZO, PerturbationsAreTakenBackToTheBitForAnyThreadCount) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const at::Tensor start = values_of(dtype);
    std::vector<at::Tensor> perturbed;
    for (const int threads : {1, 2}) {
      const ThreadCount count(threads);
      const std::vector<MezoTarget> targets{{start.clone(), 0, 0, 0, {}}, {start.slice(0, 7).clone(), 1, 0, 0, {}}};
      MezoPerturbation perturbation(targets, {3, 1, 0}, 1e-3);
      EXPECT_FALSE(test::same_bits(targets[0].param, start));
      perturbed.push_back(targets[1].param.clone());
      EXPECT_GT(perturbation.kept(), 1000);
      perturbation.restore();
      EXPECT_TRUE(equal_bits(targets[0].param, start)) << dtype;
      EXPECT_TRUE(equal_bits(targets[1].param, start.slice(0, 7))) << dtype;
    }
    EXPECT_TRUE(equal_bits(perturbed[0], perturbed[1]));
  }
}

TEST(MeZO, LearnsFromLossesAlone) {
  torch::manual_seed(1);
  const at::Tensor x = torch::randn({64, 5}), y = x.matmul(torch::randn({5, 1}));
  torch::nn::Linear model(5, 1);
  MeZO optimizer(model->parameters(), MeZOOptions(0.02));
  const auto loss = [&] { return torch::mse_loss(model->forward(x), y); };
  const double first = loss().item<double>();
  for (int i = 0; i < 400; ++i) optimizer.step(loss);
  EXPECT_LT(loss().item<double>(), 0.01 * first);
}

TEST(MeZO, AveragesLossesOverProcesses) {
  const at::Tensor start = torch::full({4}, 0.5, at::kDouble);
  std::vector<std::vector<at::Tensor>> results;
  for (const bool shared : {false, true}) {
    std::vector<at::Tensor> params{start.clone().requires_grad_()};
    MeZO optimizer(params, MeZOOptions(0.1));
    if (shared) {
      optimizer.set_reduce([](std::vector<at::Tensor>& losses) {
        for (at::Tensor& loss : losses) loss = loss * 2;  // the other process's loss is three times as large
      });
    }
    optimizer.step([&] { return params[0].square().sum() * (shared ? 1.0 : 2.0); });
    results.push_back(clones(params));
  }
  EXPECT_TRUE(equal_bits(results[0], results[1]));
}

TEST(MeZO, ThrowingClosureRestores) {
  std::vector<at::Tensor> params{values_of(at::kFloat).requires_grad_()};
  const auto start = clones(params);
  MeZO optimizer(params);
  expect_error<std::runtime_error>([&] { optimizer.step([]() -> at::Tensor { throw std::runtime_error("no data"); }); },
                                   "no data");
  EXPECT_TRUE(equal_bits(clones(params), start));
  EXPECT_TRUE(optimizer.state().empty());
  expect_error<c10::Error>([&] { optimizer.step(); }, "needs a closure");
}

}  // namespace
}  // namespace torch_ext::optim
