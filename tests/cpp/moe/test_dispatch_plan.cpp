// moe::dispatch_plan, permute and combine: test 10 of the method's acceptance list (arXiv:2512.03915).
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/moe/dispatch_plan.h>
#include <torch_ext/moe/route.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "support/check.h"

namespace torch_ext::moe {
namespace {

using test::equal_bits;
using test::expect_error;
using test::ThreadCount;

at::Tensor random_ids(int64_t tokens, int64_t k, int64_t experts) {
  torch::manual_seed(3);
  return torch::randint(experts, {tokens, k}, at::kInt);
}

TEST(MoEDispatchPlan, N10IsAStableArgsort) {
  for (const auto& [tokens, k, experts] :
       {std::tuple<int64_t, int64_t, int64_t>{1000, 4, 16}, {7, 1, 3}, {0, 2, 4}, {50, 8, 37}}) {
    const at::Tensor ids = random_ids(tokens, k, experts);
    const DispatchPlan plan = dispatch_plan(ids, experts);
    const at::Tensor order = std::get<1>(ids.view(-1).sort(/*stable=*/std::optional<bool>(true), 0));
    EXPECT_TRUE(equal_bits(plan.src_of.to(at::kLong), order));
    EXPECT_EQ(plan.offsets[experts].item<int64_t>(), tokens * k);
    const at::Tensor back = plan.slot_of.view(-1).index_select(0, order);
    EXPECT_TRUE(equal_bits(back, torch::arange(tokens * k, at::kInt)));
  }
}

TEST(MoEDispatchPlan, N10CapacityByPositionAndByGate) {
  const at::Tensor ids = torch::tensor({{0}, {1}, {0}, {-1}, {0}, {1}}, at::kInt);
  const DispatchPlan first = dispatch_plan(ids, 2, 2);
  EXPECT_TRUE(equal_bits(first.src_of, torch::tensor({0, 2, 1, 5}, at::kInt)));
  EXPECT_TRUE(equal_bits(first.slot_of.view(-1), torch::tensor({0, 2, 1, -1, -1, 3}, at::kInt)));
  const at::Tensor gates = torch::tensor({0.1f, 0.5f, 0.7f, 9.0f, 0.7f, 0.5f}).view({6, 1});
  const DispatchPlan best = dispatch_plan(ids, 2, 2, gates);
  EXPECT_TRUE(equal_bits(best.src_of, torch::tensor({2, 4, 1, 5}, at::kInt)));
  const DispatchPlan tied = dispatch_plan(ids, 2, 1, torch::ones({6, 1}));
  EXPECT_TRUE(equal_bits(tied.src_of, torch::tensor({0, 1}, at::kInt)));
}

TEST(MoEDispatchPlan, N10AlignmentPadsSegments) {
  const at::Tensor ids = torch::tensor({{0}, {2}, {0}, {2}, {0}}, at::kInt);
  const DispatchPlan plan = dispatch_plan(ids, 3, std::nullopt, std::nullopt, 2);
  EXPECT_TRUE(equal_bits(plan.offsets, torch::tensor({0, 4, 4, 6}, at::kInt)));
  EXPECT_TRUE(equal_bits(plan.src_of, torch::tensor({0, 2, 4, -1, 1, 3, -1, -1}, at::kInt)));
  const at::Tensor rows = permute(torch::ones({5, 3}), plan);
  EXPECT_EQ(rows.count_nonzero().item<int64_t>(), 15);
  EXPECT_EQ(rows[3].count_nonzero().item<int64_t>() + rows.narrow(0, 6, 2).count_nonzero().item<int64_t>(), 0);
}

TEST(MoEDispatchPlan, N10CombineAfterPermuteGivesXBack) {
  const at::Tensor x = torch::randn({50, 9}), ids = random_ids(50, 4, 8);
  const DispatchPlan plan = dispatch_plan(ids, 8);
  EXPECT_TRUE(at::allclose(combine(permute(x, plan), torch::full({50, 4}, 0.25), plan), x, 1e-6, 0));
}

TEST(MoEDispatchPlan, N10GradientsAreDifferenceQuotients) {
  const DispatchPlan plan = dispatch_plan(random_ids(6, 2, 3), 3, 3);
  const auto wide = torch::dtype(at::kDouble).requires_grad(true);
  at::Tensor x = torch::randn({6, 4}, wide), gates = torch::randn({6, 2}, wide);
  const auto value = [&] { return combine(permute(x, plan).sin(), gates, plan).square().sum(); };
  const auto grads = torch::autograd::grad({value()}, {x, gates});
  const torch::NoGradGuard no_grad;
  for (const auto& [leaf, grad] : {std::pair<at::Tensor, at::Tensor>{x, grads[0]}, {gates, grads[1]}}) {
    at::Tensor flat = leaf.view(-1);
    for (int64_t e = 0; e < flat.numel(); ++e) {
      const double at = flat[e].item<double>(), h = 1e-6;
      flat[e] = at + h;
      const double above = value().item<double>();
      flat[e] = at - h;
      const double below = value().item<double>();
      flat[e] = at;
      EXPECT_NEAR(grad.view(-1)[e].item<double>(), (above - below) / (2 * h), 1e-7);
    }
  }
}

TEST(MoEDispatchPlan, N10ThreadsGiveTheSameBits) {
  const at::Tensor ids = random_ids(40000, 4, 32), x = torch::randn({40000, 8}), gates = torch::randn({40000, 4});
  const auto run = [&](int threads) {
    const ThreadCount count(threads);
    const DispatchPlan plan = dispatch_plan(ids, 32), limited = dispatch_plan(ids, 32, 3000, gates);
    return std::vector<at::Tensor>{plan.offsets,    plan.slot_of,   plan.src_of,
                                   limited.slot_of, limited.src_of, combine(permute(x, plan), gates, plan)};
  };
  EXPECT_TRUE(equal_bits(run(1), run(2)));
}

TEST(MoEDispatchPlan, ToDense) {
  const RouteResult got = route(torch::randn({9, 5}), {}, {}, torch::arange(9).ne(4));
  const auto [gates, chosen] = to_dense(got.gates, got.ids, 5);
  EXPECT_TRUE(equal_bits(chosen.sum(0).to(at::kInt), got.counts));
  EXPECT_TRUE(at::allclose(gates.sum(1), got.gates.sum(1)));
  EXPECT_EQ(chosen[4].sum().item<int64_t>(), 0);
}

TEST(MoEDispatchPlan, Rejections) {
  const at::Tensor ids = torch::zeros({3, 2}, at::kInt);
  expect_error<c10::ValueError>([&] { dispatch_plan(ids + 7, 4); }, "ids[0, 0] is 7; an id must be in");
  expect_error<c10::ValueError>([&] { dispatch_plan(ids, 4, 0); }, "capacity must be at least 1, got 0");
  expect_error<c10::ValueError>([&] { dispatch_plan(ids, 4, {}, {}, 0); }, "align must be at least 1, got 0");
  expect_error<c10::ValueError>([&] { dispatch_plan(ids, 4, {}, {}, 1 << 30); }, "more rows than 32-bit");
  expect_error<c10::TypeError>([&] { dispatch_plan(ids.to(at::kFloat), 4); }, "ids must be int32 or int64");
  const DispatchPlan plan = dispatch_plan(ids, 4);
  expect_error<c10::ValueError>([&] { permute(torch::zeros({4, 5}), plan); }, "x must be [T = 3, D] for this plan");
  expect_error<c10::ValueError>([&] { combine(torch::zeros({3, 5}), {}, plan); }, "z must be [S = 6, D]");
}

}  // namespace
}  // namespace torch_ext::moe
