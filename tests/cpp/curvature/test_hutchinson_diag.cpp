#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/hutchinson_diag.h>
#include <torch_ext/curvature/hvp.h>
#include <torch_ext/ops/rademacher.h>

#include "support/check.h"
#include "support/problems.h"

namespace torch_ext::curvature {
namespace {

using test::equal_bits;
using test::expect_error;
using test::Problem;
using test::relative_error;
using test::tanh_layer;

TEST(HutchinsonDiag, IsTheMeanOverItsProbes) {
  const Problem p = tanh_layer();
  const auto got = hutchinson_diag(p.loss(p.params), p.params, 3, 42);
  std::vector<at::Tensor> expected;
  for (int64_t s = 0; s < 3; ++s) {
    const auto z = ops::rademacher_probe(p.params, {0, 1, 2}, 42, s, 0);
    const auto hz = hvp(p.loss(p.params), p.params, z);
    for (size_t i = 0; i < z.size(); ++i) {
      if (s == 0) expected.push_back(at::zeros_like(hz[i]));
      expected[i] = expected[i] + z[i] * hz[i] / 3;
    }
  }
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LT(relative_error(got[i], expected[i]), 1e-14);
  EXPECT_TRUE(equal_bits(hutchinson_diag(p.loss(p.params), p.params, 3, 42), got));
  EXPECT_FALSE(test::same_bits(hutchinson_diag(p.loss(p.params), p.params, 3, 43)[0], got[0]));
}

TEST(HutchinsonDiag, IsExactForADiagonalHessian) {
  const at::Tensor x = torch::tensor({1.0, 2.0, -3.0}, at::kDouble).requires_grad_();
  const auto diagonal = hutchinson_diag(x.pow(3).sum(), {x})[0];
  EXPECT_LT(relative_error(diagonal, 6 * x), 1e-15);
  const at::Tensor half = torch::ones({4}, at::kBFloat16).requires_grad_();
  EXPECT_EQ(hutchinson_diag((half * half).sum(), {half})[0].scalar_type(), at::kFloat);
}

TEST(HutchinsonDiag, HasTheDocumentedMeanAndVariance) {
  torch::manual_seed(0);
  const at::Tensor a = torch::randn({6, 6}, at::kDouble), h = torch::mm(a, a.t());
  const at::Tensor x = torch::zeros({6}, at::kDouble).requires_grad_();
  const at::Tensor loss = torch::dot(x, torch::mv(h, x)) / 2;
  constexpr int64_t kDraws = 4000, kSamples = 4;
  at::Tensor sum = at::zeros({6}, at::kDouble), squares = at::zeros({6}, at::kDouble);
  for (int64_t i = 0; i < kDraws; ++i) {
    const at::Tensor d = hutchinson_diag(loss, {x}, kSamples, i)[0];
    sum += d;
    squares += (d - h.diagonal()).square();
  }
  const at::Tensor variance = (h.square().sum(1) - h.diagonal().square()) / kSamples;
  const at::Tensor error = (sum / kDraws - h.diagonal()).abs() / (variance / kDraws).sqrt();
  EXPECT_LT(error.max().item<double>(), 5);  // standard errors
  EXPECT_LT(((squares / kDraws) / variance - 1).abs().max().item<double>(), 0.15);
}

TEST(HutchinsonDiag, BadInput) {
  const at::Tensor x = torch::ones({3}, at::kDouble).requires_grad_();
  expect_error<c10::ValueError>([&] { hutchinson_diag(x.square().sum(), {x}, 0); }, "n_samples must be at least 1");
  expect_error<c10::Error>([&] { hutchinson_diag(x * 2, {x}); }, "one number");
}

}  // namespace
}  // namespace torch_ext::curvature
