// The fused AdaHessian update against the machine's limit, torch's fused AdamW and the same algorithm composed of
// LibTorch ops. One thread. Bytes are counted from the algorithm: 32 an element on a refresh step, 24 between, 28 for
// AdamW.
#include <ATen/Parallel.h>
#include <ATen/ops/_fused_adamw.h>
#include <torch/torch.h>
#include <torch_ext/ops/rademacher.h>
#include <torch_ext/optim/adahessian.h>

#include <cmath>
#include <numeric>
#include <tuple>

#include "../support/paired.h"
#include "../support/probe.h"

namespace {

using torch_ext::bench::report_pairs;
using torch_ext::optim::AdaHessian;
using torch_ext::optim::AdaHessianInputs;
using torch_ext::optim::AdaHessianOptions;

// Parameters with gradients and a given Hessian diagonal, and every optimizer that steps on them.
struct Problem {
  std::vector<at::Tensor> params, hessian;
  AdaHessianInputs inputs;

  Problem(int64_t tensors, int64_t numel) {
    for (int64_t i = 0; i < tensors; ++i) {
      params.push_back(torch::randn({numel}, torch::requires_grad()));
      params.back().mutable_grad() = torch::randn({numel});
      hessian.push_back(torch::randn({numel}));
    }
    inputs.hessian = hessian;
  }
};

// The op alone, with lists ready: what the bandwidth targets are about.
struct FusedUpdate {
  std::vector<at::Tensor> params, grads, curvature, exp_avg, second, steps, bias;
  at::Tensor nonfinite = torch::zeros({});

  explicit FusedUpdate(const Problem& problem) : params(problem.params), curvature(problem.hessian) {
    for (const at::Tensor& param : params) {
      grads.push_back(param.grad());
      exp_avg.push_back(torch::zeros_like(param, torch::requires_grad(false)));
      second.push_back(torch::zeros_like(param, torch::requires_grad(false)));
      steps.push_back(torch::zeros({}));
      bias.push_back(torch::ones({2}, torch::kDouble));
    }
  }
  void operator()(bool refresh) {
    const torch::NoGradGuard no_grad;
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::adahessian_step_", "");
    torch::jit::Stack stack;
    torch::jit::push(stack, params, grads, refresh ? curvature : std::vector<at::Tensor>{}, exp_avg, second, steps,
                     bias, nonfinite, c10::IValue(), 0.15, 0.9, 0.999, 1e-4, 0.0, 1.0, c10::IValue(), "none",
                     int64_t{0}, true, "abs_mean", int64_t{1}, refresh, false, 1.0, false, false);
    op.callBoxed(stack);
  }
};

struct FusedAdamW {
  std::vector<at::Tensor> params, grads, exp_avg, exp_avg_sq, none, steps;
  explicit FusedAdamW(const Problem& problem) : params(problem.params) {
    for (const at::Tensor& param : params) {
      grads.push_back(param.grad());
      exp_avg.push_back(torch::zeros_like(param, torch::requires_grad(false)));
      exp_avg_sq.push_back(torch::zeros_like(param, torch::requires_grad(false)));
      steps.push_back(torch::ones({}));
    }
  }
  void operator()() {
    const torch::NoGradGuard no_grad;
    at::_fused_adamw_(params, grads, exp_avg, exp_avg_sq, none, steps, 1e-3, 0.9, 0.999, 1e-2, 1e-8, false, false);
  }
};

// The algorithm as one writes it with LibTorch ops, one tensor at a time, in place where that saves a pass. With probes
// it starts from Hz and draws z as the peers do; without, the Hessian diagonal is given.
struct Composed {
  std::vector<at::Tensor> params, hz, exp_avg, second;
  int64_t t = 0;
  explicit Composed(const Problem& problem) : params(problem.params), hz(problem.hessian) {
    for (const at::Tensor& param : params) {
      exp_avg.push_back(torch::zeros_like(param, torch::requires_grad(false)));
      second.push_back(torch::zeros_like(param, torch::requires_grad(false)));
    }
  }
  void operator()(bool probes) {
    const torch::NoGradGuard no_grad;
    at::Tensor sum = torch::zeros({});  // the guard against non-finite input, as one reads it off two sums
    for (size_t i = 0; i < params.size(); ++i) sum += params[i].grad().sum() + hz[i].sum();
    if (!std::isfinite(sum.item<float>())) return;
    ++t;
    const double c1 = 1 - std::pow(0.9, static_cast<double>(t)), c2 = 1 - std::pow(0.999, static_cast<double>(t));
    for (size_t i = 0; i < params.size(); ++i) {
      at::Tensor diagonal = hz[i];
      if (probes) diagonal = torch::randint(0, 2, params[i].sizes(), torch::kFloat).mul_(2).sub_(1).mul_(hz[i]);
      exp_avg[i].mul_(0.9).add_(params[i].grad(), 0.1);
      second[i].mul_(0.999).addcmul_(diagonal, diagonal, 0.001);
      const at::Tensor denominator = second[i].div(c2).sqrt_().add_(1e-4);
      params[i].addcdiv_(exp_avg[i], denominator, -0.15 / c1);
    }
  }
};

void fused_update(benchmark::State& state) {
  at::set_num_threads(1);
  const int64_t n = state.range(0);
  const Problem problem(1, n);
  FusedUpdate update(problem);
  FusedAdamW adamw(problem);
  auto p = torch::randn({n}), m = torch::randn({n}), v = torch::randn({n}), g = torch::randn({n}),
       h = torch::randn({n});
  const auto f = [](const at::Tensor& t) { return t.data_ptr<float>(); };
  const auto bytes = static_cast<double>(n);
  report_pairs(state, {{"probe(p,m,v,g,h)", 32 * bytes,
                        [&] { torch_ext::bench::probe_refresh(f(p), f(m), f(v), f(g), f(h), n); }},
                       {"refresh step", 32 * bytes, [&] { update(true); }},
                       {"AdamW fused", 28 * bytes, [&] { adamw(); }}});
}

void lazy_update(benchmark::State& state) {
  at::set_num_threads(1);
  const int64_t n = state.range(0);
  const Problem problem(1, n);
  FusedUpdate update(problem);
  update(true);
  auto p = torch::randn({n}), m = torch::randn({n}), v = torch::randn({n}), g = torch::randn({n});
  const auto f = [](const at::Tensor& t) { return t.data_ptr<float>(); };
  const auto bytes = static_cast<double>(n);
  report_pairs(state, {{"probe(p,m,v,g)", 24 * bytes, [&] { torch_ext::bench::probe_lazy(f(p), f(m), f(v), f(g), n); }},
                       {"first-order step", 24 * bytes, [&] { update(false); }}});
}

// A whole optimizer step in C++, checks and non-finite scan included, against composed LibTorch ops; probes apart.
void cpp_step(benchmark::State& state) {
  at::set_num_threads(1);
  const Problem problem(state.range(0), state.range(1));
  AdaHessian optimizer(problem.params, AdaHessianOptions(0.15));
  Composed composed(problem);
  FusedAdamW adamw(problem);
  FusedUpdate update(problem);
  std::vector<int64_t> ordinals(problem.params.size());
  std::iota(ordinals.begin(), ordinals.end(), 0);
  const auto probes = torch_ext::ops::rademacher_probe(problem.params, ordinals, 0, 0, 0);
  report_pairs(state,
               {{"AdaHessian.step", 0, [&] { optimizer.step(problem.inputs); }},
                {"composed LibTorch", 0, [&] { composed(false); }},
                {"step with probes", 0,
                 [&] {
                   torch_ext::ops::rademacher_refill_(probes, ordinals, 0, 0, 0);
                   optimizer.step(problem.inputs);
                 }},
                {"composed LibTorch with probes", 0, [&] { composed(true); }},
                {"fused op alone", 0, [&] { update(true); }},
                {"AdamW fused op", 0, [&] { adamw(); }}},
               21, state.range(1) < 100000 ? 20 : 1);
}

BENCHMARK(fused_update)->Arg(10000000)->Arg(20000000)->Iterations(1)->Unit(benchmark::kMillisecond);
BENCHMARK(lazy_update)->Arg(10000000)->Iterations(1)->Unit(benchmark::kMillisecond);
BENCHMARK(cpp_step)
    ->Args({200, 1000})
    ->Args({1, 1000000})
    ->Args({1, 10000000})
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
