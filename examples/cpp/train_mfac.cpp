// Trains a small digits classifier with M-FAC, its window stored in several formats, and with AdamW and SGD.
//
//   build/bin/train_mfac [--data FILE] [--epochs 20] [--seed 0] [--json FILE]
//
// Model, data, split and batches are those of train_digits.cpp: features - 64 - classes, tanh; 1400 of the 1797 digits
// train. The learning rate of every optimizer falls linearly to zero: M-FAC's steps grow as gradients shrink, so that
// it needs a falling rate more than the others do. examples/python/train_mfac.py is the same program.
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
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <iomanip>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/csv.h"
#include "common/progress.h"
#include "common/table.h"

namespace {

namespace F = torch::nn::functional;
using torch_ext::optim::MFAC, torch_ext::optim::MFACOptions;

struct Arguments {
  std::string data = "examples/data/digits.csv", scale = "all", json;
  int epochs = 20, batch = 100;
  int64_t num_grads = 64;
  double lr = 1e-2, damping = 1e-3;
  uint64_t seed = 0;
  bool quiet = false;
};

struct Split {
  torch::Tensor train_x, train_y, test_x, test_y;
  int64_t classes;
};

struct Run {
  std::string name;
  torch::nn::Sequential model;
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  double lr;
  std::vector<double> train_loss, test_accuracy, seconds;  // one value an epoch
};

using Parameters = std::vector<torch::Tensor>;
using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(Parameters)>;

std::vector<std::pair<std::string, MakeOptimizer>> optimizers(const Arguments& args) {
  using namespace torch::optim;
  const auto options = MFACOptions(args.lr).num_grads(args.num_grads).damping(args.damping);
  const auto mfac = [options](const std::string& format) {
    return [options = MFACOptions(options).window_format(format).topk(0.1)](Parameters p) {
      return std::make_unique<MFAC>(std::move(p), options);
    };
  };
  std::vector<std::pair<std::string, MakeOptimizer>> result;
  for (const std::string format : {"float32", "bfloat16", "int8", "topk"}) {
    result.emplace_back("MFAC " + format, mfac(format));
  }
  result.emplace_back("AdamW", [](Parameters p) { return std::make_unique<AdamW>(p, AdamWOptions(1e-2)); });
  result.emplace_back("SGD", [](Parameters p) { return std::make_unique<SGD>(p, SGDOptions(0.1).momentum(0.9)); });
  return result;
}

Split load(const Arguments& args) {
  const auto data = examples::read_csv(args.data);
  const auto x = examples::scale_features(data.x, args.scale == "column");
  torch::manual_seed(args.seed);
  const auto order = torch::randperm(x.size(0));
  const auto train = order.slice(0, 0, x.size(0) * 1400 / 1797), test = order.slice(0, train.size(0));
  return {x.index({train}), data.y.index({train}), x.index({test}), data.y.index({test}), data.classes};
}

Run start(const std::string& name, const MakeOptimizer& make, const Split& data, const Arguments& args) {
  torch::manual_seed(args.seed);
  torch::nn::Linear hidden(data.train_x.size(1), 64), output(64, data.classes);  // named: C++ does not order arguments
  torch::nn::Sequential model(hidden, torch::nn::Tanh(), output);
  auto optimizer = make(model->parameters());
  const double lr = optimizer->param_groups()[0].options().get_lr();
  return {name, model, std::move(optimizer), lr, {}, {}, {}};
}

// `first` is the number of the epoch's first step, of `total` in all.
void train_epoch(Run& run, const Split& data, const std::vector<torch::Tensor>& batches, size_t first, size_t total) {
  const auto begin = std::chrono::steady_clock::now();
  for (size_t i = 0; i < batches.size(); ++i) {
    const double left = 1 - static_cast<double>(first + i) / static_cast<double>(total);
    run.optimizer->param_groups()[0].options().set_lr(run.lr * left);
    run.optimizer->zero_grad();
    F::cross_entropy(run.model->forward(data.train_x.index({batches[i]})), data.train_y.index({batches[i]})).backward();
    run.optimizer->step();
  }
  run.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
}

void evaluate(Run& run, const Split& data) {
  const torch::NoGradGuard no_grad;
  run.train_loss.push_back(F::cross_entropy(run.model->forward(data.train_x), data.train_y).item<double>());
  const auto right = run.model->forward(data.test_x).argmax(1).eq(data.test_y).sum().item<double>();
  run.test_accuracy.push_back(right / static_cast<double>(data.test_y.size(0)));
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

std::string window_size(const Run& run) {
  const auto* mfac = dynamic_cast<const MFAC*>(run.optimizer.get());
  return mfac == nullptr ? "-" : examples::format("%.2f MB", static_cast<double>(mfac->memory_bytes()) / 1e6);
}

void print_results(const std::vector<Run>& runs) {
  const auto& adamw =
      std::find_if(runs.begin(), runs.end(), [](const Run& run) { return run.name == "AdamW"; })->seconds;
  std::vector<std::vector<std::string>> rows{
      {"optimizer", "window", "final train loss", "test accuracy", "s/epoch", "x AdamW"}};
  for (const auto& run : runs) {
    auto ratios = run.seconds;
    std::transform(ratios.begin(), ratios.end(), adamw.begin(), ratios.begin(), std::divides<>());
    rows.push_back({run.name, window_size(run), examples::format("%.4f", run.train_loss.back()),
                    examples::format("%.4f", run.test_accuracy.back()), examples::format("%.4f", median(run.seconds)),
                    examples::format("%.2f", median(ratios))});
  }
  examples::print_table(rows);
}

// The format of examples/python/train_mfac.py, read by examples/python/plot_digits.py.
void write_json(const std::vector<Run>& runs, const Split& data, const Arguments& args) {
  std::ofstream out(args.json);
  out << std::setprecision(17) << "{\"language\": \"C++\", \"torch\": \"" TORCH_VERSION "\", \"seed\": " << args.seed
      << ", \"epochs\": " << args.epochs << ", \"batch\": " << args.batch
      << ", \"train_rows\": " << data.train_y.size(0) << ", \"test_rows\": " << data.test_y.size(0) << ", \"runs\": [";
  const auto list = [&out](const char* key, const std::vector<double>& values) {
    out << ", \"" << key << "\": [";
    for (std::size_t i = 0; i < values.size(); ++i) {
      out << (i ? ", " : "");
      std::isfinite(values[i]) ? out << values[i] : out << "NaN";
    }
    out << "]";
  };
  for (const auto& run : runs) {
    out << (&run == &runs[0] ? "\n" : ",\n") << "{\"optimizer\": \"" << run.name << "\"";
    list("train_loss", run.train_loss);
    list("test_accuracy", run.test_accuracy);
    list("seconds", run.seconds);
    out << "}";
  }
  out << "\n]}\n";
  if (!out.flush()) throw std::runtime_error(args.json + ": cannot be written: " + std::strerror(errno));
}

}  // namespace

int main(int argc, char** argv) try {
  Arguments args;
  CLI::App app("Trains a digits classifier with M-FAC and compares it with AdamW and SGD.");
  app.option_defaults()->always_capture_default();
  app.add_option("--data", args.data, "CSV: numeric features, last column an integer label, header optional");
  app.add_option("--scale", args.scale, "one factor for all features, or one a column")
      ->check(CLI::IsMember({"all", "column"}));
  app.add_option("--epochs", args.epochs, "passes over the training rows")->check(CLI::Range(1, 1000000));
  app.add_option("--batch", args.batch, "rows per step")->check(CLI::Range(1, 1000000));
  app.add_option("--seed", args.seed, "of the split, the initial weights and the batches");
  app.add_option("--lr", args.lr, "M-FAC: learning rate; keep lr * num-grads near 0.5 to 1");
  app.add_option("--num-grads", args.num_grads, "M-FAC: gradients in the window");
  app.add_option("--damping", args.damping, "M-FAC: lambda");
  app.add_option("--json", args.json, "write the curves to this file");
  app.add_flag("--quiet", args.quiet, "no progress, only the table");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  torch::set_num_threads(1);  // a network this small runs fastest so
  const auto data = load(args);
  std::vector<Run> runs;
  for (const auto& [name, make] : optimizers(args)) runs.push_back(start(name, make, data, args));
  const examples::Progress progress("epoch", args.epochs, args.quiet);
  for (int epoch = 1; epoch <= args.epochs; ++epoch) {
    const auto batches = torch::randperm(data.train_y.size(0)).split(args.batch);
    const size_t steps = batches.size(), done = steps * static_cast<size_t>(epoch - 1);
    std::string news = "loss";
    for (auto& run : runs) {
      train_epoch(run, data, batches, done, steps * static_cast<size_t>(args.epochs));
      evaluate(run, data);
      news += examples::format("  %s %.4f", run.name.c_str(), run.train_loss.back());
    }
    progress.update(epoch, news);
  }
  print_results(runs);
  if (!args.json.empty()) write_json(runs, data, args);
  return 0;
} catch (const examples::CsvError& error) {
  std::cerr << error.what() << "\n";
  return 2;
} catch (const std::exception& error) {
  std::cerr << "train_mfac: " << error.what() << "\n";
  return 1;
}
