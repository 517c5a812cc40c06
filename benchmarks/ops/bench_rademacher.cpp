// Rademacher probes: Philox into a tensor that stands ready, against storing a constant and against torch's randint * 2
// - 1.
#include <ATen/Parallel.h>
#include <torch/torch.h>
#include <torch_ext/ops/rademacher.h>

#include "../support/paired.h"

namespace {

void rademacher(benchmark::State& state) {
  at::set_num_threads(1);
  const int64_t n = state.range(0);
  const auto bytes = 4 * static_cast<double>(n);
  at::Tensor z = torch::empty({n}), constant = torch::empty({n}), other = torch::empty({n});
  torch_ext::bench::report_pairs(state, {{"fill_", bytes, [&] { constant.fill_(1.0); }},
                                         {"rademacher_", bytes, [&] { torch_ext::ops::rademacher_(z, 0, 0); }},
                                         {"random_ * 2 - 1", bytes, [&] { other.random_(0, 2).mul_(2).sub_(1); }}});
}

BENCHMARK(rademacher)->Arg(1000000)->Arg(10000000)->Iterations(1)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
