// Numbers in the names are those of the acceptance list. Training on the digits (8) is in the Python tests and in
// examples/cpp/lipschitz_digits.cpp; here a problem that needs no data.
#include <torch_ext/nn/lipschitz_penalty.h>

#include <sstream>

#include "support/check.h"
#include "support/lipschitz.h"

namespace torch_ext::test {
namespace {

TEST(LipschitzPenalty, ValueAndWhatItOwns) {
  const auto net = drawn_net(0, {4, 16, 16, 3});
  nn::LipschitzPenalty penalty(net, .1, ops::LocalLipschitzOptions().backward("recurjac"));
  const at::Tensor x = at::randn({5, 4}, at::kDouble);
  const auto [bound, lo, hi] = ops::local_lipschitz(*net, x, .1, ops::LocalLipschitzOptions().backward("recurjac"));
  EXPECT_TRUE(penalty->forward(x).equal(bound.amax(1).mean()));
  EXPECT_TRUE(penalty->parameters().empty());
  std::ostringstream text;
  penalty->pretty_print(text);
  EXPECT_EQ(text.str(), "torch_ext::nn::LipschitzPenalty(eps=0.1)");
  for (const double eps : {-.1, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    EXPECT_NE(message_of<c10::Error>([&] { nn::LipschitzPenalty(net, eps); }).find("eps must be a finite number >= 0"),
              std::string::npos);
  }
}

double bound_after_training(double weight) {
  const auto net = drawn_net(8, {4, 24, 24, 2});
  torch::nn::Sequential model = net;
  nn::LipschitzPenalty penalty(net, .05);
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(3e-3));
  torch::manual_seed(8);
  const at::Tensor x = at::randn({64, 4}, at::kDouble), y = (x.sum(1) > 0).to(at::kLong);
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    at::Tensor loss = torch::nn::functional::cross_entropy(model->forward(x), y);
    if (weight > 0) loss = loss + weight * penalty->forward(x.narrow(0, 0, 16));
    loss.backward();
    optimizer.step();
  }
  const at::NoGradGuard no_grad;
  EXPECT_GT(model->forward(x).argmax(1).eq(y).to(at::kDouble).mean().item<double>(), .95);
  return penalty->forward(x).item<double>();
}

TEST(LipschitzPenalty, N8TrainingWithItLowersTheBound) {
  EXPECT_LT(2 * bound_after_training(.05), bound_after_training(0));
}

}  // namespace
}  // namespace torch_ext::test
