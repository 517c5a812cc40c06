// ops::snell_linear and snell_merge. Numbers are those of the method's acceptance list (arXiv:2411.01800), as in
// tests/python/ops/test_snell.py.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/ops/snell.h>

#include <array>
#include <cmath>

#include "support/allocations.h"
#include "support/check.h"

namespace torch_ext::ops {
namespace {

using test::equal_bits;
using test::expect_error;
using test::relative_error;
using test::ThreadCount;

const std::vector<std::string> kRules{"code", "paper", "hard", "soft", "none"};

struct Factors {
  at::Tensor a, b;
};

Factors factors(int64_t rows, int64_t columns, int64_t rank, at::ScalarType type = at::kFloat, double scale = 1) {
  torch::manual_seed(1);
  const auto make = [&](int64_t n) { return (torch::rand({2, n, rank / 2}, type) * 2 - 1) * scale; };
  return {make(rows), make(columns)};
}

// W as the header has it.
at::Tensor dense(const Factors& f, double scale) {
  const auto distance = [](const at::Tensor& a, const at::Tensor& b) {
    return (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1).sqrt();
  };
  return (distance(f.a[0], f.b[0]) - distance(f.a[1], f.b[1])) * scale;
}

std::vector<at::Tensor> gradients(const at::Tensor& x, const Factors& f, const at::Tensor& dy, double sparsity,
                                  const std::string& rule, const std::string& grad) {
  const auto leaves = test::fresh_leaves(
      {x.detach().set_requires_grad(true), f.a.detach().set_requires_grad(true), f.b.detach().set_requires_grad(true)});
  const auto [y, t] = snell_linear(leaves[0], leaves[1], leaves[2], 0.1, sparsity, rule, grad);
  return torch::autograd::grad({y}, leaves, {dy});
}

TEST(Snell, N1TinyExactCase) {
  const auto wide = at::TensorOptions(at::kDouble);
  const at::Tensor a = torch::tensor({0, 0, 1, 0, 0, 2, 1, 1, 0, 0, 2, 1}, wide).view({2, 3, 2});
  const at::Tensor b = torch::tensor({1, 1, 0, 0, 0, 1, 1, 0}, wide).view({2, 2, 2});
  const auto expect = [&](const char* rule, double t, const std::vector<double>& phi) {
    const auto [y, threshold] = snell_linear(torch::eye(3, wide), a, b, 0.1, 0.5, rule);
    EXPECT_NEAR(threshold.item<double>(), t, 1e-8);
    EXPECT_LT((y - torch::tensor(phi, wide).view({3, 2})).abs().max().item<double>(), 1e-8) << rule;
    EXPECT_TRUE(equal_bits(y, snell_merge(a, b, 0.1, 0.5, rule)));
  };
  expect("code", 0.05, {0, -.01, 0, 0, -.00343146, .00343146});
  expect("paper", 0.04142136, {0, -.00585786, 0, 0, -.00100505, .00100505});
  expect("none", 0, {.04142136, -.1, 0, 0, -.05857864, .05857864});
}

TEST(Snell, N2ExactGradientIsTheDifferenceQuotient) {
  Factors f = factors(6, 5, 4, at::kDouble, 3);
  const at::Tensor x = torch::randn({7, 6}, at::kDouble), dy = torch::randn({7, 5}, at::kDouble);
  for (const auto& rule : kRules) {
    const auto grads = gradients(x, f, dy, 0.5, rule, "exact");
    const auto value = [&] {
      return (std::get<0>(snell_linear(x, f.a, f.b, 0.1, 0.5, rule)) * dy).sum().item<double>();
    };
    const std::array<at::Tensor, 3> inputs{x, f.a, f.b};
    for (size_t i = 0; i < inputs.size(); ++i) {
      at::Tensor flat = inputs[i].view(-1);
      for (int64_t e = 0; e < flat.numel(); ++e) {
        const double at = flat[e].item<double>(), h = 1e-6;
        flat[e] = at + h;
        const double above = value();
        flat[e] = at - h;
        const double below = value();
        flat[e] = at;
        EXPECT_NEAR(grads[i].view(-1)[e].item<double>(), (above - below) / (2 * h), 1e-7) << rule << ' ' << i;
      }
    }
  }
}

TEST(Snell, N2DetachedIsTheComposedVersionOfThePublishedCode) {
  const Factors f = factors(60, 130, 8, at::kDouble);
  const at::Tensor x = torch::randn({9, 60}, at::kDouble), dy = torch::randn({9, 130}, at::kDouble);
  const auto got = gradients(x, f, dy, 0.9, "code", "detached");
  const auto leaves = test::fresh_leaves(
      {x.clone().set_requires_grad(true), f.a.clone().set_requires_grad(true), f.b.clone().set_requires_grad(true)});
  const at::Tensor w = dense({leaves[1], leaves[2]}, 0.1);
  const at::Tensor size = w.abs().detach(), above = size > at::quantile(size, 0.9);
  const auto want = torch::autograd::grad({leaves[0].matmul(w * size * above)}, leaves, {dy});
  for (size_t i = 0; i < want.size(); ++i) EXPECT_LT(relative_error(got[i], want[i]), 1e-12) << i;
}

TEST(Snell, N3CountsAreExactAndTheUpdateIsHomogeneous) {
  const Factors f = factors(100, 70, 8, at::kDouble);
  const double entries = 7000;
  for (const double s : {0.0, 0.1, 0.5, 0.9, 0.995}) {
    EXPECT_EQ(snell_merge(f.a, f.b, 0.1, s, "paper").count_nonzero().item<double>(), entries - std::ceil(s * entries));
    EXPECT_EQ(snell_merge(f.a, f.b, 0.1, s).count_nonzero().item<double>(),
              entries - 1 - std::floor(s * (entries - 1)));
  }
  const at::Tensor merged = snell_merge(f.a, f.b, 0.1, 0.9), order = torch::randperm(100);
  EXPECT_TRUE(equal_bits(snell_merge(f.a.index_select(1, order), f.b, 0.1, 0.9), merged.index_select(0, order)));
  EXPECT_TRUE(equal_bits(snell_merge(f.a * 4, f.b * 4, 0.1, 0.9), merged * 16));
}

TEST(Snell, N4FullRankAndMergedProduct) {
  const Factors f = factors(64, 64, 8);
  EXPECT_EQ(at::linalg_matrix_rank(snell_merge(f.a, f.b, 0.1, 0, "none").to(at::kDouble), 1e-9, true).item<int64_t>(),
            64);
  const at::Tensor x = torch::randn({20, 64});
  for (const auto& rule : kRules) {
    EXPECT_LT(relative_error(std::get<0>(snell_linear(x, f.a, f.b, 0.1, 0.9, rule)),
                             x.matmul(snell_merge(f.a, f.b, 0.1, 0.9, rule))),
              1e-6);
  }
}

// 768 x 3072: outputs and returned gradients excluded, at most 8 rank (in + out) bytes and two tiles; nothing of the
// size of W.
TEST(Snell, N5MemoryStaysBelowTheBound) {
  constexpr int64_t kRows = 768, kColumns = 3072, kRank = 8, kN = 32, kTileBytes = 384 * 512 * 4;
  const Factors f = factors(kRows, kColumns, kRank);
  const at::Tensor x = torch::randn({kN, kRows}), dy = torch::randn({kN, kColumns});
  for (const char* grad : {"detached", "exact"}) {
    for (const char* rule : {"code", "paper"}) {
      gradients(x, f, dy, 0.9, rule, grad);  // one-time allocations
      const auto leaves =
          std::vector<at::Tensor>{x.detach().set_requires_grad(true), f.a.detach().set_requires_grad(true),
                                  f.b.detach().set_requires_grad(true)};
      const test::Allocations watch;
      const auto [y, t] = snell_linear(leaves[0], leaves[1], leaves[2], 0.1, 0.9, rule, grad);
      const auto grads = torch::autograd::grad({y}, leaves, {dy});
      const int64_t returned = 4 * (kN * (kRows + kColumns) + kRank * (kRows + kColumns));
      EXPECT_LE(watch.peak() - returned, 8 * kRank * (kRows + kColumns) + 2 * kTileBytes) << rule << grad;
      EXPECT_LT(watch.largest(), kRows * kColumns * 4 / 2) << rule << grad;
    }
  }
}

TEST(Snell, N7ThresholdIsTheOrderStatistic) {
  for (const auto type : {at::kFloat, at::kDouble}) {
    Factors f = factors(700, 600, 4, type);
    const std::vector<Factors> cases{f,
                                     {f.a * torch::logspace(-12, 6, 700, 10, type).view({1, 700, 1}), f.b},
                                     {torch::zeros_like(f.a), torch::ones_like(f.b)},
                                     {f.a * 1e-17, f.b * 1e-17}};
    for (const Factors& g : cases) {
      const at::Tensor size = snell_merge(g.a, g.b, 0.1, 0, "none").abs().flatten();
      for (const double s : {1e-9, 0.25, 0.5, 0.9, 0.9999999}) {
        const auto [y, t] = snell_linear(torch::ones({1, 700}, type), g.a, g.b, 0.1, s, "hard");
        const auto k = static_cast<int64_t>(std::ceil(s * static_cast<double>(size.numel())));
        EXPECT_TRUE(equal_bits(t, std::get<0>(size.kthvalue(k)))) << s;
        EXPECT_TRUE(y.isfinite().all().item<bool>());
      }
    }
  }
}

TEST(Snell, N7MoreThan2To24Entries) {
  const Factors f = factors(5000, 5000, 4);
  const at::Tensor size = snell_merge(f.a, f.b, 0.1, 0, "none").abs().flatten();
  const auto t = std::get<1>(snell_linear(torch::ones({1, 5000}), f.a, f.b, 0.1, 0.9, "paper"));
  EXPECT_TRUE(equal_bits(t, std::get<0>(size.kthvalue(22500000))));
}

TEST(Snell, ThreadsDoNotChangeTheBits) {
  const Factors f = factors(600, 530, 8);
  for (const int64_t n : {1, 30, 700}) {
    const at::Tensor x = torch::randn({n, 600}), dy = torch::randn({n, 530});
    std::vector<std::vector<at::Tensor>> results;
    for (const int threads : {1, 2}) {
      const ThreadCount guard(threads);
      results.push_back(gradients(x, f, dy, 0.7, "paper", "exact"));
      results.back().push_back(std::get<0>(snell_linear(x, f.a, f.b, 0.1, 0.7)));
    }
    EXPECT_TRUE(equal_bits(results[0], results[1])) << n;
  }
}

TEST(Snell, BadInput) {
  const at::Tensor x = torch::ones({5, 3}), a = torch::ones({2, 3, 2}), b = torch::zeros({2, 4, 2});
  expect_error<c10::ValueError>([&] { snell_linear(x, a, b, 0.1, 1.0); }, "sparsity must be in [0, 1), got 1");
  expect_error<c10::ValueError>([&] { snell_linear(x, a, b, NAN, 0.5); }, "scale must be finite");
  expect_error<c10::ValueError>([&] { snell_linear(x, a, b, 0.1, 0.5, "top"); }, "sparsifier must be 'code'");
  expect_error<c10::ValueError>([&] { snell_linear(x, a, b, 0.1, 0.5, "code", "true"); }, "grad must be");
  expect_error<c10::ValueError>([&] { snell_linear(x, b, b, 0.1, 0.5); },
                                "x must be [..., in_features = 4], got [5, 3]");
  expect_error<c10::ValueError>([&] { snell_linear(x, a, torch::ones({2, 4, 3}), 0.1, 0.5); }, "same last dimension");
  expect_error<c10::ValueError>([&] { snell_merge(a[0], b, 0.1, 0.5); }, "A must be [2, in_features, rank / 2]");
  expect_error<c10::ValueError>([&] { snell_merge(a * NAN, b, 0.1, 0.5); }, "A holds a NaN or an infinity");
  expect_error<c10::TypeError>([&] { snell_linear(x.to(at::kLong), a, b, 0.1, 0.5); }, "x has dtype Long");
  expect_error<c10::TypeError>([&] { snell_linear(x.to(at::kDouble), a, b, 0.1, 0.5); }, "float64 goes with float64");
}

}  // namespace
}  // namespace torch_ext::ops
