// Networks that the tests of the Lipschitz bounds share.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

namespace torch_ext::test {

inline at::Tensor f64(std::initializer_list<double> values, at::IntArrayRef shape) {
  return at::tensor(std::vector<double>(values), at::kDouble).view(shape);
}

inline torch::nn::Sequential relu_net(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& biases) {
  torch::nn::Sequential net;
  for (size_t k = 0; k < weights.size(); ++k) {
    torch::nn::Linear linear(weights[k].size(1), weights[k].size(0));
    linear->to(at::kDouble);
    const at::NoGradGuard no_grad;
    linear->weight.copy_(weights[k]);
    linear->bias.copy_(biases[k]);
    net->push_back(linear);
    if (k + 1 < weights.size()) net->push_back(torch::nn::ReLU());
  }
  return net;
}

// W = N(0, 1) sqrt(2 / fan in), b = 0.3 N(0, 1).
inline torch::nn::Sequential drawn_net(uint64_t seed, const std::vector<int64_t>& sizes) {
  torch::manual_seed(seed);
  std::vector<at::Tensor> weights, biases;
  for (size_t k = 0; k + 1 < sizes.size(); ++k) {
    weights.push_back(at::randn({sizes[k + 1], sizes[k]}, at::kDouble) *
                      std::sqrt(2.0 / static_cast<double>(sizes[k])));
    biases.push_back(at::randn({sizes[k + 1]}, at::kDouble) * 0.3);
  }
  return relu_net(weights, biases);
}

// The hand net of the acceptance list: every neuron is open on [-1, 1]^2.
inline torch::nn::Sequential hand_net() {
  return relu_net({f64({1, 1, 1, -1}, {2, 2}), f64({1, -1, 1, 1}, {2, 2}), f64({1, -1}, {1, 2})},
                  {f64({0, 0}, {2}), f64({.1, -.3}, {2}), f64({0}, {1})});
}

// l1 norms of the rows of the Jacobian at points [points, ...]; [points, outputs].
inline at::Tensor jacobian_norms(torch::nn::Sequential net, const at::Tensor& points) {
  const at::Tensor x = points.detach().clone().set_requires_grad(true);
  const at::Tensor y = net->forward(x);
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < y.size(1); ++i) {
    const auto grads = torch::autograd::grad({y.select(1, i).sum()}, {x}, {}, /*retain_graph=*/true);
    rows.push_back(grads[0].flatten(1).abs().sum(1));
  }
  return at::stack(rows, 1);
}

// The message of the exception that `call` throws; empty if it throws none.
template <typename Error, typename Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace torch_ext::test
