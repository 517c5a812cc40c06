// Small fixed problems, rebuilt without a random generator; those of tests/optim_db.json as
// torch_ext/testing/problems.py documents them.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

#include "support/check.h"

namespace torch_ext::test {

struct Problem {
  std::vector<std::string> names;
  std::vector<at::Tensor> params;
  // The loss at any parameters of these shapes, so that a copy of the problem needs only a copy of its parameters.
  std::function<at::Tensor(const std::vector<at::Tensor>&)> loss;

  std::function<at::Tensor()> closure() const {
    return [loss = loss, params = params] { return loss(params); };
  }
  // The same with fresh parameters.
  Problem copy() const { return {names, fresh_leaves(params), loss}; }
  // With the given leaves, of the same shapes.
  Problem with(std::vector<at::Tensor> leaves) const { return {names, std::move(leaves), loss}; }
};

inline at::Tensor indices(int64_t offset, at::IntArrayRef shape) {
  return torch::arange(c10::multiply_integers(shape), at::kDouble).add_(static_cast<double>(offset)).reshape(shape);
}

inline Problem tanh_layer(at::ScalarType dtype = at::kDouble) {
  const auto leaf = [&](int64_t offset, at::IntArrayRef shape) {
    return (indices(offset, shape).sin() / 2).to(dtype).requires_grad_();
  };
  const at::Tensor x = indices(0, {8, 6}).cos().to(dtype), t = (indices(100, {8, 4}).cos() / 2).to(dtype);
  return {{"weight", "kernel", "bias"},
          {leaf(1, {4, 6}), leaf(31, {2, 3, 2, 2}), leaf(61, {4})},
          [x, t](const std::vector<at::Tensor>& p) {
            const at::Tensor &weight = p[0], &kernel = p[1], &bias = p[2];
            const at::Tensor error = torch::tanh(torch::matmul(x, weight.t()) + bias) - t;
            const at::Tensor q = kernel * kernel - 0.3, total = kernel.sum();
            const at::Tensor fit = (error * error).mean() + (weight * weight).mean() * 0.2 + (bias * bias).mean() * 0.2;
            return fit + (q * q).mean() * 0.5 + total * total * 0.01;
          }};
}

// "expert_scores": three layers of experts with fixed scores.
struct ExpertScores {
  std::vector<at::Tensor> biases, scores;
  std::vector<int64_t> top_k{2, 1, 8};

  ExpertScores() {
    for (const int64_t experts : {8, 5, 37}) {
      biases.push_back((indices(1, {experts}).sin() / 10).to(at::kFloat));
      scores.push_back(indices(1, {64, experts}).sin() * 0.4 + indices(1, {experts}).cos() * 0.1 + 0.5);
    }
  }
  at::Tensor keys(size_t layer) const { return scores[layer] + biases[layer].to(at::kDouble); }
  std::vector<at::Tensor> ids() const {
    std::vector<at::Tensor> result;
    for (size_t i = 0; i < biases.size(); ++i) result.push_back(std::get<1>(at::topk(keys(i), top_k[i])));
    return result;
  }
  at::Tensor loss() const {
    at::Tensor total = at::zeros({}, at::kDouble);
    for (size_t i = 0; i < biases.size(); ++i) {
      const double share = static_cast<double>(top_k[i]) / static_cast<double>(biases[i].numel());
      total = total + std::get<0>(at::topk(keys(i), top_k[i])).sum(1).mean() - biases[i].to(at::kDouble).sum() * share;
    }
    return total;
  }
};

inline Problem problem_named(const std::string& name) {
  TORCH_CHECK(name == "tanh_layer", "the C++ tests do not know the problem ", name);
  return tanh_layer();
}

// sum over all elements of p^4 / 4, from p = 1.5 + sin(e) / 2. Gradient and curvature of an element depend on nothing
// but its value, by products and sums alone: any layout, device, order or thread count gives the same bits.
inline Problem quartic(const std::vector<std::vector<int64_t>>& shapes, at::ScalarType dtype = at::kDouble) {
  Problem problem;
  for (size_t i = 0; i < shapes.size(); ++i) {
    problem.names.push_back("p" + std::to_string(i));
    const auto offset = static_cast<int64_t>(i);
    problem.params.push_back((indices(offset, shapes[i]).sin() / 2 + 1.5).to(dtype).requires_grad_());
  }
  problem.loss = [](const std::vector<at::Tensor>& params) {
    at::Tensor total;
    for (const at::Tensor& p : params) {
      const at::Tensor q = p * p;
      const at::Tensor part = (q * q).sum().to(at::kDouble) * 0.25;
      total = total.defined() ? total + part : part;
    }
    return total;
  };
  return problem;
}

}  // namespace torch_ext::test
