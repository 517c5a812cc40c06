// moe::route. Numbers are those of the method's acceptance list (arXiv:2512.03915), as in
// tests/python/moe/test_route.py.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/moe/route.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "core/math.h"
#include "moe/route/route_functor.h"
#include "support/check.h"

namespace torch_ext::moe {
namespace {

using test::equal_bits;
using test::expect_error;
using test::ThreadCount;

constexpr float kInf = std::numeric_limits<float>::infinity();
const std::vector<std::string> kScores{"sigmoid", "softmax", "sqrtsoftplus", "none", "post_softmax"};

double score_of(const std::string& score, const std::vector<double>& row, size_t e) {
  const double l = row[e];
  if (score == "sigmoid") return 1 / (1 + std::exp(-l));
  if (score == "sqrtsoftplus") return std::sqrt(std::log1p(std::exp(-std::abs(l))) + std::max(l, 0.0));
  if (score != "softmax") return l;
  const double max = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const double x : row) sum += std::exp(x - max);
  return std::exp(l - max) / sum;
}

// What the header says, by a sort in double precision. `sure`: no two of the first K + 1 keys are close.
struct Expected {
  std::vector<int> ids;
  std::vector<double> gates;
  bool sure = true;
};

Expected expected(const at::Tensor& logits, const at::Tensor& bias, const RouteOptions& o) {
  std::vector<double> row, key;
  for (int64_t e = 0; e < logits.size(0); ++e) row.push_back(logits[e].item<double>());
  for (size_t e = 0; e < row.size(); ++e) {
    key.push_back(score_of(o.score(), row, e) + (bias.defined() ? bias[static_cast<int64_t>(e)].item<double>() : 0));
  }
  std::vector<int> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key[size_t(a)] > key[size_t(b)]; });
  Expected result;
  const auto k = static_cast<size_t>(o.top_k());
  for (size_t i = 0; i < std::min(k, row.size() - 1); ++i) {
    const double here = key[size_t(order[i])];
    result.sure = result.sure && here - key[size_t(order[i + 1])] > 2e-6 * std::max(1.0, std::abs(here));
  }
  const bool softmax = o.score() == "post_softmax" || (o.score() == "softmax" && o.normalize() && k > 1);
  double sum = 0;
  for (size_t i = 0; i < k; ++i) {
    const auto e = static_cast<size_t>(order[i]);
    result.ids.push_back(order[i]);
    result.gates.push_back(softmax ? std::exp(row[e]) : score_of(o.score(), row, e));
    sum += result.gates.back();
  }
  for (double& gate : result.gates)
    gate *= o.route_scale() / (softmax ? sum : o.normalize() && k > 1 ? sum + 1e-20 : 1);
  return result;
}

TEST(MoERoute, N1IsASortInDoublePrecision) {
  torch::manual_seed(0);
  int rows = 0, compared = 0;
  for (const auto& score : kScores) {
    for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
      for (const auto& [experts, k] :
           {std::pair<int64_t, int64_t>{37, 5}, {64, 8}, {3, 3}, {1, 1}, {200, 1}, {130, 20}}) {
        const at::Tensor logits = (torch::randn({13, experts}) * 2).to(type);
        const at::Tensor bias = torch::randn({experts}) * 5 - 3;
        const auto options = RouteOptions().top_k(k).score(score).route_scale(2.5);
        const RouteResult got = route(logits, bias, options);
        for (int64_t t = 0; t < 13; ++t, ++rows) {
          const Expected want = expected(logits[t], bias, options);
          if (!want.sure) continue;
          ++compared;
          for (int64_t i = 0; i < k; ++i) {
            ASSERT_EQ(got.ids[t][i].item<int>(), want.ids[size_t(i)]) << score << experts;
            const double gate = want.gates[size_t(i)];
            ASSERT_NEAR(got.gates[t][i].item<double>(), gate, 5e-6 * std::abs(gate) + 1e-30) << score << experts;
          }
        }
        EXPECT_EQ(got.counts.sum().item<int64_t>(), 13 * k);
      }
    }
  }
  EXPECT_GT(compared, 0.9 * rows);
}

TEST(MoERoute, ScoresOfOnePlusMinusTimesDividedAreAccurate) {
  for (double x = -87; x <= 0; x += 0.00713) {
    const auto narrow = static_cast<float>(x);
    const double exact = std::exp(static_cast<double>(narrow));
    EXPECT_NEAR(core::exponential_below(narrow, -87.0f), exact, 2e-7 * exact) << x;
  }
  EXPECT_EQ(core::exponential_below(0.0f, -87.0f), 1);
  EXPECT_EQ(core::exponential_below(-kInf, -87.0f), 0);
  EXPECT_TRUE(std::isnan(core::exponential_below(NAN, -87.0f)));
  for (double l = -40; l <= 40; l += 0.0371) {
    const double sigmoid = 1 / (1 + std::exp(-l)), softplus = std::log1p(std::exp(-std::abs(l))) + std::max(l, 0.0);
    EXPECT_NEAR(kernels::route_sigmoid(l), sigmoid, 2e-15 * sigmoid) << l;
    EXPECT_NEAR(kernels::route_sqrt_softplus(l), std::sqrt(softplus), 2e-15 * std::sqrt(softplus)) << l;
    const double slope = sigmoid / (2 * std::sqrt(softplus));
    EXPECT_NEAR(kernels::route_slope(kernels::RouteScore::kSqrtSoftplus, std::sqrt(softplus)), slope, 4e-15 * slope);
  }
}

TEST(MoERoute, N1GroupsTiesAndSizes) {
  const at::Tensor zeros = torch::zeros({1, 6});
  EXPECT_TRUE(equal_bits(route(zeros, {}, RouteOptions().num_groups(3)).ids, torch::tensor({{0, 1}}, at::kInt)));
  const at::Tensor logits = torch::tensor({{5.0f, 4.0f, -9.0f, -9.0f}});
  const RouteResult negative =
      route(logits, torch::full({4}, -7.0f), RouteOptions().num_groups(2));  // 0 for masked experts would win
  EXPECT_TRUE(equal_bits(negative.ids, torch::tensor({{0, 1}}, at::kInt)));
  const RouteResult empty = route(torch::zeros({0, 6}));
  EXPECT_EQ(empty.gates.sizes(), (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(empty.counts.sum().item<int64_t>(), 0);
  // The two groups with the largest sums of two: groups 0 (3 + 3) and 2 (4 + 2.5), though 1 holds the largest expert.
  const at::Tensor keys = torch::tensor({{3.0f, 3.0f, 5.0f, 0.0f, 4.0f, 2.5f}});
  const RouteResult grouped =
      route(keys, {}, RouteOptions().score("none").num_groups(3).top_groups(2).top_k(3).group_score_k(2));
  EXPECT_TRUE(equal_bits(grouped.ids, torch::tensor({{4, 0, 1}}, at::kInt)));
}

TEST(MoERoute, N2NanAndInfinity) {
  for (const auto& score : kScores) {
    for (const std::string policy : {"propagate", "zero"}) {
      at::Tensor logits = torch::randn({6, 12});
      logits[0].fill_(NAN);
      logits[1][3] = NAN;
      logits[2].fill_(kInf);
      logits[3].fill_(-kInf);
      logits.set_requires_grad(true);
      const at::Tensor valid = torch::tensor({true, true, true, true, true, false});
      const RouteResult got = route(logits, {}, RouteOptions().top_k(4).score(score).nan_policy(policy), valid);
      for (int64_t t = 0; t < 5; ++t) {
        std::set<int> ids;
        for (int64_t k = 0; k < 4; ++k) ids.insert(got.ids[t][k].item<int>());
        EXPECT_EQ(ids.size(), 4U);
        EXPECT_GE(*ids.begin(), 0);
        EXPECT_LT(*ids.rbegin(), 12);
      }
      EXPECT_TRUE(got.ids[5].eq(-1).all().item<bool>());
      EXPECT_EQ(got.counts.sum().item<int64_t>(), 20);
      const at::Tensor bad = got.gates.narrow(0, 0, 2);
      EXPECT_TRUE((policy == "zero" ? bad.eq(0) : bad.isnan()).all().item<bool>());
      got.gates.sum().backward();
      const at::Tensor grad = logits.grad().narrow(0, 0, 2);
      EXPECT_TRUE(policy == "zero" ? grad.eq(0).all().item<bool>() : grad.isnan().any().item<bool>()) << score;
      EXPECT_TRUE(logits.grad().narrow(0, 4, 2).isfinite().all().item<bool>());
    }
  }
}

// First and second derivative against difference quotients, ids fixed by well separated logits.
TEST(MoERoute, N3Derivatives) {
  torch::manual_seed(1);
  for (const auto& score : kScores) {
    for (const bool normalize : {true, false}) {
      if (score == "post_softmax" && !normalize) continue;
      at::Tensor logits =
          (torch::stack({torch::randperm(7), torch::randperm(7), torch::randperm(7)}).to(at::kDouble) * 0.4)
              .sub(0.7)
              .set_requires_grad(true);
      const at::Tensor weight = torch::randn({3, 3}, at::kDouble), direction = torch::randn({3, 7}, at::kDouble);
      const auto value = [&](const at::Tensor& x) {
        const auto options = RouteOptions().top_k(3).score(score).normalize(normalize).route_scale(1.7);
        return (route(x, {}, options).gates.square() * weight).sum();
      };
      const auto first = [&](const at::Tensor& x, bool graph) {
        return torch::autograd::grad({value(x)}, {x}, {}, graph, graph)[0];
      };
      const at::Tensor gradient = first(logits, true);
      const at::Tensor second = torch::autograd::grad({(gradient * direction).sum()}, {logits})[0];
      const double h = 1e-6;
      const at::Tensor plain = first(logits, false);
      EXPECT_LT((plain - gradient).abs().max().item<double>(), 1e-14) << score;
      for (int64_t e = 0; e < 21; ++e) {
        at::Tensor step = torch::zeros({21}, at::kDouble);
        step[e] = h;
        step = step.view({3, 7});
        const at::Tensor up = (logits.detach() + step).set_requires_grad(true);
        const at::Tensor down = (logits.detach() - step).set_requires_grad(true);
        EXPECT_NEAR(plain.view(-1)[e].item<double>(), ((value(up) - value(down)) / (2 * h)).item<double>(), 1e-8);
        const double quotient = ((first(up, false) - first(down, false)) * direction).sum().item<double>() / (2 * h);
        EXPECT_NEAR(second.view(-1)[e].item<double>(), quotient, 1e-7) << score << normalize;
      }
      if (score == "softmax" && !normalize) continue;
      const at::Tensor outside =
          torch::ones({3, 7}).scatter(1, route(logits, {}, RouteOptions().top_k(3).score(score)).ids.to(at::kLong), 0);
      EXPECT_EQ((plain * outside).count_nonzero().item<int64_t>(), 0);
    }
  }
}

TEST(MoERoute, N9LoadsAreCountedOnceAndWhereTheOptionSays) {
  const at::Tensor logits = torch::randn({10, 6}, torch::requires_grad());
  const auto total = [](const at::Tensor& load) { return load.sum().item<int64_t>(); };
  for (const auto& [count_in, forward, backward] :
       {std::tuple<std::string, int64_t, int64_t>{"backward", 0, 20}, {"forward", 20, 20}, {"manual", 0, 0}}) {
    const at::Tensor load = torch::zeros({6}, at::kLong);
    const RouteResult got = route(logits, {}, RouteOptions().count_in(count_in), {}, load);
    EXPECT_EQ(total(load), forward);
    for (int i = 0; i < 2; ++i) {
      const auto grads = torch::autograd::grad({got.gates.square().sum()}, {logits}, {}, true, true);
      torch::autograd::grad({grads[0].square().sum()}, {logits}, {}, true);
    }
    EXPECT_EQ(total(load), backward);
    if (backward > 0) {
      EXPECT_TRUE(equal_bits(load, got.counts.to(at::kLong)));
    }
    const torch::NoGradGuard no_grad;
    route(logits, {}, RouteOptions().count_in(count_in), {}, load);
    EXPECT_EQ(total(load), backward + forward);
  }
}

TEST(MoERoute, HistogramCountsDistancesToTheCutoff) {
  const at::Tensor logits = torch::randn({50, 6}, torch::requires_grad()), bias = torch::randn({6}) * 0.1;
  const RouteHistogram histogram{torch::zeros({6, 20}, at::kLong), torch::tensor({-1.5f, 1.5f})};
  const RouteResult got = route(logits, bias, RouteOptions().top_k(2), {}, {}, histogram);
  EXPECT_EQ(histogram.counts.sum().item<int64_t>(), 0);
  got.gates.sum().backward();
  EXPECT_TRUE(histogram.counts.sum(1).eq(50).all().item<bool>());
  const at::Tensor keys = torch::sigmoid(logits) + bias;
  EXPECT_LT((std::get<0>(keys.sort(1, true)).select(1, 2) - got.cutoff).abs().max().item<double>(), 1e-6);
}

TEST(MoERoute, ThreadsGiveTheSameBits) {
  const at::Tensor logits = torch::randn({5000, 40});
  const auto run = [&](int threads) {
    const ThreadCount count(threads);
    const at::Tensor leaf = logits.clone().set_requires_grad(true);
    const RouteResult got = route(leaf, {}, RouteOptions().top_k(4));
    got.gates.square().sum().backward();
    return std::vector<at::Tensor>{got.gates, got.ids, got.counts, leaf.grad()};
  };
  EXPECT_TRUE(equal_bits(run(1), run(2)));
}

TEST(MoERoute, Rejections) {
  const at::Tensor logits = torch::randn({4, 6});
  const auto refused = [&](const RouteOptions& options, const char* text) {
    expect_error<c10::ValueError>([&] { route(logits, {}, options); }, text);
  };
  refused(RouteOptions().top_k(0), "top_k must be in [1, E = 6], got 0");
  refused(RouteOptions().top_k(7), "top_k must be in [1, E = 6], got 7");
  refused(RouteOptions().num_groups(4), "num_groups must divide the number of experts, 6; got 4");
  refused(RouteOptions().num_groups(3).top_k(3), "hold fewer than top_k = 3");
  refused(RouteOptions().num_groups(3).group_score_k(3), "group_score_k must be in [1, 2]");
  refused(RouteOptions().score("relu"), "score must be 'sigmoid'");
  refused(RouteOptions().nan_policy("no"), "nan_policy must be");
  refused(RouteOptions().count_in("no"), "count_in must be");
  expect_error<c10::TypeError>([&] { route(torch::zeros({4, 6}, at::kLong)); }, "logits has dtype Long");
  expect_error<c10::TypeError>([&] { route(logits, torch::zeros({6}, at::kBFloat16)); }, "bias must be Float");
  expect_error<c10::ValueError>([&] { route(logits, torch::zeros({5})); }, "bias must be [E = 6]");
  const RouteHistogram histogram{torch::zeros({6, 5}, at::kLong), torch::zeros({2})};
  expect_error<c10::ValueError>([&] { route(logits, {}, RouteOptions().top_k(6), {}, {}, histogram); },
                                "(top_k + 1)-th key");
  expect_error<c10::ValueError>([&] { route(logits, {}, RouteOptions().num_groups(2), {}, {}, histogram); },
                                "not defined with groups");
}

}  // namespace
}  // namespace torch_ext::moe
