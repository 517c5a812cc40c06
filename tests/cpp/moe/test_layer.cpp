#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/moe/layer.h>

#include "support/check.h"

namespace torch_ext::moe {
namespace {

using test::expect_error;
using test::relative_error;

at::Tensor swiglu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down) {
  return torch::matmul(torch::silu(torch::matmul(x, gate.t())) * torch::matmul(x, up.t()), down.t());
}

TEST(MoELayer, IsItsExpertsOneTokenAtATime) {
  MoELayer layer(MoELayerOptions(6, 10, 5).shared_experts(1).route(RouteOptions().route_scale(2)));
  layer->to(at::kDouble);
  const at::Tensor x = torch::randn({12, 6}, torch::dtype(at::kDouble).requires_grad(true));
  const at::Tensor valid = torch::arange(12).ne(5);
  const at::Tensor y = layer(x, valid);
  const RouteResult routed = layer->router(x, valid);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < 12; ++t) {
    at::Tensor row = swiglu(x[t], layer->shared_gate_proj, layer->shared_up_proj, layer->shared_down_proj);
    for (int64_t k = 0; k < 2; ++k) {
      const auto e = routed.ids[t][k].item<int64_t>();
      if (e < 0) continue;
      row = row + routed.gates[t][k] * swiglu(x[t], layer->gate_proj[e], layer->up_proj[e], layer->down_proj[e]);
    }
    rows.push_back(row);
  }
  const at::Tensor want = torch::stack(rows);
  EXPECT_LT(relative_error(y, want), 1e-13);
  std::vector<at::Tensor> inputs = layer->parameters();
  inputs.push_back(x);
  const auto a = torch::autograd::grad({y.square().sum()}, inputs);
  const auto b = torch::autograd::grad({want.square().sum()}, inputs);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_LT(relative_error(a[i], b[i]), 1e-11) << i;
  // Two nodes ran backward: that of the layer and that of the router alone.
  EXPECT_EQ(layer->router->load.sum().item<int64_t>(), 2 * 2 * 11);
}

TEST(MoELayer, SecondDerivatives) {
  MoELayer layer(MoELayerOptions(3, 4, 4));
  layer->to(at::kDouble);
  const auto first = [&](const at::Tensor& x) {
    return torch::autograd::grad({layer(x).square().sum()}, {x}, {}, true, true)[0];
  };
  const at::Tensor x = torch::randn({5, 3}, torch::dtype(at::kDouble).requires_grad(true));
  const at::Tensor direction = torch::randn({5, 3}, at::kDouble);
  const at::Tensor second = torch::autograd::grad({(first(x) * direction).sum()}, {x})[0];
  const double h = 1e-6;
  const auto shifted = [&](double by) { return (x.detach() + by * direction).set_requires_grad(true); };
  const at::Tensor quotient = (first(shifted(h)) - first(shifted(-h))) / (2 * h);
  EXPECT_LT(relative_error(second, quotient), 1e-6);  // the Hessian is symmetric
}

TEST(MoELayer, TrainsAndStartsAsPython) {
  torch::manual_seed(0);
  MoELayer layer(MoELayerOptions(8, 16, 4).shared_experts(1));
  EXPECT_EQ(layer->named_parameters().size(), 7U);
  EXPECT_LE(layer->up_proj.abs().max().item<double>(), 1 / std::sqrt(8.0));
  EXPECT_GT(layer->up_proj.abs().max().item<double>(), 0.97 / std::sqrt(8.0));
  torch::optim::Adam optimizer(layer->parameters(), 1e-2);
  const at::Tensor x = torch::randn({64, 8}), target = x.flip(1);
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = (layer(x) - target).square().mean();
    loss.backward();
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.5 * first);
}

TEST(MoELayer, GroupedProducts) {
  const at::Tensor x = torch::randn({9, 5}), weight = torch::randn({3, 2, 5});
  const at::Tensor y = grouped_mm(x, weight, torch::tensor({0, 4, 4, 7}, at::kInt));
  EXPECT_LT(relative_error(y.narrow(0, 0, 4), torch::matmul(x.narrow(0, 0, 4), weight[0].t())), 1e-6);
  EXPECT_LT(relative_error(y.narrow(0, 4, 3), torch::matmul(x.narrow(0, 4, 3), weight[2].t())), 1e-6);
  EXPECT_EQ(y.narrow(0, 7, 2).count_nonzero().item<int64_t>(), 0);
}

TEST(MoELayer, Rejections) {
  expect_error<c10::ValueError>([] { MoELayer(MoELayerOptions(0, 8, 4)); }, "dim and hidden must be positive");
  expect_error<c10::ValueError>([] { MoELayer(MoELayerOptions(6, 8, 4).shared_experts(-1)); },
                                "shared_experts must not be negative");
  expect_error<c10::ValueError>(
      [] {
        grouped_mm(torch::zeros({3, 5}), torch::zeros({2, 4, 5}), torch::tensor({0, 2, 4}, at::kInt));
      },
      "offsets must rise from 0 to at most S = 3");
}

}  // namespace
}  // namespace torch_ext::moe
