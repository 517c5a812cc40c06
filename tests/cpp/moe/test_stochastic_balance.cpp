// Online assignment: closed forms, exact values, replicates, the triangle, tokens to experts, bits. Numbers in the
// names are those of the method's acceptance list; what needs an LP solver is in the Python tests.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/moe/stochastic_balance.h>

#include <cmath>
#include <string>
#include <vector>

#include "support/check.h"

namespace torch_ext::moe {
namespace {

using test::equal_bits;
using test::expect_error;
using test::ThreadCount;

const std::vector<std::string>& rules() {
  static const std::vector<std::string> names{"discount", "balance", "load", "greedy"};
  return names;
}

at::Tensor doubles(at::IntArrayRef shape, double value) { return at::full(shape, value, at::kDouble); }

at::Tensor random_graph(uint64_t seed, int64_t n, int64_t m) {
  torch::manual_seed(seed);
  const at::Tensor p = torch::rand({n, m}, at::kDouble) * 0.5;
  return p * torch::rand({n, m}, at::kDouble).lt(0.7);
}

// Phase i: `copies` arrivals adjacent to the servers 0 ... m-1-i.
at::Tensor triangle(int64_t m, int64_t copies, double p) {
  const at::Tensor phases = at::ones({m, m}, at::kDouble).tril().flip(0) * p;
  return phases.repeat_interleave(copies, 0);
}

TEST(StochasticBalance, Test1OneServer) {
  for (const std::string& rule : rules()) {
    const double exact =
        stochastic_balance_exact(doubles({10, 1}, 0.1), std::nullopt, std::nullopt, BalanceOptions().rule(rule));
    EXPECT_NEAR(exact, 1 - std::pow(0.9, 10), 1e-15);
    EXPECT_NEAR(exact, 0.6513215599, 1e-10);
  }
  EXPECT_NEAR(fluid_lp_equal_p(at::ones({4, 1}, at::kBool), 0.1), 0.4, 1e-12);
  EXPECT_NEAR(fluid_lp_equal_p(at::ones({16, 1}, at::kBool), 0.1), 1.0, 1e-12);
}

TEST(StochasticBalance, Test2CompleteGraph) {
  const int m = 4, n = 9;
  const double p = 0.3;
  double closed = 0, choose = 1;
  for (int k = 0; k <= n; ++k) {
    closed += std::min(m, k) * choose * std::pow(p, k) * std::pow(1 - p, n - k);
    choose = choose * (n - k) / (k + 1);
  }
  for (const std::string& rule : rules()) {
    const double exact =
        stochastic_balance_exact(doubles({n, m}, p), std::nullopt, std::nullopt, BalanceOptions().rule(rule));
    EXPECT_NEAR(exact, closed, 1e-14);
    EXPECT_NEAR(exact, 2.5711528950, 1e-10);
  }
}

TEST(StochasticBalance, Test3NoRuleExceedsTheOptimum) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const at::Tensor p = random_graph(seed, 7, 3);
    const double optimum = stochastic_optimum(p);
    EXPECT_LE(optimum, 3.0);
    for (const std::string& rule : rules()) {
      EXPECT_LE(stochastic_balance_exact(p, std::nullopt, std::nullopt, BalanceOptions().rule(rule)), optimum + 1e-12);
    }
  }
  // One arrival of two servers: the optimum takes the larger p w; then a certain one.
  const at::Tensor two = torch::tensor({{0.5, 0.25}, {0.5, 0.0}}, at::kDouble);
  EXPECT_DOUBLE_EQ(stochastic_optimum(two), 0.25 + 0.5);  // 0.5 + 0.5 * 0.5 as well
  EXPECT_DOUBLE_EQ(stochastic_optimum(two, torch::tensor({1.0, 3.0}, at::kDouble)), 0.75 + 0.5);
}

TEST(StochasticBalance, Test4ReplicatesAverageToTheExactValue) {
  const at::Tensor p = random_graph(5, 12, 4), weight = torch::tensor({1.0, 0.5, 2.0, 1.5}, at::kDouble);
  for (const std::string& rule : rules()) {
    const auto options = BalanceOptions().rule(rule).seed(7).replicates(100000);
    const at::Tensor value = stochastic_balance(p, weight, std::nullopt, options).value;
    const double error = value.std().item<double>() / std::sqrt(1e5);
    EXPECT_LT(std::abs(value.mean().item<double>() - stochastic_balance_exact(p, weight, std::nullopt, options)),
              4 * error)
        << rule;
  }
}

TEST(StochasticBalance, Test5Triangle) {
  const at::Tensor p = triangle(10, 100, 0.01);
  const auto share = [&](const std::string& rule) {
    const auto options = BalanceOptions().rule(rule).replicates(400).seed(1);
    return stochastic_balance(p, std::nullopt, std::nullopt, options).value.mean().item<double>() / 10;
  };
  EXPECT_NEAR(share("balance"), 0.635, 0.025);
  EXPECT_LT(share("greedy"), 0.54);
}

TEST(StochasticBalance, Test7TriangleWithCapacities) {
  const int64_t m = 8, b = 25;
  const at::Tensor p = triangle(m, 2 * b, 0.5), capacity = at::full({m}, b, at::kLong);
  const auto share = [&](const BalanceOptions& options) {
    return stochastic_balance(p, std::nullopt, capacity, options).value.mean().item<double>() / (m * b);
  };
  EXPECT_GE(share(BalanceOptions().replicates(100)), 0.63);
  EXPECT_LT(share(BalanceOptions().rule("greedy").replicates(100)), 0.54);
}

TEST(StochasticBalance, Test8TokensToExperts) {
  torch::manual_seed(0);
  const int64_t tokens = 512, experts = 16, k = 2;
  const at::Tensor scores =
      torch::sigmoid(torch::randn({tokens, experts}, at::kDouble) + torch::randn({experts}, at::kDouble));
  const at::Tensor capacity = at::full({experts}, tokens * k / experts, at::kLong), one = at::ones_like(scores);
  const auto options = BalanceOptions().top_k(k).overflow("spill");
  const BalanceResult run = stochastic_balance(one, scores, capacity, options);
  EXPECT_TRUE(run.choice.ge(0).all().item<bool>());
  EXPECT_TRUE(run.choice.select(-1, 0).ne(run.choice.select(-1, 1)).all().item<bool>());
  EXPECT_LE(run.load.max().item<double>(), 1.15);
  const BalanceResult part = stochastic_balance(one.slice(0, 0, 99), scores.slice(0, 0, 99), capacity, options);
  EXPECT_TRUE(equal_bits(part.choice, run.choice.slice(1, 0, 99)));
  const BalanceResult top =
      stochastic_balance(one, scores, at::full({experts}, tokens, at::kLong), BalanceOptions().rule("greedy").top_k(k));
  EXPECT_TRUE(top.choice[0].to(at::kLong).equal(std::get<1>(at::topk(scores, k))));
}

TEST(StochasticBalance, Test9ThreadsDoNotChangeTheBits) {
  const at::Tensor p = at::stack({random_graph(0, 20, 6), random_graph(1, 20, 6), random_graph(2, 20, 6)});
  std::vector<std::vector<at::Tensor>> runs;
  for (const int threads : {1, 2}) {
    const ThreadCount guard(threads);
    const BalanceResult run = stochastic_balance(p, std::nullopt, std::nullopt, BalanceOptions().replicates(5));
    runs.push_back({run.choice, run.success, run.load, run.value});
  }
  EXPECT_TRUE(equal_bits(runs[0], runs[1]));
}

TEST(StochasticBalance, Test9CudaChoosesAlike) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no GPU on this machine";
  for (const int64_t m : {3, 40, 100}) {
    const at::Tensor p = random_graph(3, 50, m), capacity = at::full({m}, 2, at::kLong);
    for (const std::string& rule : rules()) {
      const auto options = BalanceOptions().rule(rule).top_k(2).overflow("spill").replicates(4);
      const BalanceResult host = stochastic_balance(p, std::nullopt, capacity, options);
      const BalanceResult device = stochastic_balance(p.cuda(), std::nullopt, capacity, options);
      EXPECT_TRUE(equal_bits({host.choice, host.success, host.load, host.value},
                             {device.choice, device.success, device.load, device.value}))
          << rule;
    }
  }
}

TEST(StochasticBalance, AssignerRepeatsTheOperator) {
  torch::manual_seed(1);
  const at::Tensor p = torch::rand({60, 5}, at::kDouble), capacity = at::full({5}, 4, at::kLong);
  for (const std::string& rule : rules()) {
    const auto options = BalanceOptions().rule(rule);
    const BalanceResult run = stochastic_balance(p, std::nullopt, capacity, options);
    OnlineAssigner assigner(5, std::nullopt, capacity, options);
    for (int64_t v = 0; v < 60; ++v) {
      const int64_t server = assigner.assign(p[v]);
      EXPECT_EQ(server, run.choice[0][v][0].item<int64_t>());
      if (server >= 0) assigner.report(server, run.success[0][v][0].item<bool>());
    }
    EXPECT_TRUE(equal_bits(assigner.load, run.load[0]));
  }
}

TEST(StochasticBalance, RefusesBadInput) {
  const at::Tensor p = doubles({4, 3}, 0.5);
  const auto refuse = [&](const BalanceOptions& options, const std::string& text) {
    expect_error<c10::ValueError>([&] { stochastic_balance(p, std::nullopt, std::nullopt, options); }, text);
  };
  refuse(BalanceOptions().rule("random"), "rule must be");
  refuse(BalanceOptions().g("log"), "g must be");
  refuse(BalanceOptions().g("table"), "needs a table [points, 2]");
  refuse(BalanceOptions().g("table").table(torch::tensor({{0.0, 0.5}, {1.0, 0.4}}, at::kDouble)), "not decrease");
  refuse(BalanceOptions().top_k(4), "top_k must be in [1, 3]");
  refuse(BalanceOptions().overflow("queue"), "overflow must be");
  refuse(BalanceOptions().replicates(0), "replicates must be");
  expect_error<c10::ValueError>([&] { stochastic_balance(doubles({4, 3}, 1.5)); }, "must lie in [0, 1]");
  expect_error<c10::ValueError>([&] { stochastic_balance(doubles({4, 3}, NAN)); }, "must lie in [0, 1]");
  expect_error<c10::ValueError>([&] { stochastic_balance(p, doubles({3}, -1)); }, "finite and not negative");
  expect_error<c10::ValueError>([&] { stochastic_balance(p, std::nullopt, at::zeros({3}, at::kLong)); },
                                "capacities must be at least 1");
  expect_error<c10::TypeError>([&] { stochastic_balance(p, std::nullopt, doubles({3}, 1)); },
                               "capacity must be integers");
  expect_error<c10::ValueError>([&] { stochastic_balance_exact(doubles({17, 2}, 0.5)); }, "at most 16 arrivals");
  expect_error<c10::ValueError>([&] { stochastic_optimum(doubles({2, 17}, 0.5)); }, "at most 16 servers");
}

}  // namespace
}  // namespace torch_ext::moe
