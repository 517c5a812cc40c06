// Balances a pole on a cart from episode returns alone: EGGROLL as direct policy search.
//
//   build/bin/cartpole_eggroll [--seed 0] [--generations 80]
//
// A policy observation - 16 - action (tanh, greedy) plays CartPole. Every generation 64 perturbed policies play two
// episodes each, all 128 at once in tensors; Adam takes the pseudo-gradient of the mean return. The program stops when
// the unperturbed policy reaches a return of 475 over 20 episodes; its exit status is 1 if it does not.
#include <torch/torch.h>
#include <torch_ext/nn/eggroll.h>
#include <torch_ext/optim/eggroll.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <string>

#include "common/progress.h"
#include "common/table.h"

namespace {

using torch_ext::optim::Eggroll, torch_ext::optim::EggrollOptions, torch_ext::optim::Population;

constexpr int kSteps = 500;  // of an episode, as in CartPole-v1
constexpr double kGoal = 475;

// Many carts at once: the equations of CartPole-v1 (Barto, Sutton and Anderson 1983), Euler steps of 0.02 s.
class CartPole {
 public:
  explicit CartPole(int64_t carts)
      : state(torch::rand({carts, 4}) * 0.1 - 0.05), alive(torch::ones(carts, torch::kBool)) {}

  // Pushes left (0) or right (1); the reward of every cart: 1 while its pole stands.
  torch::Tensor step(const torch::Tensor& action) {
    const auto parts = state.unbind(1);
    const auto &speed = parts[1], &angle = parts[2], &turn = parts[3];
    const auto force = action * 20.0 - 10.0, cosine = angle.cos();
    const auto push = (force + 0.05 * turn.square() * angle.sin()) / 1.1;
    const auto angular = (9.8 * angle.sin() - cosine * push) / (0.5 * (4.0 / 3 - 0.1 * cosine.square() / 1.1));
    const auto linear = push - 0.05 * angular * cosine / 1.1;
    state = state + 0.02 * torch::stack({speed, linear, turn, angular}, 1);
    const auto reward = alive.to(torch::kFloat);
    alive = alive & (state.select(1, 0).abs() <= 2.4) & (state.select(1, 2).abs() <= 12 * M_PI / 180);
    return reward;
  }

  torch::Tensor state, alive;
};

// Mean return of each member over its episodes, [members].
torch::Tensor play(torch::nn::Sequential policy, int64_t members, int64_t episodes) {
  CartPole carts(members * episodes);
  auto total = torch::zeros(members * episodes);
  for (int t = 0; t < kSteps && carts.alive.any().item<bool>(); ++t) {
    total += carts.step(policy->forward(carts.state.view({members, episodes, 4})).argmax(2).view(-1));
  }
  return total.view({members, episodes}).mean(1);
}

}  // namespace

int main(int argc, char** argv) try {
  uint64_t seed = 0;
  int generations = 80;
  int64_t population = 64;
  bool quiet = false;
  CLI::App app("Balances a pole on a cart.");
  app.option_defaults()->always_capture_default();
  app.add_option("--seed", seed, "of the policy, the noise and the episodes");
  app.add_option("--generations", generations, "at most so many")->check(CLI::Range(1, 100000));
  app.add_option("--population", population, "policies of a generation; even");
  app.add_flag("--quiet", quiet, "no progress, only the table");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  torch::set_num_threads(1);  // a network this small runs fastest so
  torch::manual_seed(seed);
  const torch::NoGradGuard no_grad;
  torch::nn::Linear hidden(4, 16), output(16, 2);
  auto policy = torch_ext::nn::eggroll_convert(torch::nn::Sequential(hidden, torch::nn::Tanh(), output));
  const auto options = EggrollOptions()
                           .sigma(0.1)
                           .population(population)
                           .shaping("centered_rank")
                           .maximize(true)
                           .seed(static_cast<int64_t>(seed));
  Eggroll es(policy->parameters(), options);
  torch::optim::Adam adam(policy->parameters(), torch::optim::AdamOptions(0.05));
  const auto begin = std::chrono::steady_clock::now();
  const examples::Progress progress("generation", generations, quiet);
  double reached = 0;
  int used = 0;
  while (used < generations && reached < kGoal) {
    const Population pop = es.ask();
    torch::Tensor values;
    {
      const auto guard = pop.applied_to(policy);
      values = play(policy, pop.size(), 2);
    }
    es.tell(values, /*update=*/false);
    adam.step();
    reached = play(policy, 1, 20).item<double>();
    progress.update(++used, examples::format("return %.1f", reached));
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  examples::print_table({{"seed", "generations", "return", "s"},
                         {std::to_string(seed), std::to_string(used), examples::format("%.1f", reached),
                          examples::format("%.1f", seconds)}});
  return reached >= kGoal ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "cartpole_eggroll: " << error.what() << "\n";
  return 1;
}
