// Trains a small byte-level mixture-of-experts transformer with each way to balance its experts, and with none.
//
//   build/bin/train_moe [--text FILE] [--steps 200] [--seed 0] [--json FILE]
//
// The text is that of Python's own help (pydoc_data/topics.py of an installed Python), or your file; nine tenths train.
// The model: bytes embedded in 64 numbers, two layers of attention and a mixture of 16 experts (2 per token, one
// shared), AdamW with a rate that falls linearly to 0. All runs see the same batches and start from the same weights:
//
//   nothing        the router alone
//   aux loss       the balance loss of Switch and GShard, coefficient 0.01
//   sign, proportional, momentum, quantile        torch_ext::optim::ALFLB with this rule
//
// The table, and the file that --json writes, are those of examples/python/train_moe.py, which explains and draws them
// (plot_moe.py).
#include <torch/torch.h>
#include <torch_ext/moe/layer.h>
#include <torch_ext/moe/losses.h>
#include <torch_ext/moe/route.h>
#include <torch_ext/optim/alflb.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/progress.h"
#include "common/table.h"

namespace {

namespace F = torch::nn::functional;
namespace moe = torch_ext::moe;
using torch::Tensor;
using torch_ext::optim::ALFLB, torch_ext::optim::ALFLBOptions;

constexpr int64_t kDim = 64, kHeads = 4, kLayers = 2, kExperts = 16, kTopK = 2, kHidden = 64;

struct Arguments {
  std::string text, json;
  std::vector<std::string> only;
  int steps = 200;
  int64_t batch = 64, length = 64;
  double lr = 3e-3, aux = 1e-2;
  uint64_t seed = 0;
  bool quiet = false;
};

struct TextError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Causal attention, then a mixture of experts.
struct BlockImpl : torch::nn::Module {
  BlockImpl() {
    for (const char* name : {"norm0", "norm1"}) {
      norms.push_back(register_module(name, torch::nn::LayerNorm(torch::nn::LayerNormOptions({kDim}))));
    }
    qkv = register_module("qkv", torch::nn::Linear(kDim, 3 * kDim));
    out = register_module("out", torch::nn::Linear(kDim, kDim));
    experts = register_module(
        "experts",
        moe::MoELayer(
            moe::MoELayerOptions(kDim, kHidden, kExperts).shared_experts(1).route(moe::RouteOptions().top_k(kTopK))));
  }

  // The new x, and `aux` times the balance loss.
  std::pair<Tensor, Tensor> forward(Tensor x, double aux) {
    const int64_t rows = x.size(0), length = x.size(1);
    const auto heads = qkv(norms[0](x)).reshape({rows, length, 3, kHeads, -1}).permute({2, 0, 3, 1, 4}).unbind();
    const Tensor mixed = at::scaled_dot_product_attention(heads[0], heads[1], heads[2], {}, 0.0, /*is_causal=*/true);
    x = x + out(mixed.transpose(1, 2).reshape({rows, length, kDim}));
    const Tensor inner = norms[1](x);
    return {x + experts(inner), balance_loss(inner, aux)};
  }

  Tensor balance_loss(const Tensor& inner, double aux) const {
    if (aux == 0) return torch::zeros({});
    const auto& router = *experts->router;
    const Tensor logits = inner.flatten(0, 1).matmul(router.weight.t());
    const auto routed = moe::route(logits.detach(), router.expert_bias, moe::RouteOptions().top_k(kTopK));
    return moe::balance_loss(logits, routed.counts, aux, "sigmoid");
  }

  std::vector<torch::nn::LayerNorm> norms;
  torch::nn::Linear qkv{nullptr}, out{nullptr};
  moe::MoELayer experts{nullptr};
};
TORCH_MODULE(Block);

// Next-byte prediction.
struct ModelImpl : torch::nn::Module {
  explicit ModelImpl(int64_t length) {
    bytes = register_module("bytes", torch::nn::Embedding(256, kDim));
    places = register_module("places", torch::nn::Embedding(length, kDim));
    for (int64_t i = 0; i < kLayers; ++i) blocks.push_back(register_module("block" + std::to_string(i), Block()));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kDim})));
    head = register_module("head", torch::nn::Linear(kDim, 256));
  }

  // tokens [B, T + 1] -> mean cross-entropy, and `aux` times the balance losses.
  std::pair<Tensor, Tensor> forward(const Tensor& tokens, double aux = 0) {
    const int64_t length = tokens.size(1) - 1;
    Tensor x = bytes(tokens.slice(1, 0, length)) + places->weight.slice(0, 0, length), extra = torch::zeros({});
    for (Block& block : blocks) {
      Tensor loss;
      std::tie(x, loss) = block->forward(x, aux);
      extra = extra + loss;
    }
    return {F::cross_entropy(head(norm(x)).flatten(0, 1), tokens.slice(1, 1).flatten()), extra};
  }

  std::vector<moe::MoERouter> routers() const {
    std::vector<moe::MoERouter> result;
    for (const Block& block : blocks) result.push_back(block->experts->router);
    return result;
  }

  torch::nn::Embedding bytes{nullptr}, places{nullptr};
  std::vector<Block> blocks;
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Model);

const std::vector<std::pair<std::string, std::optional<ALFLBOptions>>>& kinds() {
  static const std::vector<std::pair<std::string, std::optional<ALFLBOptions>>> all{
      {"nothing", std::nullopt},
      {"aux loss", std::nullopt},
      {"sign", ALFLBOptions(5e-3)},
      {"proportional", ALFLBOptions(0.2).rule("proportional")},
      {"momentum", ALFLBOptions(5e-3).rule("momentum")},
      {"quantile", ALFLBOptions().rule("quantile").ema(0.5)},
  };
  return all;
}

std::vector<std::vector<int64_t>> counts_of(const std::vector<Tensor>& loads) {
  std::vector<std::vector<int64_t>> result;
  for (const Tensor& load : loads) {
    const Tensor flat = load.contiguous();
    result.emplace_back(flat.data_ptr<int64_t>(), flat.data_ptr<int64_t>() + flat.numel());
  }
  return result;
}

template <typename Value>
double mean_over(const std::vector<torch_ext::optim::LoadReport>& reports, Value torch_ext::optim::LoadReport::*field) {
  double sum = 0;
  for (const auto& report : reports) sum += static_cast<double>(report.*field);
  return sum / static_cast<double>(reports.size());
}

// A model, what balances it, and what became of them.
struct Run {
  Run(std::string run_name, const std::optional<ALFLBOptions>& options, const Arguments& args)
      : name(std::move(run_name)), aux(name == "aux loss" ? args.aux : 0), lr(args.lr), steps(args.steps) {
    torch::manual_seed(args.seed);
    model = Model(args.length);
    optimizer = std::make_unique<torch::optim::AdamW>(model->parameters(), torch::optim::AdamWOptions(args.lr));
    // A rate of 0 only reads the loads, for the curve of the runs that nothing balances.
    balancer = std::make_unique<ALFLB>(*model, options.value_or(ALFLBOptions(0)));
  }

  void step(const Tensor& tokens) {
    const auto begin = std::chrono::steady_clock::now();
    const auto [byte_loss, extra] = model->forward(tokens, aux);
    (byte_loss + extra).backward();
    if (first_loads.empty()) first_loads = counts_of(balancer->loads());
    optimizer->param_groups()[0].options().set_lr(lr * (1 - static_cast<double>(loss.size()) / steps));
    optimizer->step();
    balancer->step();
    optimizer->zero_grad();
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const auto report = balancer->report();
    loss.push_back(byte_loss.item<double>());
    max_vio.push_back(mean_over(report, &torch_ext::optim::LoadReport::max_vio));
    floor = report[0].floor;
  }

  // Loss, and loads over all tokens: counted in the forward pass for once.
  void validate(const std::vector<Tensor>& batches) {
    const torch::NoGradGuard no_grad;
    for (moe::MoERouter router : model->routers()) router->options.route().count_in("forward");
    for (const Tensor& tokens : batches) {
      valid_loss += model->forward(tokens).first.item<double>() / static_cast<double>(batches.size());
    }
    const auto report = balancer->report(/*pending=*/true);
    valid_max_vio = mean_over(report, &torch_ext::optim::LoadReport::max_vio);
    for (const auto& entry : report) valid_dead += entry.dead;
    valid_loads = counts_of(balancer->loads());
    balancer->discard();
    for (moe::MoERouter router : model->routers()) router->options.route().count_in("backward");
  }

  std::string name;
  double aux, lr, steps;
  Model model{nullptr};
  std::unique_ptr<torch::optim::AdamW> optimizer;
  std::unique_ptr<ALFLB> balancer;
  std::vector<double> loss, max_vio;  // one value a step
  std::vector<std::vector<int64_t>> first_loads, valid_loads;
  double floor = 0, seconds = 0, valid_loss = 0, valid_max_vio = 0;
  int64_t valid_dead = 0;
};

std::string default_text() {
  namespace fs = std::filesystem;
  for (const char* root : {"/usr/lib", "/usr/local/lib"}) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(root, error)) {
      const fs::path file = entry.path() / "pydoc_data" / "topics.py";
      if (entry.path().filename().string().rfind("python3", 0) == 0 && fs::exists(file, error)) return file.string();
    }
  }
  throw TextError("no Python was found whose help could be the text: give a file with --text");
}

// Training bytes and validation batches.
std::pair<Tensor, std::vector<Tensor>> load(const Arguments& args) {
  const std::string path = args.text.empty() ? default_text() : args.text;
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) throw TextError(path + ": cannot be read: " + std::strerror(errno));
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (bytes.size() < 100000) {
    throw TextError(path + ": " + std::to_string(bytes.size()) + " bytes, expected at least 100000");
  }
  const auto size = static_cast<int64_t>(bytes.size());
  const Tensor data = torch::from_blob(bytes.data(), {size}, torch::kUInt8).to(torch::kLong);
  const Tensor train = data.slice(0, 0, size * 9 / 10), rest = data.slice(0, size * 9 / 10);
  const int64_t width = args.length + 1, rows = std::min(16 * args.batch, rest.size(0) / width);
  return {train, rest.slice(0, 0, rows * width).reshape({rows, width}).split(args.batch)};
}

double late(const std::vector<double>& values) {  // mean of the last tenth
  const auto count = std::max<std::ptrdiff_t>(1, static_cast<std::ptrdiff_t>(values.size()) / 10);
  return std::accumulate(values.end() - count, values.end(), 0.0) / static_cast<double>(count);
}

void print_results(const std::vector<Run>& runs) {
  std::vector<std::vector<std::string>> rows{
      {"balance", "train loss", "valid loss", "MaxVio", "floor", "MaxVio valid", "dead", "ms/step"}};
  for (const Run& run : runs) {
    rows.push_back({run.name});
    for (const double x : {late(run.loss), run.valid_loss, late(run.max_vio), run.floor, run.valid_max_vio}) {
      rows.back().push_back(examples::format("%.4f", x));
    }
    rows.back().push_back(std::to_string(run.valid_dead));
    rows.back().push_back(examples::format("%.1f", 1e3 * run.seconds / static_cast<double>(run.loss.size())));
  }
  examples::print_table(rows);
}

template <typename Value>
void write_list(std::ostream& out, const std::vector<Value>& values) {
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
}

void write_loads(std::ostream& out, const char* key, const std::vector<std::vector<int64_t>>& loads) {
  out << ", \"" << key << "\": [";
  for (size_t i = 0; i < loads.size(); ++i) {
    out << (i ? ", " : "");
    write_list(out, loads[i]);
  }
  out << "]";
}

void write_json(const std::vector<Run>& runs, const Arguments& args) {
  std::ofstream out(args.json);
  out << std::setprecision(17) << "{\"language\": \"C++\", \"torch\": \"" TORCH_VERSION "\", \"seed\": " << args.seed
      << ", \"steps\": " << args.steps << ", \"runs\": [";
  for (const Run& run : runs) {
    out << (&run == &runs[0] ? "\n" : ",\n") << "{\"name\": \"" << run.name << "\", \"loss\": ";
    write_list(out, run.loss);
    out << ", \"max_vio\": ";
    write_list(out, run.max_vio);
    out << ", \"floor\": " << run.floor;
    write_loads(out, "first_loads", run.first_loads);
    out << ", \"valid_loss\": " << run.valid_loss << ", \"valid_max_vio\": " << run.valid_max_vio
        << ", \"valid_dead\": " << run.valid_dead;
    write_loads(out, "valid_loads", run.valid_loads);
    out << "}";
  }
  out << "\n]}\n";
  if (!out.flush()) throw std::runtime_error(args.json + ": cannot be written: " + std::strerror(errno));
}

int train(const Arguments& args) {
  const auto [text, valid] = load(args);
  std::vector<Run> runs;
  for (const auto& [name, options] : kinds()) {
    if (!args.only.empty() && std::find(args.only.begin(), args.only.end(), name) == args.only.end()) continue;
    runs.emplace_back(name, options, args);
  }
  const examples::Progress progress("step", args.steps, args.quiet);
  const Tensor window = torch::arange(args.length + 1);
  torch::manual_seed(args.seed);
  for (int step = 1; step <= args.steps; ++step) {
    const Tensor tokens =
        text.index({torch::randint(text.size(0) - args.length, {args.batch, 1}, torch::kLong) + window});
    std::string news = "MaxVio";
    for (Run& run : runs) {
      run.step(tokens);
      news += examples::format("  %s %.2f", run.name.c_str(), run.max_vio.back());
    }
    progress.update(step, news);
  }
  for (Run& run : runs) run.validate(valid);
  print_results(runs);
  if (!args.json.empty()) write_json(runs, args);
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  Arguments args;
  std::vector<std::string> names;
  for (const auto& kind : kinds()) names.push_back(kind.first);
  CLI::App app("Trains a small mixture-of-experts transformer with each way to balance its experts.");
  app.option_defaults()->always_capture_default();
  app.add_option("--text", args.text, "any file of at least 100 kB; its bytes are the tokens (default: Python's help)");
  app.add_option("--steps", args.steps, "of training")->check(CLI::Range(1, 1000000));
  app.add_option("--batch", args.batch, "sequences per step")->check(CLI::Range(1, 100000));
  app.add_option("--length", args.length, "bytes per sequence")->check(CLI::Range(1, 100000));
  app.add_option("--lr", args.lr, "of AdamW");
  app.add_option("--aux", args.aux, "coefficient of the balance loss");
  app.add_option("--seed", args.seed, "of the weights and the batches");
  app.add_option("--only", args.only, "some of the runs")->check(CLI::IsMember(names));
  app.add_option("--json", args.json, "write the curves to this file");
  app.add_flag("--quiet", args.quiet, "no progress, only the table");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  torch::set_num_threads(1);  // a network this small gains nothing from more
  return train(args);
} catch (const TextError& error) {
  std::cerr << error.what() << "\n";
  return 2;
} catch (const std::exception& error) {
  std::cerr << "train_moe: " << error.what() << "\n";
  return 1;
}
