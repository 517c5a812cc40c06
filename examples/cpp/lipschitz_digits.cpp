// Trains a digits network with and without a penalty on its certified local Lipschitz constant.
//
//   build/bin/lipschitz_digits [--data FILE] [--steps 400] [--weight 0.01] [--radius 0.05] [--seed 0]
//
// The penalty adds weight * mean max_i L_i over 16 rows of the batch to the loss; L is bounded on boxes of the radius
// around the rows (pixels in [0, 1]). The table: the bound on boxes around 48 test rows (mean; a proof), the largest
// norm of the Jacobian at 64 random points of each (mean; from below), test accuracy, and the share of pixels whose
// influence on the largest logit has a certified sign on the whole box.
#include <torch/torch.h>
#include <torch_ext/nn/lipschitz_penalty.h>
#include <torch_ext/solvers/monotonicity.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "common/csv.h"
#include "common/progress.h"
#include "common/table.h"

namespace {

constexpr int64_t kPenalised = 16, kMeasured = 48, kSamples = 64;

struct Arguments {
  std::string data = "examples/data/digits.csv";
  int steps = 400;
  double weight = 0.01, radius = 0.05;
  uint64_t seed = 0;
  bool quiet = false;
};

struct Split {
  torch::Tensor x, y, test_x, test_y;
};

torch::nn::Sequential train(const Split& data, const Arguments& args, double weight, int64_t classes) {
  torch::manual_seed(args.seed);
  torch::nn::Sequential model(torch::nn::Linear(data.x.size(1), 72), torch::nn::ReLU(), torch::nn::Linear(72, 32),
                              torch::nn::ReLU(), torch::nn::Linear(32, classes));
  torch_ext::nn::LipschitzPenalty penalty(model, args.radius);
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(3e-3));
  const examples::Progress progress(weight > 0 ? "with penalty   " : "without penalty", args.steps, args.quiet);
  for (int step = 1; step <= args.steps; ++step) {
    const auto rows = torch::randint(data.x.size(0), {128});
    const auto x = data.x.index_select(0, rows);
    auto loss = torch::nn::functional::cross_entropy(model->forward(x), data.y.index_select(0, rows));
    if (weight > 0) loss = loss + weight * penalty->forward(x.narrow(0, 0, kPenalised));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    progress.update(step, examples::format("loss %.3f", loss.item<double>()));
  }
  return model;
}

double sampled(torch::nn::Sequential model, const torch::Tensor& x, double radius) {
  torch::Tensor largest;
  for (int64_t k = 0; k < kSamples; ++k) {
    const auto point = (x + radius * (2 * torch::rand_like(x) - 1)).set_requires_grad(true);
    const auto y = model->forward(point);
    for (int64_t i = 0; i < y.size(1); ++i) {
      const auto row = torch::autograd::grad({y.select(1, i).sum()}, {point}, {}, /*retain_graph=*/true)[0];
      const auto norm = row.abs().sum(1);
      largest = largest.defined() ? torch::maximum(largest, norm) : norm;
    }
  }
  return largest.mean().item<double>();
}

std::vector<std::string> row(const std::string& name, torch::nn::Sequential model, const Split& data,
                             const Arguments& args) {
  const auto x = data.test_x.narrow(0, 0, kMeasured);
  const double below = sampled(model, x, args.radius);
  const torch::NoGradGuard no_grad;
  const auto bounds = torch_ext::ops::local_lipschitz(*model, x, args.radius);
  const double certified = std::get<0>(bounds).amax(1).mean().item<double>();
  const auto right = model->forward(data.test_x).argmax(1).eq(data.test_y).to(torch::kDouble).mean();
  const auto signs = torch_ext::solvers::monotonicity(*model, x - args.radius, x + args.radius);
  const auto winner = model->forward(x).argmax(1).view({-1, 1, 1}).expand({-1, 1, x.size(1)});
  const auto decided = signs.gather(1, winner).ne(0).to(torch::kDouble).mean();
  return {name, examples::format("%.2f", certified), examples::format("%.2f", below),
          examples::format("%.3f", right.item<double>()), examples::format("%.2f", decided.item<double>())};
}

void run(const Arguments& args) {
  const auto data = examples::read_csv(args.data);
  const auto x = data.x / data.x.abs().max();
  torch::manual_seed(args.seed);
  const auto order = torch::randperm(x.size(0));
  const int64_t count = x.size(0) * 3 / 4;
  const auto learn = order.narrow(0, 0, count), test = order.narrow(0, count, x.size(0) - count);
  const Split split{x.index_select(0, learn), data.y.index_select(0, learn), x.index_select(0, test),
                    data.y.index_select(0, test)};
  std::vector<std::vector<std::string>> table{
      {"penalty", "certified", "sampled", "test accuracy", "pixels of certified sign"}};
  table.push_back(row("none", train(split, args, 0, data.classes), split, args));
  table.push_back(row(examples::format("%g", args.weight), train(split, args, args.weight, data.classes), split, args));
  examples::print_table(table);
}

}  // namespace

int main(int argc, char** argv) {
  Arguments args;
  CLI::App app{"Trains a digits network with and without a penalty on its certified local Lipschitz constant"};
  app.add_option("--data", args.data, "CSV file, the last column a label")->capture_default_str();
  app.add_option("--steps", args.steps)->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--weight", args.weight, "of the penalty")->check(CLI::Range(0.0, 1e6))->capture_default_str();
  app.add_option("--radius", args.radius, "of the boxes")->check(CLI::Range(0.0, 1e6))->capture_default_str();
  app.add_option("--seed", args.seed)->capture_default_str();
  app.add_flag("--quiet", args.quiet, "no progress");
  CLI11_PARSE(app, argc, argv);
  try {
    run(args);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 2;
  }
  return 0;
}
