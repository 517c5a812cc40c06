// A step of the Fisher window (gather, encode and products; the m x m part; the combination) against two plain reads of
// a window of its size, the formats against float32, and the m x m part against a Cholesky factorization. One thread.
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../support/paired.h"
#include "../support/probe.h"
#include "curvature/fisher_window/fisher_window_op.h"

namespace {

namespace curvature = torch_ext::curvature;
using torch_ext::bench::report_pairs;
using torch_ext::bench::Side;

constexpr double kDamping = 1e-4;

// A full window, with the tensors of a step.
struct Window {
  curvature::FisherWindowLayout layout;
  curvature::FisherWindowState state;
  at::Tensor dots, coefficients, sum;
  std::vector<at::Tensor> gradients;  // taken in turn
  size_t next = 0;

  Window(int64_t m, int64_t d, const std::string& format) : layout{m, d, format} {
    state = curvature::fisher_window_state(layout, torch::kCPU);
    dots = torch::zeros({m + 2}, torch::kDouble);
    coefficients = torch::zeros({m + 1}, torch::kDouble);
    for (int64_t i = 0; i <= m; ++i) {
      gradients = {torch::randn({d})};
      step();
    }
    for (int i = 0; i < 7; ++i) gradients.push_back(torch::randn({d}));
  }
  void products() {
    const at::Tensor& row = gradients[next++ % gradients.size()];
    c10::List<std::optional<at::Tensor>> grads;
    grads.push_back(row);
    curvature::fisher_window_dots_(state.rows, state.scales, state.indices, state.error, dots, state.ring, grads, {row},
                                   {0.0}, false, std::nullopt, layout.format);
  }
  void commit() {
    curvature::fisher_window_commit_(state.gram, state.factor, state.ring, coefficients, dots, kDamping, false, 0, -1,
                                     std::nullopt);
  }
  void combine() {
    sum = curvature::fisher_window_combine(state.rows, state.scales, state.indices, coefficients, state.ring,
                                           layout.dim, layout.format);
  }
  void step() {
    products();
    commit();
    combine();
  }
  double bytes() const { return 2.0 * static_cast<double>(state.rows.numel() * state.rows.element_size()); }
};

void read_twice(const at::Tensor& rows) {
  const auto n = rows.numel() * rows.element_size() / static_cast<int64_t>(sizeof(float));
  for (int i = 0; i < 2; ++i) {
    benchmark::DoNotOptimize(torch_ext::bench::probe_read(static_cast<const float*>(rows.data_ptr()), n));
  }
}

int repeats(const benchmark::State& state) {
  return static_cast<int>(std::max<int64_t>(1, int64_t{20'000'000} / (state.range(0) * state.range(1))));
}

void step_against_reads(benchmark::State& state, const std::string& format) {
  at::set_num_threads(1);
  Window window(state.range(0), state.range(1), format);
  const double bytes = window.bytes();
  report_pairs(state,
               {{"two reads", bytes, [&] { read_twice(window.state.rows); }},
                {"step", bytes, [&] { window.step(); }},
                {"first pass", bytes / 2, [&] { window.products(); }},
                {"second pass", bytes / 2, [&] { window.combine(); }}},
               21, repeats(state));
}

void formats(benchmark::State& state) {
  at::set_num_threads(1);
  std::vector<Window> windows;
  std::vector<Side> sides;
  for (const char* format : {"float32", "bfloat16", "int8", "topk"}) {
    windows.emplace_back(state.range(0), state.range(1), format);
  }
  for (Window& window : windows) {
    sides.push_back({window.layout.format, 0, [&window] { window.step(); }});
  }
  report_pairs(state, sides, 21, repeats(state));
}

void small_matrix(benchmark::State& state) {
  at::set_num_threads(1);
  const int64_t m = state.range(0);
  Window window(m, 4 * m, "float32");
  window.products();
  auto* dots = window.dots.data_ptr<double>();
  const auto* spare = window.state.ring.const_data_ptr<int64_t>() + 1;
  const double square = dots[*spare];
  const auto next_row = [&] {  // the products of a row that is nearly orthogonal to the others, wherever it goes
    const int64_t slot = *spare;
    std::fill(dots, dots + m + 1, 0.01 * square / static_cast<double>(m));
    dots[slot] = square;
    window.commit();
  };
  const at::Tensor slots = window.state.gram.slice(0, 0, m).slice(1, 0, m);
  const at::Tensor k = slots + static_cast<double>(m) * torch::eye(m, torch::kDouble);
  report_pairs(
      state,
      {{"potrf", 0, [&] { benchmark::DoNotOptimize(at::linalg_cholesky(k)); }}, {"drop, append, solve", 0, next_row}},
      41, static_cast<int>(std::max<int64_t>(1, 256 / m)));
}

void sizes(benchmark::internal::Benchmark* b) {
  for (const int64_t m : {64, 256, 1024}) {
    for (const int64_t d : {10'000, 100'000, 300'000}) b->Args({m, d});
  }
  b->Iterations(1)->Unit(benchmark::kMillisecond);
}

BENCHMARK_CAPTURE(step_against_reads, float32, "float32")->Apply(sizes);
BENCHMARK_CAPTURE(step_against_reads, bfloat16, "bfloat16")->Apply(sizes);
BENCHMARK_CAPTURE(step_against_reads, int8, "int8")->Apply(sizes);
BENCHMARK(formats)
    ->Args({64, 1'000'000})
    ->Args({256, 100'000})
    ->Args({1024, 100'000})
    ->Args({1024, 300'000})
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);
BENCHMARK(small_matrix)->Arg(64)->Arg(256)->Arg(1024)->Iterations(1)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
