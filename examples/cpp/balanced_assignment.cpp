// Clusters the digits with and without balance: the loss of a training loop is a transport of rows to centres.
//
//   build/bin/balanced_assignment [--data FILE] [--clusters 10] [--steps 100] [--spread 0.5] [--seed 0]
//
// Centres mu are learned by Adam on features scaled to [0, 1], with C_ik = |x_i - mu_k|^2 / 2.
//   nearest    the mean of each row's smallest cost: k-means by gradient. Centres that start behind others never win a
//              row, get no gradient and stay empty.
//   balanced   V of ops::sinkhorn_newton with equal masses on both sides: every centre must take its share. The
//   gradient
//              with respect to C is the plan, and f of the step before is the start of the next solve.
//
// The table: rows of the smallest and the largest cluster (of the row's likeliest centre), purity (share of rows whose
// label is the commonest of their cluster), passes over the cost of the first and of a later solve (median), seconds.
#include <torch/torch.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/csv.h"
#include "common/progress.h"
#include "common/table.h"

namespace {

using torch_ext::ops::sinkhorn_newton, torch_ext::ops::SinkhornOptions;

struct Arguments {
  std::string data = "examples/data/digits.csv";
  int64_t clusters = 10;
  int steps = 100;
  double spread = 0.5;
  uint64_t seed = 0;
  bool quiet = false;
};

struct Result {
  torch::Tensor assignment;    // [rows] int64
  std::vector<double> passes;  // of each solve
  double seconds = 0;
};

torch::Tensor costs(const torch::Tensor& x, const torch::Tensor& centres) {
  return 0.5 * torch::cdist(x, centres, 2, /*compute_mode=*/2).square();
}

// One loss of the centres; `balanced` keeps its potentials between the steps.
class Assignment {
 public:
  explicit Assignment(bool balanced) : balanced_(balanced) {}

  torch::Tensor loss(const torch::Tensor& C, Result& result) {
    if (!balanced_) return std::get<0>(C.min(1)).mean();
    const auto a = torch::full({C.size(0)}, 1.0 / C.size(0), C.options().requires_grad(false));
    const auto b = torch::full({C.size(1)}, 1.0 / C.size(1), C.options().requires_grad(false));
    const auto solution = sinkhorn_newton(C, a, b, SinkhornOptions(0.05), start_);
    start_ = solution.f.detach();
    plan_ = solution.plan.detach();
    result.passes.push_back(solution.info[2].item<double>());
    return solution.value;
  }

  torch::Tensor winners(const torch::Tensor& C) const { return balanced_ ? plan_.argmax(1) : C.argmin(1); }

 private:
  bool balanced_;
  std::optional<torch::Tensor> start_;
  torch::Tensor plan_;
};

Result train(const torch::Tensor& x, const Arguments& args, bool balanced) {
  torch::manual_seed(args.seed);
  auto centres = (x.mean(0) + args.spread * torch::randn({args.clusters, x.size(1)})).set_requires_grad(true);
  torch::optim::Adam optimizer({centres}, torch::optim::AdamOptions(0.02));
  Assignment assignment(balanced);
  Result result;
  const examples::Progress progress(balanced ? "balanced" : "nearest ", args.steps, args.quiet);
  const auto begin = std::chrono::steady_clock::now();
  for (int step = 1; step <= args.steps; ++step) {
    optimizer.zero_grad();
    const auto loss = assignment.loss(costs(x, centres), result);
    loss.backward();
    optimizer.step();
    progress.update(step, examples::format("loss %.4f", loss.item<double>()));
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  result.assignment = assignment.winners(costs(x, centres).detach());
  return result;
}

std::vector<std::string> row(const std::string& name, const Result& result, const torch::Tensor& labels,
                             const Arguments& args) {
  const auto sizes = torch::bincount(result.assignment, {}, args.clusters);
  int64_t right = 0;
  for (int64_t k = 0; k < args.clusters; ++k) {
    const auto members = labels.index({result.assignment == k});
    if (members.numel() > 0) right += torch::bincount(members).max().item<int64_t>();
  }
  std::vector<double> later(result.passes.begin() + (result.passes.empty() ? 0 : 1), result.passes.end());
  std::sort(later.begin(), later.end());
  return {name,
          std::to_string(sizes.min().item<int64_t>()),
          std::to_string(sizes.max().item<int64_t>()),
          examples::format("%.3f", static_cast<double>(right) / static_cast<double>(labels.size(0))),
          result.passes.empty() ? "-" : examples::format("%.0f", result.passes[0]),
          later.empty() ? "-" : examples::format("%.0f", later[later.size() / 2]),
          examples::format("%.2f", result.seconds)};
}

void run(const Arguments& args) {
  const auto data = examples::read_csv(args.data);
  const auto x = examples::scale_features(data.x, /*per_column=*/false);
  std::vector<std::vector<std::string>> table{
      {"loss", "smallest", "largest", "purity", "passes first", "passes later", "seconds"}};
  table.push_back(row("nearest", train(x, args, false), data.y, args));
  table.push_back(row("balanced", train(x, args, true), data.y, args));
  examples::print_table(table);
}

}  // namespace

int main(int argc, char** argv) {
  Arguments args;
  CLI::App app{"Clusters the digits with and without balance"};
  app.add_option("--data", args.data, "CSV file, the last column a label")->capture_default_str();
  app.add_option("--clusters", args.clusters)->check(CLI::Range(2, 1000))->capture_default_str();
  app.add_option("--steps", args.steps)->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--spread", args.spread, "of the centres at the start")
      ->check(CLI::Range(0.0, 10.0))
      ->capture_default_str();
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
