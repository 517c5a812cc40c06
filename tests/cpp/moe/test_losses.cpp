#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/moe/losses.h>

#include <cmath>

#include "support/check.h"

namespace torch_ext::moe {
namespace {

using test::expect_error;

TEST(MoELosses, PerfectBalanceCostsTheCoefficient) {
  EXPECT_NEAR(balance_loss(torch::zeros({8, 4}), torch::full({4}, 5, at::kInt), 0.01).item<double>(), 0.01, 1e-8);
  const at::Tensor sequence = (torch::eye(4) * 9).repeat({2, 1}).unsqueeze(0);
  EXPECT_NEAR(sequence_loss(sequence, 1, 0.5).item<double>(), 0.5, 1e-6);
  EXPECT_NEAR(z_loss(torch::zeros({3, 4}), 2).item<double>(), 2 * std::log(4.0) * std::log(4.0), 1e-6);
}

TEST(MoELosses, AreTheirFormulas) {
  const at::Tensor l = torch::randn({2, 5, 4}, at::kDouble),
                   valid = torch::tensor({{1, 1, 1, 0, 0}, {1, 0, 1, 1, 1}}).to(at::kBool);
  double by_sequence = 0, by_z = 0;
  for (int64_t b = 0; b < 2; ++b) {
    std::vector<double> f(4), p(4);
    const auto rows = valid[b].sum().item<double>();
    for (int64_t s = 0; s < 5; ++s) {
      if (!valid[b][s].item<bool>()) continue;
      const at::Tensor score = torch::sigmoid(l[b][s]), order = score.argsort(0, true);
      for (size_t e = 0; e < 4; ++e) p[e] += (score / score.sum())[int64_t(e)].item<double>() / rows;
      for (int64_t k = 0; k < 2; ++k) f[size_t(order[k].item<int64_t>())] += 4 / (2 * rows);
      by_z += std::pow(l[b][s].logsumexp(0).item<double>(), 2) / 7;
    }
    for (size_t e = 0; e < 4; ++e) by_sequence += f[e] * p[e] / 2;
  }
  EXPECT_NEAR(sequence_loss(l, 2, 1, "sigmoid", valid).item<double>(), by_sequence, 1e-12);
  EXPECT_NEAR(z_loss(l, 1, valid).item<double>(), by_z, 1e-12);
  const at::Tensor counts = torch::tensor({1, 2, 3, 4}, at::kInt);
  const at::Tensor share = torch::softmax(l[0], -1).mean(0);
  EXPECT_NEAR(balance_loss(l[0], counts, 1).item<double>(), (share * counts).sum().item<double>() * 4 / 10, 1e-12);
}

TEST(MoELosses, Rejections) {
  const at::Tensor x = torch::zeros({2, 4, 3});
  expect_error<c10::ValueError>([&] { balance_loss(x[0], torch::zeros({4})); }, "counts must be [E = 3]");
  expect_error<c10::ValueError>([&] { sequence_loss(x, 4); }, "top_k must be in [1, E = 3]");
  expect_error<c10::ValueError>([&] { z_loss(x, NAN); }, "the coefficient must be finite");
}

}  // namespace
}  // namespace torch_ext::moe
