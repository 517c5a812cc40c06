#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/nn/sinkhorn_loss.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include <sstream>

#include "support/check.h"

namespace torch_ext::nn {
namespace {

using test::equal_bits;
using test::expect_error;

TEST(SinkhornLoss, IsTheValueOfTheOperator) {
  torch::manual_seed(0);
  const at::Tensor x = torch::rand({9, 2}, at::kDouble), y = torch::rand({7, 2}, at::kDouble);
  const at::Tensor a = torch::full({9}, 1.0 / 9, at::kDouble), b = torch::full({7}, 1.0 / 7, at::kDouble);
  SinkhornLoss loss(0.1);
  const at::Tensor C = 0.5 * (x.unsqueeze(1) - y).square().sum(-1);
  const at::Tensor expected = ops::sinkhorn_newton(C, a, b, ops::SinkhornOptions(0.1)).value;
  EXPECT_LT((loss(x, y) - expected).abs().item<double>(), 1e-10);
  EXPECT_LT((loss(x, y, a, b) - expected).abs().item<double>(), 1e-10);
}

TEST(SinkhornLoss, DebiasedIsZeroForEqualCloudsAndPullsOthersTogether) {
  torch::manual_seed(0);
  const at::Tensor y = torch::rand({3, 30, 2}, at::kDouble);
  at::Tensor x = (y.flip(1) + torch::tensor({1.0, -0.5}, at::kDouble)).requires_grad_();
  SinkhornLoss loss(0.05, /*debias=*/true);
  EXPECT_LT(loss(y, y.flip(1)).abs().max().item<double>(), 1e-8);
  const at::Tensor value = loss(x, y);
  EXPECT_LT((value - 0.5 * 1.25).abs().max().item<double>(), 1e-6);  // half the squared length of the shift
  value.sum().backward();
  EXPECT_LT((30 * x.grad() - torch::tensor({1.0, -0.5}, at::kDouble)).abs().max().item<double>(), 1e-4);
}

TEST(SinkhornLoss, PrintsAndChecks) {
  std::ostringstream text;
  text << SinkhornLoss(0.5, true);
  EXPECT_EQ(text.str(), "torch_ext::nn::SinkhornLoss(eps=0.5, debias=true)");
  expect_error<c10::ValueError>([] { SinkhornLoss loss(0.0); }, "SinkhornLoss: eps must be a finite number > 0");
  SinkhornLoss loss(0.1);
  expect_error<c10::ValueError>([&] { loss(torch::rand({3}), torch::rand({3, 1})); }, "points must be [..., n, d]");
  expect_error<c10::ValueError>([&] { loss(torch::rand({3, 2}), torch::rand({3, 1})); }, "x must be [..., n, d]");
}

}  // namespace
}  // namespace torch_ext::nn
