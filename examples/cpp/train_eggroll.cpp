// Trains a digits classifier without a single backward pass: EGGROLL's pseudo-gradients, taken by Adam.
//
//   build/bin/train_eggroll [--data FILE] [--steps 400] [--seed 0] [--objective loss|errors]
//
// features - 32 - classes, relu; 1400 of the 1797 digits train. Every step evaluates a population of 128 perturbed
// networks on one batch of rows, all in one pass, and Adam takes what they say. With --objective errors all that a
// member reports is how many rows it classifies wrong: a loss whose gradient is zero everywhere.
// examples/python/train_eggroll.py is the same program and says more about the settings.
#include <torch/torch.h>
#include <torch_ext/nn/eggroll.h>
#include <torch_ext/optim/eggroll.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <string>

#include "common/csv.h"
#include "common/progress.h"
#include "common/table.h"

namespace {

namespace F = torch::nn::functional;
using torch_ext::optim::Eggroll, torch_ext::optim::EggrollOptions, torch_ext::optim::Population;

struct Arguments {
  std::string data = "examples/data/digits.csv", objective = "loss", shaping = "centered_rank";
  int steps = 400, batch = 0;  // 0: by the objective
  int64_t population = 128;
  double sigma = 0, lr = 0.05;  // 0: by the objective
  uint64_t seed = 0;
  bool quiet = false;
};

struct Split {
  torch::Tensor train_x, train_y, test_x, test_y;
  int64_t classes;
};

Split load(const Arguments& args) {
  const auto data = examples::read_csv(args.data);
  const auto x = examples::scale_features(data.x, /*per_column=*/false);
  torch::manual_seed(args.seed);
  const auto order = torch::randperm(x.size(0));
  const auto train = order.slice(0, 0, x.size(0) * 1400 / 1797), test = order.slice(0, train.size(0));
  return {x.index({train}), data.y.index({train}), x.index({test}), data.y.index({test}), data.classes};
}

// One value a member: mean cross-entropy or share of wrong answers. logits [members, rows, classes], y [rows].
torch::Tensor values_of(const torch::Tensor& logits, const torch::Tensor& y, const std::string& objective) {
  if (objective == "errors") return logits.argmax(2).ne(y).to(torch::kFloat).mean(1);
  const auto targets = y.expand({logits.size(0), -1}).flatten();
  const auto options = F::CrossEntropyFuncOptions().reduction(torch::kNone);
  return F::cross_entropy(logits.flatten(0, 1), targets, options).view({logits.size(0), -1}).mean(1);
}

struct Result {
  double accuracy = 0, seconds = 0;
};

Result train(const Split& data, const Arguments& args) {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(args.seed);
  torch::nn::Linear hidden(data.train_x.size(1), 32), output(32, data.classes);
  auto model = torch_ext::nn::eggroll_convert(torch::nn::Sequential(hidden, torch::nn::ReLU(), output));
  const auto options = EggrollOptions()
                           .sigma(args.sigma)
                           .population(args.population)
                           .shaping(args.shaping)
                           .seed(static_cast<int64_t>(args.seed));
  Eggroll es(model->parameters(), options);
  torch::optim::Adam adam(model->parameters(), torch::optim::AdamOptions(args.lr));
  const examples::Progress progress("step", args.steps, args.quiet);
  Result result;
  for (int step = 0; step < args.steps; ++step) {
    const auto begin = std::chrono::steady_clock::now();
    adam.param_groups()[0].options().set_lr(args.lr * (1 - static_cast<double>(step) / args.steps));
    const auto batch = torch::randint(data.train_y.size(0), {args.batch}, torch::kLong);
    const Population pop = es.ask();
    torch::Tensor logits;
    {
      const auto guard = pop.applied_to(model);
      logits = model->forward(data.train_x.index({batch}).expand({pop.size(), -1, -1}));  // all see the same rows
    }
    es.tell(values_of(logits, data.train_y.index({batch}), args.objective), /*update=*/false);
    adam.step();
    result.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if ((step + 1) % 20 == 0 || step + 1 == args.steps) {
      const auto right = model->forward(data.test_x).argmax(1).eq(data.test_y).sum().item<double>();
      result.accuracy = right / static_cast<double>(data.test_y.size(0));
      progress.update(step + 1, examples::format("test accuracy %.4f", result.accuracy));
    }
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) try {
  Arguments args;
  CLI::App app("Trains a digits classifier with evolution strategies.");
  app.option_defaults()->always_capture_default();
  app.add_option("--data", args.data, "CSV: numeric features, last column an integer label, header optional");
  app.add_option("--objective", args.objective, "what a member reports")->check(CLI::IsMember({"loss", "errors"}));
  app.add_option("--steps", args.steps, "updates")->check(CLI::Range(1, 1000000));
  app.add_option("--batch", args.batch, "rows that every member sees in a step; 0: 64, for errors 256")
      ->check(CLI::Range(0, 1000000));
  app.add_option("--population", args.population, "members; even");
  app.add_option("--sigma", args.sigma, "size of the perturbations; 0: 0.1, for errors 0.2");
  app.add_option("--shaping", args.shaping, "how values become weights, see torch_ext/optim/eggroll.h");
  app.add_option("--lr", args.lr, "Adam's learning rate, falling to zero");
  app.add_option("--seed", args.seed, "of the split, the initial weights, the batches and the noise");
  app.add_flag("--quiet", args.quiet, "no progress, only the table");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  const bool errors = args.objective == "errors";
  if (args.batch == 0) args.batch = errors ? 256 : 64;
  if (args.sigma == 0) args.sigma = errors ? 0.2 : 0.1;
  torch::set_num_threads(1);  // a network this small runs fastest so
  const auto data = load(args);
  const Result result = train(data, args);
  examples::print_table({{"objective", "N", "test accuracy", "s"},
                         {args.objective, std::to_string(args.population), examples::format("%.4f", result.accuracy),
                          examples::format("%.1f", result.seconds)}});
  return 0;
} catch (const examples::CsvError& error) {
  std::cerr << error.what() << "\n";
  return 2;
} catch (const std::exception& error) {
  std::cerr << "train_eggroll: " << error.what() << "\n";
  return 1;
}
