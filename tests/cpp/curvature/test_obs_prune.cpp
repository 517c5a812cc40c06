// Acceptance test 10 of M-FAC (arXiv:2107.03356): exact on a quadratic loss whose Hessian is the Fisher matrix.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/obs_prune.h>

#include <limits>

#include "support/check.h"

namespace torch_ext::curvature {
namespace {

using test::equal_bits;
using test::expect_error;
using test::relative_error;

struct Problem {
  at::Tensor w, dense;
  StaticFisher fisher;
};

Problem problem(int64_t m, int64_t d, double damping, uint64_t seed = 0) {
  torch::manual_seed(seed);
  const at::Tensor g = torch::randn({m, d}, at::kDouble), w = torch::randn({d}, at::kDouble);
  const at::Tensor dense = torch::mm(g.t(), g) / m + damping * torch::eye(d, at::kDouble);
  return {w, dense, StaticFisher(g, damping)};
}

double loss_increase(const Problem& p, const at::Tensor& w) {
  const at::Tensor delta = w - p.w;
  return (torch::dot(delta, torch::mv(p.dense, delta)) / 2).item<double>();
}

at::Tensor pruned_set(const ObsPruneResult& result) { return result.mask[0].logical_not().nonzero().view({-1}); }

std::vector<Problem> problems() { return {problem(8, 60, 1e-3), problem(40, 30, 1e-3), problem(1, 7, 0.1)}; }

TEST(ObsPrune, Test10ASingleWeight) {
  for (const Problem& p : problems()) {
    const at::Tensor rho = p.w.square() / (2 * torch::linalg_inv(p.dense).diagonal());
    for (const char* update : {"joint", "independent"}) {
      const auto result = obs_prune(p.w, p.fisher, 1.0 / static_cast<double>(p.w.numel()), std::nullopt, update);
      ASSERT_EQ(pruned_set(result).numel(), 1);
      EXPECT_EQ(pruned_set(result).item<int64_t>(), rho.argmin().item<int64_t>());
      const double expected = rho.min().item<double>();
      EXPECT_NEAR(loss_increase(p, result.w[0]), expected, 1e-10 * expected);
      EXPECT_NEAR(result.predicted_loss_increase.item<double>(), expected, 1e-10 * expected);
    }
  }
}

TEST(ObsPrune, Test10JointIsTheOptimum) {
  for (const Problem& p : problems()) {
    for (const double sparsity : {0.2, 0.5, 0.9}) {
      const auto result = obs_prune(p.w, p.fisher, sparsity);
      const at::Tensor s = pruned_set(result), inverse = torch::linalg_inv(p.dense), w_s = p.w.index_select(0, s);
      const at::Tensor block = inverse.index_select(0, s).index_select(1, s);
      const double expected = (torch::dot(w_s, torch::linalg_solve(block, w_s)) / 2).item<double>();
      EXPECT_NEAR(loss_increase(p, result.w[0]), expected, 1e-10 * expected);
      EXPECT_NEAR(result.predicted_loss_increase.item<double>(), expected, 1e-10 * expected);
      EXPECT_TRUE(equal_bits(result.w[0].index_select(0, s), torch::zeros_like(w_s)));
      const at::Tensor slope = torch::mv(p.dense, result.w[0] - p.w);
      EXPECT_LT((slope * result.mask[0]).abs().max().item<double>(), 1e-11 * slope.abs().max().item<double>());
    }
  }
}

TEST(ObsPrune, Test10JointNeverLosesToIndependent) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Problem p = problem(8 + static_cast<int64_t>(seed), 60, 1e-2, seed);
    const auto joint = obs_prune(p.w, p.fisher, 0.4), independent = obs_prune(p.w, p.fisher, 0.4, {}, "independent");
    EXPECT_LE(loss_increase(p, joint.w[0]), loss_increase(p, independent.w[0]));
    const double predicted = independent.predicted_loss_increase.item<double>();
    EXPECT_NEAR(predicted, loss_increase(p, independent.w[0]), 1e-9 * predicted);
  }
}

TEST(ObsPrune, ComparesScoresOverLayers) {
  const Problem a = problem(10, 24, 1e-2), b = problem(10, 18, 1e-2, 1);
  const auto result = obs_prune({a.w.view({4, 6}), 4 * b.w}, {a.fisher, b.fisher}, 0.5);
  EXPECT_EQ(result.w[0].sizes(), at::IntArrayRef({4, 6}));
  const auto zeros = [&](size_t i) { return result.mask[i].logical_not().sum().item<int64_t>(); };
  EXPECT_EQ(zeros(0) + zeros(1), 21);
  EXPECT_GT(zeros(0), zeros(1));  // the smaller weights are in the first
}

TEST(ObsPrune, MasksAreExplicitAndOnlyGrow) {
  const Problem p = problem(8, 20, 1e-2);
  at::Tensor w = p.w.clone(), kept = torch::ones({20}, at::kBool);
  w[5] = 0;
  EXPECT_TRUE(obs_prune(w, p.fisher, 0, kept).mask[0].all().item<bool>());  // a zero is not a pruned weight
  kept[3] = false;
  const auto result = obs_prune(w, p.fisher, 0.5, kept);
  EXPECT_FALSE(result.mask[0][3].item<bool>());
  EXPECT_EQ(result.w[0][3].item<double>(), 0);
  EXPECT_EQ(pruned_set(result).numel(), 10);
  EXPECT_NE(w[3].item<double>(), 0);  // the argument is left alone
}

TEST(ObsPrune, Schedule) {
  const auto schedule = sparsity_schedule(0.9, 4, 0.2);
  ASSERT_EQ(schedule.size(), 4U);
  EXPECT_EQ(schedule.back(), 0.9);
  double kept = 0.8;
  for (const double sparsity : schedule) {
    EXPECT_NEAR((1 - sparsity) / kept, std::pow(0.1 / 0.8, 0.25), 1e-13);
    kept = 1 - sparsity;
  }
}

TEST(ObsPrune, BadInput) {
  const Problem p = problem(4, 12, 0.1);
  expect_error<c10::ValueError>([&] { obs_prune(p.w, p.fisher, 1); }, "sparsity must be in [0, 1)");
  expect_error<c10::ValueError>([&] { obs_prune(p.w, p.fisher, 0.5, {}, "all"); }, "got \"all\"");
  expect_error<c10::ValueError>([&] { obs_prune(p.w / 0, p.fisher, 0.5); }, "holds NaN or infinity");
  expect_error<c10::ValueError>([&] { obs_prune(p.w.narrow(0, 0, 5), p.fisher, 0.5); }, "has 5 elements");
  const at::Tensor none = torch::zeros({12}, at::kBool);
  expect_error<c10::ValueError>([&] { obs_prune(p.w, p.fisher, 0.5, none); }, "below that of the given masks");
  expect_error<c10::TypeError>([&] { obs_prune(p.w, p.fisher, 0.5, none.to(at::kInt)); }, "must be bool");
  expect_error<c10::ValueError>([] { obs_prune(at::TensorList(), std::vector<StaticFisher>(), 0.5); }, "no weights");
  expect_error<c10::ValueError>([] { sparsity_schedule(0.5, 0); }, "recomputations must be at least 1");
}

}  // namespace
}  // namespace torch_ext::curvature
