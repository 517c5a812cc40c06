// What the programs share that train the same small classifier with several optimizers in turn.
//
// Model: features - 64 - classes, tanh; cross-entropy; features divided by their largest value (16 for the digits);
// a random 78 % of the rows (1400 of the 1797 digits) train, the others test.
// Every random number comes from torch's generator, in the order in which examples/python/training.py draws them:
// programs of both languages, and all optimizers, see the same split, the same initial weights and the same batches.
#pragma once

#include <torch/torch.h>

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

#include "csv.h"
#include "progress.h"
#include "table.h"

namespace examples {

struct TrainingArguments {
  std::string data = "examples/data/digits.csv", scale = "all", json;
  int epochs = 20, batch = 100;
  uint64_t seed = 0;
  bool quiet = false;
};

inline void add_training_options(CLI::App& app, TrainingArguments& args) {
  app.option_defaults()->always_capture_default();
  app.add_option("--data", args.data, "CSV: numeric features, last column an integer label, header optional");
  app.add_option("--scale", args.scale, "one factor for all features, or one a column")
      ->check(CLI::IsMember({"all", "column"}));
  app.add_option("--epochs", args.epochs, "passes over the training rows")->check(CLI::Range(1, 1000000));
  app.add_option("--batch", args.batch, "rows per step")->check(CLI::Range(1, 1000000));
  app.add_option("--seed", args.seed, "of the split, the initial weights and the batches");
  app.add_option("--json", args.json, "write the curves to this file");
  app.add_flag("--quiet", args.quiet, "no progress, only the table");
}

struct Split {
  torch::Tensor train_x, train_y, test_x, test_y;
  int64_t classes;
};

inline Split load_split(const TrainingArguments& args) {
  const auto data = read_csv(args.data);
  const auto x = scale_features(data.x, args.scale == "column");
  torch::manual_seed(args.seed);
  const auto order = torch::randperm(x.size(0));
  const auto train = order.slice(0, 0, x.size(0) * 1400 / 1797), test = order.slice(0, train.size(0));
  return {x.index({train}), data.y.index({train}), x.index({test}), data.y.index({test}), data.classes};
}

struct Run {
  std::string name;
  torch::nn::Sequential model;
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  double lr;                                               // at the start
  std::vector<double> train_loss, test_accuracy, seconds;  // one value an epoch
};

using Parameters = std::vector<torch::Tensor>;
using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(Parameters)>;

inline Run start_run(const std::string& name, const MakeOptimizer& make, const Split& data, uint64_t seed) {
  torch::manual_seed(seed);
  torch::nn::Linear hidden(data.train_x.size(1), 64), output(64, data.classes);  // named: C++ does not order arguments
  torch::nn::Sequential model(hidden, torch::nn::Tanh(), output);
  auto optimizer = make(model->parameters());
  const double lr = optimizer->param_groups()[0].options().get_lr();
  return {name, model, std::move(optimizer), lr, {}, {}, {}};
}

inline void evaluate(Run& run, const Split& data) {
  namespace F = torch::nn::functional;
  const torch::NoGradGuard no_grad;
  run.train_loss.push_back(F::cross_entropy(run.model->forward(data.train_x), data.train_y).item<double>());
  const auto right = run.model->forward(data.test_x).argmax(1).eq(data.test_y).sum().item<double>();
  run.test_accuracy.push_back(right / static_cast<double>(data.test_y.size(0)));
}

// Trains all runs, which take turns epoch by epoch. step(run, x, y, left): one step on a batch; `left` is the share of
// the training that is not done yet, 1 at the first step.
template <class Step>
void train_in_turns(std::vector<Run>& runs, const Split& data, const TrainingArguments& args, const Step& step) {
  const Progress progress("epoch", args.epochs, args.quiet);
  for (int epoch = 1; epoch <= args.epochs; ++epoch) {
    const auto batches = torch::randperm(data.train_y.size(0)).split(args.batch);
    const auto steps = static_cast<double>(batches.size()), first = steps * (epoch - 1), total = steps * args.epochs;
    std::string news = "loss";
    for (auto& run : runs) {
      const auto begin = std::chrono::steady_clock::now();
      for (std::size_t i = 0; i < batches.size(); ++i) {
        const double left = 1 - (first + static_cast<double>(i)) / total;
        step(run, data.train_x.index({batches[i]}), data.train_y.index({batches[i]}), left);
      }
      run.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
      evaluate(run, data);
      news += format("  %s %.4f", run.name.c_str(), run.train_loss.back());
    }
    progress.update(epoch, news);
  }
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

// Median over the epochs of the seconds of `run` over those of the run called `other`; "-" if that one did not run.
inline std::string relative_cost(const Run& run, const std::vector<Run>& runs, const std::string& other) {
  const auto base = std::find_if(runs.begin(), runs.end(), [&](const Run& r) { return r.name == other; });
  if (base == runs.end()) return "-";
  auto ratios = run.seconds;
  std::transform(ratios.begin(), ratios.end(), base->seconds.begin(), ratios.begin(), std::divides<>());
  return format("%.2f", median(ratios));
}

// The format of examples/python/training.py, read by examples/python/plot_digits.py. `more`: further integers.
inline void write_curves(const std::vector<Run>& runs, const Split& data, const TrainingArguments& args,
                         const std::vector<std::pair<std::string, int64_t>>& more = {}) {
  if (args.json.empty()) return;
  std::ofstream out(args.json);
  out << std::setprecision(17) << "{\"language\": \"C++\", \"torch\": \"" TORCH_VERSION "\", \"seed\": " << args.seed
      << ", \"epochs\": " << args.epochs << ", \"batch\": " << args.batch;
  for (const auto& [name, value] : more) out << ", \"" << name << "\": " << value;
  out << ", \"train_rows\": " << data.train_y.size(0) << ", \"test_rows\": " << data.test_y.size(0) << ", \"runs\": [";
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

// What main returns: parses the arguments, calls `body`, reports what goes wrong. 2: bad arguments or data, 1: the
// rest.
template <class Body>
int run_program(const char* name, CLI::App& app, int argc, char** argv, const Body& body) try {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  body();
  return 0;
} catch (const CsvError& error) {
  std::cerr << error.what() << "\n";
  return 2;
} catch (const std::exception& error) {
  std::cerr << name << ": " << error.what() << "\n";
  return 1;
}

}  // namespace examples
