// Acceptance test 9 of M-FAC (arXiv:2107.03356) against dense matrices and the published recursion.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/static_fisher.h>

#include <limits>
#include <optional>
#include <tuple>

#include "support/check.h"

namespace torch_ext::curvature {
namespace {

using test::equal_bits;
using test::expect_error;
using test::relative_error;

struct Case {
  int64_t m, d;
  double damping;
  std::optional<int64_t> block;
};

std::vector<Case> cases() {
  return {{8, 60, 1e-3, {}},   {32, 100, 1e-5, {}}, {32, 20, 1e-3, {}},  {64, 300, 1e-6, {}},
          {1, 5, 0.1, {}},     {5, 1, 0.1, {}},     {16, 100, 1e-3, 30}, {16, 100, 1e-3, 7},
          {16, 100, 1e-3, 20}, {30, 90, 1e-3, 30},  {30, 100, 1e-2, 1},  {30, 100, 1e-3, 999}};
}

at::Tensor gradients(int64_t m, int64_t d, uint64_t seed = 0) {
  torch::manual_seed(seed);
  return torch::randn({m, d}, at::kDouble);
}

at::Tensor dense_fisher(const at::Tensor& g, const Case& c) {
  const int64_t d = g.size(1);
  const at::Tensor full = torch::mm(g.t(), g) / g.size(0) + c.damping * torch::eye(d, at::kDouble);
  if (!c.block) return full;
  const at::Tensor number = torch::arange(d).div(*c.block, "floor");
  return torch::where(number.unsqueeze(1) == number.unsqueeze(0), full, 0.0);
}

// h_i = F_{i-1}^-1 g_i and n_i = m + g_i . h_i
std::tuple<at::Tensor, at::Tensor> recursion(const at::Tensor& g, double damping) {
  const int64_t m = g.size(0);
  at::Tensor h = torch::zeros_like(g), n = torch::zeros({m}, at::kDouble);
  for (int64_t i = 0; i < m; ++i) {
    const at::Tensor before = h.narrow(0, 0, i), weights = torch::mv(before, g[i]) / n.narrow(0, 0, i);
    h[i].copy_(g[i] / damping - torch::mv(before.t(), weights));
    n[i].copy_(torch::dot(g[i], h[i]) + m);
  }
  return {h, n};
}

TEST(StaticFisher, Test9EqualsTheDenseInverse) {
  constexpr double kEps = std::numeric_limits<double>::epsilon();
  for (const Case& c : cases()) {
    SCOPED_TRACE(::testing::Message() << c.m << " x " << c.d << ", block " << c.block.value_or(0));
    const at::Tensor g = gradients(c.m, c.d), dense = dense_fisher(g, c), inverse = torch::linalg_inv(dense);
    const double bound = 200 * kEps * torch::linalg_cond(dense).item<double>();
    const StaticFisher fisher(g, c.damping, c.block);
    EXPECT_LT(relative_error(fisher.diag(), inverse.diagonal()), bound);
    const at::Tensor x = gradients(3, c.d, 1);
    EXPECT_LT(relative_error(fisher.mul(x), torch::mm(x, inverse)), bound);
    for (const int64_t i : {int64_t{0}, c.d / 3, c.d - 1}) {
      for (const int64_t j : {int64_t{0}, c.d / 2, c.d - 1}) {
        const double error = std::abs(fisher.element(i, j) - inverse[i][j].item<double>());
        EXPECT_LT(error, bound * inverse.abs().max().item<double>()) << i << ", " << j;
      }
    }
    EXPECT_EQ(fisher.num_grads(), c.m);
    EXPECT_EQ(fisher.dim(), c.d);
    EXPECT_EQ(fisher.block(), std::min(c.block.value_or(c.d), c.d));
  }
}

TEST(StaticFisher, Test9RowsAreThoseOfThePublishedRecursion) {
  for (const Case& c : {Case{8, 60, 1e-3, {}}, Case{32, 100, 1e-5, {}}, Case{64, 300, 1e-3, {}}, Case{1, 7, 0.1, {}}}) {
    const at::Tensor g = gradients(c.m, c.d);
    const auto [h, n] = recursion(g, c.damping);
    const StaticFisher fisher(g, c.damping);
    EXPECT_LT(relative_error(fisher.rows() / std::sqrt(c.damping), h / n.sqrt().unsqueeze(1)), 1e-14);
    EXPECT_LT(relative_error(fisher.factor()[0].diagonal().square() / c.damping, n), 1e-14);
  }
}

TEST(StaticFisher, Test9TheTwoFormsAgree) {
  const at::Tensor g = gradients(30, 40), x = gradients(2, 40, 1);
  const StaticFisher wide(g, 1e-2);  // B > m; padded with zero gradients B <= m, and 1/40 instead of 1/30
  const StaticFisher narrow(torch::cat({g, torch::zeros({10, 40}, at::kDouble)}), 1e-2 * 3 / 4);
  EXPECT_EQ(wide.factor().sizes(), at::IntArrayRef({1, 30, 30}));
  EXPECT_EQ(narrow.factor().sizes(), at::IntArrayRef({1, 40, 40}));
  EXPECT_LT(relative_error(wide.diag() * 4 / 3, narrow.diag()), 1e-11);
  EXPECT_LT(relative_error(wide.mul(x) * 4 / 3, narrow.mul(x)), 1e-11);
}

TEST(StaticFisher, UsesEveryGradientAlsoASingleOne) {
  const at::Tensor g = gradients(1, 9)[0], x = gradients(1, 9, 1)[0];
  const StaticFisher one(g.unsqueeze(0), 0.1);
  const at::Tensor scale = torch::dot(g, g) + 0.1;  // Sherman and Morrison
  EXPECT_LT(relative_error(one.diag(), (1 - g * g / scale) / 0.1), 1e-14);
  EXPECT_LT(relative_error(one.mul(x), (x - g * torch::dot(g, x) / scale) / 0.1), 1e-14);
}

TEST(StaticFisher, ComputesInFloat64AndLeavesItsArgumentsAlone) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor g = gradients(8, 37).to(dtype), x = gradients(2, 37, 1).to(dtype);
    const at::Tensor g_before = g.clone(), x_before = x.clone();
    for (const std::optional<int64_t> block : {std::optional<int64_t>(), std::optional<int64_t>(5)}) {
      const StaticFisher fisher(g, 1e-2, block), exact(g.to(at::kDouble), 1e-2, block);
      EXPECT_TRUE(equal_bits(fisher.diag(), exact.diag().to(at::kFloat)));
      EXPECT_TRUE(equal_bits(fisher.mul(x), exact.mul(x.to(at::kDouble)).to(dtype)));
      EXPECT_EQ(fisher.element(3, 4), exact.element(3, 4));
    }
    EXPECT_TRUE(equal_bits(g, g_before));
    EXPECT_TRUE(equal_bits(x, x_before));
  }
}

TEST(StaticFisherCuda, EqualsTheCpu) {
  if (TORCH_EXT_WITH_CUDA == 0 || !torch::cuda::is_available())
    GTEST_SKIP() << "built without CUDA, or no GPU is visible";
  const at::Tensor g = gradients(8, 37), x = gradients(2, 37, 1);
  for (const std::optional<int64_t> block : {std::optional<int64_t>(), std::optional<int64_t>(5)}) {
    const StaticFisher cpu(g, 1e-2, block), gpu(g.to(at::kCUDA), 1e-2, block);
    EXPECT_LT(relative_error(gpu.diag(), cpu.diag()), 1e-12);
    EXPECT_LT(relative_error(gpu.mul(x.to(at::kCUDA)), cpu.mul(x)), 1e-11);
    EXPECT_LT(relative_error(gpu.rows(), cpu.rows()), 1e-11);
  }
}

TEST(StaticFisher, BadInput) {
  const at::Tensor g = gradients(4, 12);
  expect_error<c10::ValueError>([&] { StaticFisher(g, 0); }, "damping must be positive, got 0");
  expect_error<c10::ValueError>([&] { StaticFisher(g, 0.1, 0); }, "block must be at least 1");
  expect_error<c10::ValueError>([&] { StaticFisher(g[0], 0.1); }, "must be [m, d]");
  expect_error<c10::ValueError>([&] { StaticFisher(g / 0, 0.1); }, "a gradient holds NaN or infinity");
  expect_error<c10::ValueError>([&] { StaticFisher(1e12 * torch::ones({3, 9}), 1e-12); }, "use a larger damping");
  expect_error<c10::TypeError>([&] { StaticFisher(g.to(at::kLong), 0.1); }, "has dtype Long");
  const StaticFisher fisher(g, 0.1);
  expect_error<c10::ValueError>([&] { fisher.mul(g[0].narrow(0, 0, 5)); }, "x must be [..., 12]");
  expect_error<c10::IndexError>([&] { fisher.element(0, 12); }, "outside the matrix");
}

}  // namespace
}  // namespace torch_ext::curvature
