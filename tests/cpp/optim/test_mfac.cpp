// M-FAC itself; what it shares with every optimizer, its trajectories included, is in test_optimizer_base.cpp.
// SpecNN names the numbered acceptance test of M-FAC (arXiv:2107.03356).
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/optim/mfac.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../../examples/cpp/common/csv.h"
#include "support/check.h"
#include "support/problems.h"

namespace torch_ext::optim {
namespace {

using test::clones;
using test::equal_bits;
using test::expect_error;
using test::Problem;
using test::relative_error;
using test::same_bits;
using test::same_value;
using test::tanh_layer;
using test::TemporaryFile;
using test::ThreadCount;

using Grads = std::vector<at::Tensor>;  // undefined: no gradient

at::Tensor randn(at::IntArrayRef shape, int64_t seed = 0) {
  torch::manual_seed(static_cast<uint64_t>(seed));
  return torch::randn(shape, at::kDouble);
}
at::Tensor leaf(const at::Tensor& values) { return values.detach().clone().requires_grad_(); }

double error(const at::Tensor& a, const at::Tensor& b) {
  return ((a.detach().to(at::kDouble) - b).norm() / b.norm()).item<double>();
}

at::Tensor dense_fisher(const at::Tensor& rows, double damping, int64_t m) {
  return damping * torch::eye(rows.size(1), at::kDouble) + torch::matmul(rows.t(), rows) / static_cast<double>(m);
}

MFACOptions small(double lr = 0.1, int64_t m = 4, double damping = 0.1) {
  return MFACOptions(lr).num_grads(m).damping(damping);
}

void take_step(MFAC& optimizer, const std::vector<at::Tensor>& params, const Grads& grads) {
  for (size_t i = 0; i < params.size(); ++i) {
    params[i].mutable_grad() = grads[i].defined() ? grads[i].clone() : at::Tensor();
  }
  optimizer.step();
}

// The update of the last of these rows: each step starts from zero with lr 1.
at::Tensor last_update(MFAC& optimizer, const at::Tensor& x, const at::Tensor& rows) {
  for (int64_t t = 0; t < rows.size(0); ++t) {
    x.detach().zero_();
    take_step(optimizer, {x}, {rows[t]});
  }
  return -x.detach();
}

const ParamState& state_of(const MFAC& optimizer, const at::Tensor& param) {
  return static_cast<const ParamState&>(*optimizer.state().at(param.unsafeGetTensorImpl()));
}

// What a step must leave alone if it is rejected: not the counts of rejected rows, and not the spare slot of the window
// (with its half of the error buffer), into which a row is encoded before it is judged.
std::vector<at::Tensor> snapshot(const MFAC& optimizer, const std::vector<at::Tensor>& params) {
  std::vector<at::Tensor> result = clones(params);
  for (const at::Tensor& param : params) {
    const auto found = optimizer.state().find(param.unsafeGetTensorImpl());
    if (found == optimizer.state().end()) continue;
    const auto& tensors = static_cast<const ParamState&>(*found->second).tensors;
    for (const auto& [name, tensor] : tensors) {
      if (name == "global_skipped") continue;
      const at::Tensor copy = tensor.clone();
      const auto ring = [&](int64_t field) { return tensors.at("window_ring")[field].item<int64_t>(); };
      const bool by_slot = name == "window_rows" || name == "window_scales" || name == "window_indices";
      if (by_slot && copy.numel() > 0) copy.select(1, ring(1)).zero_();
      if (name == "window_error" && copy.numel() > 0) copy[1 - ring(8) % 2].zero_();
      if (name == "window_ring") copy.slice(0, 4, 6).zero_();
      result.push_back(copy);
    }
  }
  return result;
}

static_assert(std::is_move_constructible_v<MFAC> && !std::is_copy_constructible_v<MFAC>);
static_assert(std::is_convertible_v<double, MFACOptions> && std::is_default_constructible_v<MFACOptions>);

TEST(MFACOptionsTest, AccessorsAndDefaults) {
  const MFACOptions standard;
  EXPECT_EQ(standard.lr(), 1e-3);
  EXPECT_EQ(standard.momentum(), 0);
  EXPECT_EQ(standard.weight_decay(), 0);
  EXPECT_FALSE(standard.dampening().has_value());
  EXPECT_FALSE(standard.decoupled_weight_decay());
  EXPECT_EQ(standard.num_grads(), 1024);
  EXPECT_EQ(standard.damping(), 1e-5);
  EXPECT_EQ(standard.window_format(), "float32");
  EXPECT_EQ(standard.topk(), 0.01);
  EXPECT_FALSE(standard.error_feedback());
  EXPECT_FALSE(standard.warmup_scaling());
  EXPECT_EQ(standard.warmup_steps(), 0);
  EXPECT_EQ(standard.blocks(), "global");
  EXPECT_FALSE(standard.window_device().has_value());
  EXPECT_FALSE(standard.maximize());
  const auto all = MFACOptions(0.1)
                       .momentum(0.9)
                       .weight_decay(0.2)
                       .dampening(0.5)
                       .decoupled_weight_decay(true)
                       .num_grads(7)
                       .damping(0.3)
                       .window_format("int8")
                       .topk(0.2)
                       .error_feedback(true)
                       .warmup_scaling(true)
                       .warmup_steps(3)
                       .blocks("per_group")
                       .window_device("cpu")
                       .maximize(true);
  EXPECT_EQ(all.lr(), 0.1);
  EXPECT_EQ(all.dampening(), 0.5);
  EXPECT_EQ(all.num_grads(), 7);
  EXPECT_EQ(all.window_format(), "int8");
  EXPECT_EQ(all.window_device(), "cpu");
  for (const Field& field : all.schema().fields) EXPECT_TRUE(all.is_set(field.name)) << field.name;
}

TEST(MFAC, Spec01HandCase) {
  for (const std::string format : {"float64", "float32", "bfloat16"}) {
    const at::Tensor x = leaf(torch::zeros({2}, at::kDouble));
    MFAC optimizer({x}, small(1, 2, 0.5).window_format(format));
    const at::Tensor rows = torch::tensor({1.0, 0.0, 1.0, 1.0}, at::kDouble).view({2, 2});
    EXPECT_LE(error(last_update(optimizer, x, rows), torch::tensor({0.4, 0.8}, at::kDouble)),
              format == "float64" ? 1e-15 : 1e-7);
    EXPECT_EQ(optimizer.window_count(), 2);
  }
}

TEST(MFAC, Spec02TheDenseSolve) {
  for (const auto& [m, d, damping] :
       {std::tuple<int64_t, int64_t, double>{32, 100, 1e-5}, {32, 20, 1e-3}, {64, 300, 1e-6}}) {
    const at::Tensor rows = randn({m, d}), x = leaf(torch::zeros({d}, at::kDouble));
    MFAC optimizer({x}, small(1, m, damping).window_format("float64"));
    const at::Tensor dense = dense_fisher(rows, damping, m);
    const at::Tensor values = at::linalg_eigvalsh(dense);
    const double bound = 20 * (values[-1] / values[0]).item<double>() * std::numeric_limits<double>::epsilon();
    EXPECT_LE(error(last_update(optimizer, x, rows), at::linalg_solve(dense, rows[-1])), bound);
  }
}

TEST(MFAC, Spec07Limits) {
  const at::Tensor g = randn({50}), x = leaf(torch::zeros({50}, at::kDouble));
  const double norm = g.dot(g).item<double>();
  MFAC one({x}, small(1, 1, 0.3).window_format("float64")), equal({x}, small(1, 7, 0.3).window_format("float64"));
  EXPECT_LE(error(last_update(one, x, g.unsqueeze(0)), g / (0.3 + norm)), 1e-14);
  EXPECT_LE(error(last_update(equal, x, g.expand({9, 50})), g / (0.3 + norm)), 1e-12);
  MFAC large({x}, small(1, 3, 1e9).window_format("float64"));
  EXPECT_LE(error(last_update(large, x, randn({5, 50}, 1)), randn({5, 50}, 1)[-1] / 1e9), 1e-6);
}

TEST(MFAC, Spec08WarmupScaling) {
  constexpr int64_t m = 16;
  const at::Tensor rows = randn({10, 40});
  for (int64_t t = 1; t <= rows.size(0); ++t) {
    const at::Tensor x = leaf(torch::zeros({40}, at::kDouble));
    MFAC optimizer({x}, small(1, m, 1e-2).window_format("float64").warmup_scaling(true));
    const at::Tensor seen = rows.slice(0, 0, t);
    const double share = static_cast<double>(m) / static_cast<double>(t);
    EXPECT_LE(
        error(last_update(optimizer, x, seen), at::linalg_solve(dense_fisher(seen, 1e-2 * share, t), rows[t - 1])),
        1e-12)
        << t;
  }
}

TEST(MFAC, WarmupStepsUseOneRowAlone) {
  const at::Tensor rows = randn({4, 6});
  const at::Tensor x = leaf(torch::zeros({6}, at::kDouble));
  MFAC optimizer({x}, small(1, 5, 0.3).window_format("float64").warmup_steps(3));
  for (int64_t t = 0; t < 4; ++t) {
    const at::Tensor u = last_update(optimizer, x, rows.slice(0, t, t + 1));
    const at::Tensor alone = 5 * rows[t] / (5 * 0.3 + rows[t].dot(rows[t]));
    EXPECT_LE(error(u, t < 3 ? alone : at::linalg_solve(dense_fisher(rows, 0.3, 5), rows[t])), 1e-13) << t;
  }
}

// Train loss and test accuracy after the last epoch; the rate falls linearly to zero.
std::pair<double, double> train_digits(uint64_t seed, const MFACOptions& options) {
  const auto data = examples::read_csv(TORCH_EXT_TEST_DATA_DIR "/../examples/data/digits.csv");
  torch::manual_seed(seed);
  const at::Tensor order = torch::randperm(data.x.size(0));
  const at::Tensor x = data.x.index({order}) / 16, y = data.y.index({order});
  const auto train_x = x.slice(0, 0, 1400), train_y = y.slice(0, 0, 1400);
  torch::manual_seed(seed);
  torch::nn::Linear hidden(64, 64), output(64, 10);
  torch::nn::Sequential model(hidden, torch::nn::Tanh(), output);
  MFAC optimizer(model->parameters(), options);
  int step = 0;
  for (int epoch = 0; epoch < 20; ++epoch) {
    for (const at::Tensor& batch : torch::randperm(1400).split(100)) {
      optimizer.param_groups()[0].options().set_lr(options.lr() * (1 - step++ / 280.0));
      optimizer.step([&] {
        return torch::nn::functional::cross_entropy(model->forward(train_x.index({batch})), train_y.index({batch}));
      });
    }
  }
  const torch::NoGradGuard no_grad;
  const at::Tensor right = model->forward(x.slice(0, 1400)).argmax(1).eq(y.slice(0, 1400));
  const at::Tensor loss = torch::nn::functional::cross_entropy(model->forward(train_x), train_y);
  return {loss.item<double>(), right.to(at::kDouble).mean().item<double>()};
}

// With a constant rate the Python test takes medians over epochs instead, and both languages give the same bits there.
TEST(MFAC, Spec11Digits) {
  const ThreadCount one(1);
  for (const uint64_t seed : {0, 1, 2}) {
    const auto [loss, accuracy] = train_digits(seed, small(1e-2, 64, 1e-3));
    EXPECT_LE(loss, 0.03) << seed;
    EXPECT_GE(accuracy, 0.96) << seed;
  }
}

const std::vector<std::pair<std::string, MFACOptions>>& variants() {
  static const std::vector<std::pair<std::string, MFACOptions>> result{
      {"float32", small()},
      {"float64", small().window_format("float64").momentum(0.9)},
      {"bfloat16", small().window_format("bfloat16").error_feedback(true)},
      {"int8", small().window_format("int8").weight_decay(0.1)},
      {"topk", small().window_format("topk").topk(0.1).momentum(0.5).dampening(0.0)},
      {"decoupled", small().weight_decay(0.1).decoupled_weight_decay(true)},
      {"warm-up", small().warmup_scaling(true).warmup_steps(6)},
      {"per group", small().blocks("per_group").momentum(0.5)}};
  return result;
}

std::vector<at::Tensor> two_params() { return {leaf(randn({30, 40})), leaf(randn({70}, 1))}; }
std::vector<torch::optim::OptimizerParamGroup> groups(const std::vector<at::Tensor>& params) {
  return {torch::optim::OptimizerParamGroup({params[0]}), torch::optim::OptimizerParamGroup({params[1]})};
}
Grads gradients(int64_t t) { return {randn({30, 40}, 2 * t + 5), randn({70}, 2 * t + 6)}; }

TEST(MFAC, Spec13ANonfiniteGradientChangesNothing) {
  for (const auto& [name, options] : variants()) {
    const auto params = two_params(), undisturbed = two_params();
    MFAC optimizer(groups(params), options), other(groups(undisturbed), options);
    int64_t skips = 0;
    for (int64_t t = 0; t < 11; ++t) {
      if (t == 1 || t == 3 || t == 4 || t == 7) {
        const auto before = snapshot(optimizer, params);
        for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
          for (const size_t index : {0, 1}) {
            Grads broken = gradients(t);
            broken[index].view(-1)[-1] = bad;
            take_step(optimizer, params, broken);
            EXPECT_TRUE(equal_bits(snapshot(optimizer, params), before)) << name << " at " << t;
            EXPECT_EQ(optimizer.skipped_steps().item<int64_t>(), ++skips) << name;
          }
        }
      }
      take_step(optimizer, params, gradients(t));
      take_step(other, undisturbed, gradients(t));
    }
    EXPECT_TRUE(equal_bits(params, undisturbed)) << name;
  }
}

TEST(MFAC, Spec13Resume) {
  for (const auto& [name, options] : variants()) {
    for (const int64_t stop : {1, 4, 9}) {
      const auto straight = two_params();
      MFAC whole(groups(straight), options);
      for (int64_t t = 0; t < stop + 9; ++t) take_step(whole, straight, gradients(t));
      for (const bool archive : {false, true}) {
        const auto params = two_params();
        const TemporaryFile file;
        MFAC first(groups(params), options), second(groups(params));
        for (int64_t t = 0; t < stop; ++t) take_step(first, params, gradients(t));
        if (archive) {
          torch::save(first, file.path());
          torch::load(second, file.path());
        } else {
          first.save_state_dict(file.path());
          second.load_state_dict(file.path());
        }
        for (int64_t t = stop; t < stop + 9; ++t) take_step(second, params, gradients(t));
        EXPECT_TRUE(equal_bits(params, straight)) << name;
        EXPECT_TRUE(same_value(second.state_dict(), whole.state_dict())) << name;
      }
    }
  }
}

TEST(MFAC, Spec13WithoutTheWindowItStartsEmpty) {
  const auto params = two_params();
  const TemporaryFile whole, small_file;
  MFAC optimizer(params, small().momentum(0.9)), other(params, small().momentum(0.9));
  for (int64_t t = 0; t < 6; ++t) take_step(optimizer, params, gradients(t));
  optimizer.save_state_dict(whole.path());
  optimizer.save_state_dict(small_file.path(), /*include_window=*/false);
  EXPECT_LT(std::filesystem::file_size(small_file.path()), std::filesystem::file_size(whole.path()) / 2);
  other.load_state_dict(small_file.path());
  EXPECT_EQ(optimizer.window_count(), 4);
  EXPECT_EQ(other.window_count(), 0);
  EXPECT_TRUE(same_bits(state_of(other, params[0]).at("momentum_buffer"),
                        state_of(optimizer, params[0]).at("momentum_buffer")));
  take_step(other, params, gradients(9));
  EXPECT_EQ(other.window_count(), 1);
}

TEST(MFAC, Spec13DampingChangesAsIfItHadAlwaysBeen) {
  const at::Tensor rows = randn({9, 60}), x = leaf(torch::zeros({60}, at::kDouble));
  MFAC changed({x}, small(1, 6, 0.5).window_format("float64")), fresh({x}, small(1, 6, 0.02).window_format("float64"));
  last_update(changed, x, rows.slice(0, 0, 7));
  changed.set_damping(0.02);
  const at::Tensor u = last_update(changed, x, rows.slice(0, 7));
  EXPECT_LE(error(u, last_update(fresh, x, rows)), 1e-13);
  expect_error<c10::ValueError>([&] { changed.set_damping(0); }, "damping");
}

TEST(MFAC, Spec13UndefinedGradients) {
  const std::vector<at::Tensor> params{leaf(randn({4, 5})), leaf(randn({6}, 1)), leaf(randn({3}, 2))};
  MFAC optimizer(params, small(0.1, 3, 0.2).momentum(0.5).window_format("float64"));
  std::vector<at::Tensor> rows;
  std::vector<at::Tensor> expected = clones(params), buffers;
  for (const at::Tensor& p : expected) buffers.push_back(torch::zeros_like(p));
  for (int64_t t = 0; t < 8; ++t) {
    Grads grads{randn({4, 5}, 3 * t), randn({6}, 3 * t + 1), randn({3}, 3 * t + 2)};
    grads[static_cast<size_t>(t % 3)] = at::Tensor();
    std::vector<at::Tensor> parts;
    for (size_t i = 0; i < 3; ++i) {
      parts.push_back((grads[i].defined() ? grads[i] : torch::zeros_like(expected[i])).reshape(-1));
    }
    rows.push_back(torch::cat(parts));
    if (rows.size() > 3) rows.erase(rows.begin());
    const at::Tensor u = at::linalg_solve(dense_fisher(torch::stack(rows), 0.2, 3), rows.back());
    const auto pieces = u.split_with_sizes({20, 6, 3});
    const auto before = clones(params);
    take_step(optimizer, params, grads);
    for (size_t i = 0; i < 3; ++i) {
      if (!grads[i].defined()) {
        EXPECT_TRUE(same_bits(params[i], before[i]));
        continue;
      }
      buffers[i] = 0.5 * buffers[i] + 0.5 * pieces[i].view_as(buffers[i]);
      expected[i] = expected[i] - 0.1 * buffers[i];
      EXPECT_LT(relative_error(params[i], expected[i]), 1e-12) << t;
    }
  }
  const auto before = snapshot(optimizer, params);
  take_step(optimizer, params, {at::Tensor(), at::Tensor(), at::Tensor()});
  EXPECT_TRUE(equal_bits(snapshot(optimizer, params), before));
}

TEST(MFAC, Spec13ThreadCountsGiveTheSameBits) {
  for (const std::string format : {"float32", "float64", "bfloat16", "int8", "topk"}) {
    std::vector<at::Tensor> first;
    for (const int threads : {1, 2, 3}) {
      const ThreadCount guard(threads);
      const std::vector<at::Tensor> params{leaf(randn({300, 400}).to(at::kFloat)),
                                           leaf(randn({70001}).to(at::kBFloat16))};
      MFAC optimizer(params, small().momentum(0.9).window_format(format));
      for (int64_t t = 0; t < 7; ++t) {
        take_step(optimizer, params, {randn({300, 400}, t).to(at::kFloat), randn({70001}, t).to(at::kBFloat16)});
      }
      if (first.empty()) first = snapshot(optimizer, params);
      EXPECT_TRUE(equal_bits(snapshot(optimizer, params), first)) << format << ", " << threads << " threads";
    }
  }
}

TEST(MFAC, Precondition) {
  const std::vector<at::Tensor> params{leaf(randn({3, 4})), leaf(randn({5}, 1))};
  MFAC optimizer(params, small(0.1, 4, 0.3).window_format("float64"));
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < 6; ++t) {
    const Grads grads{randn({3, 4}, t), randn({5}, t + 50)};
    if (t >= 2) rows.push_back(torch::cat({grads[0].view(-1), grads[1]}));
    take_step(optimizer, params, grads);
  }
  const std::vector<at::Tensor> x{randn({3, 4}, 90), randn({5}, 91)};
  const auto y = optimizer.precondition(x);
  const at::Tensor expected =
      at::linalg_solve(dense_fisher(torch::stack(rows), 0.3, 4), torch::cat({x[0].view(-1), x[1]}));
  EXPECT_LE(error(torch::cat({y[0].view(-1), y[1]}), expected), 1e-12);
  const auto partial = optimizer.precondition({x[0], at::Tensor()});
  EXPECT_FALSE(partial[1].defined());
}

TEST(MFAC, Bug5ClosuresRun) {  // the published optimizer refuses them
  const Problem a = tanh_layer(), b = a.copy(), c = a.copy();
  MFAC returns(a.params, small()), backward(b.params, small()), none(c.params, small());
  for (int i = 0; i < 6; ++i) {
    const at::Tensor loss = returns.step(a.closure());
    EXPECT_FALSE(loss.requires_grad());
    const auto run = [](MFAC& optimizer, const Problem& problem) {
      optimizer.zero_grad();
      const at::Tensor value = problem.loss(problem.params);
      value.backward();
      return value;
    };
    EXPECT_TRUE(same_bits(backward.step([&] { return run(backward, b); }), loss));
    run(none, c);
    EXPECT_FALSE(none.step().defined());
    EXPECT_TRUE(equal_bits(b.params, a.params));
    EXPECT_TRUE(equal_bits(c.params, a.params));
  }
}

TEST(MFAC, Bug8DecoupledDecayIsScaledByTheLearningRate) {
  const at::Tensor x = leaf(torch::tensor({2.0, -4.0}, at::kDouble));
  MFAC optimizer({x}, small(0.25, 3, 1).weight_decay(0.5).decoupled_weight_decay(true));
  take_step(optimizer, {x}, {torch::zeros({2}, at::kDouble)});
  EXPECT_TRUE(same_bits(x, torch::tensor({1.75, -3.5}, at::kDouble)));
}

TEST(MFAC, MemoryIsKnownBeforeItIsTaken) {
  const at::Tensor x = leaf(torch::zeros({100000}));
  const MFAC optimizer({x}, MFACOptions().num_grads(16));
  EXPECT_GE(optimizer.memory_bytes(), 4 * 17 * 98 * 1024);
  EXPECT_LE(optimizer.memory_bytes(), 4 * 17 * 98 * 1024 + 100000);
  MFAC large({x}, MFACOptions().num_grads(200000000));
  expect_error<c10::ValueError>([&] { take_step(large, {x}, {torch::ones({100000})}); }, "num_grads");
}

TEST(MFAC, ACheckpointOfAnotherWindowIsRefused) {
  const auto params = two_params();
  const TemporaryFile file;
  MFAC source(params, small());
  for (int64_t t = 0; t < 6; ++t) take_step(source, params, gradients(t));
  source.save_state_dict(file.path());
  const at::Tensor other = leaf(randn({9000}));
  MFAC target({other}, small());
  expect_error<c10::Error>([&] { target.load_state_dict(file.path()); }, "parameters");
  auto dict = source.state_dict().toGenericDict();
  dict.at("param_groups").toListRef()[0].toGenericDict().insert_or_assign("num_grads", int64_t{6});
  MFAC same(params, small());
  expect_error<c10::ValueError>([&] { same.load_state_dict(dict); }, "MFAC");
}

TEST(MFAC, GradientsThatCannotBeUsed) {
  const auto params = two_params();
  MFAC optimizer(params, small());
  params[0].mutable_grad() = randn({30, 40});
  params[1].mutable_grad() = torch::ones({70}, at::kDouble).to_sparse();
  expect_error<c10::Error>([&] { optimizer.step(); }, "parameter 1");
  EXPECT_EQ(optimizer.window_count(), 0);
}

}  // namespace
}  // namespace torch_ext::optim
