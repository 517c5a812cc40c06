// moe::MoERouter: the module's part of tests 9 and 12 of the acceptance list (arXiv:2512.03915).
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/moe/router.h>

#include <sstream>

#include "support/check.h"

namespace torch_ext::moe {
namespace {

using test::equal_bits;
using test::expect_error;

TEST(MoERouter, IsALinearLayerAndARoute) {
  MoERouter router(MoERouterOptions(6, 8).route(RouteOptions().top_k(3)));
  const torch::NoGradGuard no_grad;
  router->expert_bias.copy_(torch::randn({8}));
  const at::Tensor x = torch::randn({2, 5, 6});
  const RouteResult got = router(x);
  const RouteResult want =
      route(at::linear(x.view({10, 6}), router->weight), router->expert_bias, RouteOptions().top_k(3));
  EXPECT_TRUE(equal_bits(got.ids, want.ids));
  EXPECT_TRUE(equal_bits(got.gates, want.gates));
  EXPECT_EQ(router->named_parameters().keys(), std::vector<std::string>{"weight"});
  EXPECT_EQ(router->named_buffers().keys(), std::vector<std::string>{"expert_bias"});
}

TEST(MoERouter, N9CountsWhileTrainingOnly) {
  MoERouter router(MoERouterOptions(6, 8));
  const at::Tensor x = torch::randn({10, 6});
  router(x).gates.sum().backward();
  EXPECT_EQ(router->load.sum().item<int64_t>(), 20);
  router->eval();
  router(x).gates.sum().backward();
  EXPECT_EQ(router->load.sum().item<int64_t>(), 20);
}

TEST(MoERouter, N12TheBiasStaysFloat32) {
  MoERouter router(MoERouterOptions(6, 8));
  torch::nn::Sequential model(router);
  {
    const torch::NoGradGuard no_grad;
    router->expert_bias.copy_(torch::randn({8}));
  }
  const at::Tensor bias = router->expert_bias, before = bias.clone();
  model->to(at::kBFloat16);
  model->to(at::kCPU, at::kHalf);
  model->to(at::kCPU);
  EXPECT_TRUE(router->expert_bias.is_same(bias));  // a balancer holds it
  EXPECT_TRUE(equal_bits(bias, before));
  EXPECT_EQ(router->weight.scalar_type(), at::kHalf);
  EXPECT_EQ(router->load.scalar_type(), at::kLong);
  EXPECT_EQ(router(torch::randn({3, 6}).to(at::kHalf)).gates.scalar_type(), at::kFloat);
}

TEST(MoERouter, N12SavedAndLoadedItContinuesToTheBit) {
  MoERouter router(MoERouterOptions(6, 8)), other(MoERouterOptions(6, 8));
  {
    const torch::NoGradGuard no_grad;
    router->expert_bias.copy_(torch::randn({8}));
  }
  std::stringstream file;
  torch::save(router, file);
  torch::load(other, file);
  const at::Tensor x = torch::randn({20, 6});
  EXPECT_TRUE(equal_bits(router(x).gates, other(x).gates));
  EXPECT_TRUE(equal_bits(router->expert_bias, other->expert_bias));
}

TEST(MoERouter, Rejections) {
  expect_error<c10::ValueError>([] { MoERouter(MoERouterOptions(6, 8).route(RouteOptions().top_k(9))); },
                                "top_k must be in [1, E = 8]");
  expect_error<c10::ValueError>([] { MoERouter(MoERouterOptions(0, 8)); }, "dim must be positive");
  expect_error<c10::ValueError>(
      [] {
        MoERouter(MoERouterOptions(6, 8))(torch::zeros({4, 5}));
      },
      "x must be [..., dim = 6], got [4, 5]");
}

}  // namespace
}  // namespace torch_ext::moe
