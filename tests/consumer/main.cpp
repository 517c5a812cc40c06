// Twenty steps of AdaHessian on a small regression; exits 1 when the loss did not fall.
#include <torch/torch.h>
#include <torch_ext/optim/adahessian.h>
#include <torch_ext/version.h>

#include <iostream>

int main() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(8, 16), torch::nn::Tanh(), torch::nn::Linear(16, 1));
  const auto x = torch::randn({64, 8});
  const auto y = x.select(1, 0).sin().unsqueeze(1);

  torch_ext::optim::AdaHessian optimizer(model->parameters(), torch_ext::optim::AdaHessianOptions(0.05));
  const auto closure = [&] { return torch::mse_loss(model->forward(x), y); };
  const double first = closure().item<double>();
  for (int step = 0; step < 20; ++step) {
    optimizer.step(closure);
  }
  const double last = closure().item<double>();
  std::cout << "torch_ext " << torch_ext::kVersion << ": loss " << first << " -> " << last << '\n';
  return last < 0.5 * first ? 0 : 1;
}
