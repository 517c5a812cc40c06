#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/hvp.h>

#include "support/check.h"
#include "support/problems.h"

namespace torch_ext::curvature {
namespace {

using test::clones;
using test::equal_bits;
using test::expect_error;
using test::Problem;
using test::relative_error;
using test::tanh_layer;

std::vector<at::Tensor> random_like(const std::vector<at::Tensor>& params) {
  std::vector<at::Tensor> result;
  for (const auto& param : params) result.push_back(torch::randn(param.sizes(), param.options().requires_grad(false)));
  return result;
}

TEST(Hvp, OfAQuadraticIsItsMatrix) {
  torch::manual_seed(0);
  const at::Tensor a = torch::randn({6, 6}, at::kDouble), h = a + a.t();
  const at::Tensor x = torch::randn({4}, at::kDouble).requires_grad_(),
                   y = torch::randn({2}, at::kDouble).requires_grad_();
  const std::vector<at::Tensor> v = random_like({x, y});
  const at::Tensor all = torch::cat({x, y});
  const at::Tensor loss = torch::dot(all, torch::mv(h, all)) / 2;
  const at::Tensor expected = torch::mv(h, torch::cat(v));
  for (int round = 0; round < 2; ++round) {  // the graph is kept
    const auto got = hvp(loss, {x, y}, v);
    EXPECT_LT(relative_error(torch::cat(got), expected), 1e-14);
    EXPECT_FALSE(got[0].requires_grad());
  }
  EXPECT_FALSE(x.grad().defined());
}

TEST(Hvp, ModesAgreeAndRestoreTheParameters) {
  torch::manual_seed(1);
  const Problem p = tanh_layer();
  const auto v = random_like(p.params);
  const auto before = clones(p.params);
  const auto exact = hvp(p.closure(), p.params, v, "double_backward");
  const auto difference = hvp(p.closure(), p.params, v, "finite_difference");
  for (size_t i = 0; i < exact.size(); ++i) EXPECT_LT(relative_error(difference[i], exact[i]), 1e-6);
  EXPECT_TRUE(equal_bits(p.params, before));
  int calls = 0;
  expect_error<std::runtime_error>(
      [&] {
        hvp(
            [&]() -> at::Tensor {
              if (++calls == 2) throw std::runtime_error("no more");
              return p.loss(p.params);
            },
            p.params, v, "finite_difference");
      },
      "no more");
  EXPECT_TRUE(equal_bits(p.params, before));
}

TEST(Hvp, NoCurvatureIsZeros) {
  const at::Tensor x = torch::ones({3}, at::kDouble).requires_grad_(),
                   y = torch::ones({2}, at::kDouble).requires_grad_();
  const at::Tensor unused = torch::ones({2}, at::kDouble).requires_grad_();
  const std::vector<at::Tensor> v{torch::ones({3}, at::kDouble), torch::ones({2}, at::kDouble),
                                  torch::ones({2}, at::kDouble)};
  const auto mixed = hvp(x.square().sum() + y.sum(), {x, y, unused}, v);
  EXPECT_TRUE(mixed[0].equal(2 * v[0]));
  EXPECT_EQ(mixed[1].abs().max().item<double>(), 0);
  EXPECT_EQ(mixed[2].abs().max().item<double>(), 0);
  EXPECT_EQ(hvp(y.sum(), {y}, {v[1]})[0].abs().max().item<double>(), 0);
}

TEST(Hvp, BadInput) {
  const at::Tensor x = torch::ones({3}, at::kDouble).requires_grad_();
  const at::Tensor v = torch::ones({3}, at::kDouble);
  const auto loss = [&] { return x.square().sum(); };
  expect_error<c10::ValueError>([&] { hvp(loss(), {x}, {v, v}); }, "1 parameters and 2 vectors");
  expect_error<c10::ValueError>([&] { hvp(loss(), {x}, {torch::ones({2}, at::kDouble)}); },
                                "parameter 0 has shape [3]");
  expect_error<c10::ValueError>([&] { hvp(loss, {x}, {v}, "forward"); }, "mode must be");
  expect_error<c10::Error>([&] { hvp(loss().detach(), {x}, {v}); }, "no graph");
  expect_error<c10::Error>([&] { hvp(x * 2, {x}, {v}); }, "one number");
  expect_error<c10::Error>([&] { hvp(at::Tensor(), {x}, {v}); }, "one number");
}

}  // namespace
}  // namespace torch_ext::curvature
