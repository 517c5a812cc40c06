// Trains a small digits classifier with AdaHessian, AdamW and SGD: the same program three times, but for one line.
//
//   build/bin/train_digits [--data FILE] [--epochs 20] [--seed 0] [--optimizer AdaHessian|AdamW|SGD] [--json FILE]
//
// Model, split and batches: common/training.h. examples/python/train_digits.py is the same program.
//
// The table:
//   final train loss     mean cross-entropy over the training rows after the last epoch
//   test accuracy        share of the test rows classified right after the last epoch
//   s/epoch              seconds for one pass over the training rows, evaluation excluded; median over the epochs
//   x first-order cost   the optimizers take turns, epoch by epoch: seconds over AdamW's seconds for the same epoch;
//                        median over the epochs ("-" if AdamW did not run)
#include <torch/torch.h>
#include <torch_ext/optim/adahessian.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/training.h"

namespace {

using examples::MakeOptimizer, examples::Parameters, examples::Run;
using torch_ext::optim::AdaHessian, torch_ext::optim::AdaHessianOptions;

// The one line that differs.
std::vector<std::pair<std::string, MakeOptimizer>> optimizers(int update_each) {
  using namespace torch::optim;
  return {
      {"AdaHessian",
       [=](Parameters p) {
         return std::make_unique<AdaHessian>(p,
                                             AdaHessianOptions(0.15).linear_averaging("row").update_each(update_each));
       }},
      {"AdamW", [](Parameters p) { return std::make_unique<AdamW>(p, AdamWOptions(1e-2)); }},
      {"SGD", [](Parameters p) { return std::make_unique<SGD>(p, SGDOptions(0.1).momentum(0.9)); }},
  };
}

void train_step(Run& run, const torch::Tensor& x, const torch::Tensor& y, double /*left*/) {
  const bool differentiates_itself = dynamic_cast<AdaHessian*>(run.optimizer.get()) != nullptr;
  run.optimizer->zero_grad();
  run.optimizer->step([&] {
    auto loss = torch::nn::functional::cross_entropy(run.model->forward(x), y);
    if (!differentiates_itself) loss.backward();
    return loss;
  });
}

void print_results(const std::vector<Run>& runs) {
  using examples::format;
  std::vector<std::vector<std::string>> rows{
      {"optimizer", "final train loss", "test accuracy", "s/epoch", "x first-order cost"}};
  for (const auto& run : runs) {
    rows.push_back({run.name, format("%.4f", run.train_loss.back()), format("%.4f", run.test_accuracy.back()),
                    format("%.4f", examples::median(run.seconds)), examples::relative_cost(run, runs, "AdamW")});
  }
  examples::print_table(rows);
}

}  // namespace

int main(int argc, char** argv) {
  examples::TrainingArguments args;
  std::string optimizer = "all";
  int update_each = 1;
  CLI::App app("Trains a digits classifier with AdaHessian, AdamW and SGD and compares them.");
  examples::add_training_options(app, args);
  app.add_option("--optimizer", optimizer)->check(CLI::IsMember({"all", "AdaHessian", "AdamW", "SGD"}));
  app.add_option("--update-each", update_each, "AdaHessian: refresh the curvature every so many steps")
      ->check(CLI::Range(1, 1000000));
  return examples::run_program("train_digits", app, argc, argv, [&] {
    torch::set_num_threads(1);  // a network this small runs fastest so
    const auto data = examples::load_split(args);
    std::vector<Run> runs;
    for (const auto& [name, make] : optimizers(update_each)) {
      if (optimizer == "all" || optimizer == name) runs.push_back(examples::start_run(name, make, data, args.seed));
    }
    examples::train_in_turns(runs, data, args, train_step);
    print_results(runs);
    examples::write_curves(runs, data, args, {{"update_each", update_each}});
  });
}
