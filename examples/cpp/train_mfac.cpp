// Trains a small digits classifier with M-FAC, its window stored in several formats, and with AdamW and SGD.
//
//   build/bin/train_mfac [--data FILE] [--epochs 20] [--seed 0] [--json FILE]
//
// Model, split and batches: common/training.h. The learning rate of every optimizer falls linearly to zero: M-FAC's
// steps grow as gradients shrink, so that it needs a falling rate more than the others do.
// examples/python/train_mfac.py is the same program.
//
// The table:
//   window               bytes that M-FAC keeps: the last gradients and their products
//   final train loss     mean cross-entropy over the training rows after the last epoch
//   test accuracy        share of the test rows classified right after the last epoch
//   s/epoch              seconds for one pass over the training rows, evaluation excluded; median over the epochs
//   x AdamW              the optimizers take turns, epoch by epoch: seconds over AdamW's for the same epoch; median
#include <torch/torch.h>
#include <torch_ext/optim/mfac.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/training.h"

namespace {

using examples::MakeOptimizer, examples::Parameters, examples::Run;
using torch_ext::optim::MFAC, torch_ext::optim::MFACOptions;

std::vector<std::pair<std::string, MakeOptimizer>> optimizers(const MFACOptions& options) {
  using namespace torch::optim;
  std::vector<std::pair<std::string, MakeOptimizer>> result;
  for (const std::string format : {"float32", "bfloat16", "int8", "topk"}) {
    const auto stored = MFACOptions(options).window_format(format).topk(0.1);
    result.emplace_back("MFAC " + format,
                        [stored](Parameters p) { return std::make_unique<MFAC>(std::move(p), stored); });
  }
  result.emplace_back("AdamW", [](Parameters p) { return std::make_unique<AdamW>(p, AdamWOptions(1e-2)); });
  result.emplace_back("SGD", [](Parameters p) { return std::make_unique<SGD>(p, SGDOptions(0.1).momentum(0.9)); });
  return result;
}

void train_step(Run& run, const torch::Tensor& x, const torch::Tensor& y, double left) {
  run.optimizer->param_groups()[0].options().set_lr(run.lr * left);
  run.optimizer->zero_grad();
  torch::nn::functional::cross_entropy(run.model->forward(x), y).backward();
  run.optimizer->step();
}

std::string window_size(const Run& run) {
  const auto* mfac = dynamic_cast<const MFAC*>(run.optimizer.get());
  return mfac == nullptr ? "-" : examples::format("%.2f MB", static_cast<double>(mfac->memory_bytes()) / 1e6);
}

void print_results(const std::vector<Run>& runs) {
  using examples::format;
  std::vector<std::vector<std::string>> rows{
      {"optimizer", "window", "final train loss", "test accuracy", "s/epoch", "x AdamW"}};
  for (const auto& run : runs) {
    rows.push_back({run.name, window_size(run), format("%.4f", run.train_loss.back()),
                    format("%.4f", run.test_accuracy.back()), format("%.4f", examples::median(run.seconds)),
                    examples::relative_cost(run, runs, "AdamW")});
  }
  examples::print_table(rows);
}

}  // namespace

int main(int argc, char** argv) {
  examples::TrainingArguments args;
  int64_t num_grads = 64;
  double lr = 1e-2, damping = 1e-3;
  CLI::App app("Trains a digits classifier with M-FAC and compares it with AdamW and SGD.");
  examples::add_training_options(app, args);
  app.add_option("--lr", lr, "M-FAC: learning rate; keep lr * num-grads near 0.5 to 1");
  app.add_option("--num-grads", num_grads, "M-FAC: gradients in the window");
  app.add_option("--damping", damping, "M-FAC: lambda");
  return examples::run_program("train_mfac", app, argc, argv, [&] {
    torch::set_num_threads(1);  // a network this small runs fastest so
    const auto data = examples::load_split(args);
    std::vector<Run> runs;
    for (const auto& [name, make] : optimizers(MFACOptions(lr).num_grads(num_grads).damping(damping))) {
      runs.push_back(examples::start_run(name, make, data, args.seed));
    }
    examples::train_in_turns(runs, data, args, train_step);
    print_results(runs);
    examples::write_curves(runs, data, args);
  });
}
