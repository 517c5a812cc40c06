#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch_ext/moe/stochastic_balance.h>

#include <limits>
#include <tuple>
#include <utility>

#include "core/check.h"
#include "core/library.h"
#include "moe/stochastic_balance/stochastic_balance_op.h"

namespace torch_ext::moe {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Shapes with symbolic sizes, for the real kernels and the Meta one.
Results empty_results(const at::Tensor& probability, int64_t top_k, int64_t replicates) {
  std::vector<c10::SymInt> outer = probability.sym_sizes().vec();
  const c10::SymInt m = outer.back();
  outer.pop_back();
  const c10::SymInt n = outer.back();
  outer.back() = replicates;
  auto per_server = outer, per_slot = outer;
  per_server.push_back(m);
  per_slot.push_back(n);
  per_slot.emplace_back(top_k);
  const auto options = probability.options().requires_grad(false);
  return {at::empty_symint(per_slot, options.dtype(at::kInt)), at::empty_symint(per_slot, options.dtype(at::kBool)),
          at::empty_symint(per_server, options.dtype(at::kDouble)),
          at::empty_symint(outer, options.dtype(at::kDouble))};
}

BalanceOptions options_of(const OptionalTensor& table, std::string_view rule, std::string_view g, int64_t top_k,
                          std::string_view overflow, int64_t seed, int64_t replicates) {
  return BalanceOptions()
      .rule(std::string(rule))
      .g(std::string(g))
      .table(table.value_or(at::Tensor()))
      .top_k(top_k)
      .overflow(std::string(overflow))
      .seed(seed)
      .replicates(replicates);
}

Results balance_impl(const at::Tensor& probability, const OptionalTensor& weight, const OptionalTensor& capacity,
                     const OptionalTensor& table, std::string_view rule, std::string_view g, int64_t top_k,
                     std::string_view overflow, int64_t seed, int64_t replicates) {
  const at::NoGradGuard no_grad;
  const BalanceArguments args =
      balance_arguments(probability, weight, capacity, options_of(table, rule, g, top_k, overflow, seed, replicates));
  auto results = empty_results(probability, top_k, replicates);
  const auto& [choice, success, load, value] = results;
  load.zero_();
  const at::Tensor attempts = at::zeros(load.sizes(), load.options().dtype(at::kLong));
  const at::Tensor done = at::zeros_like(attempts), room = at::empty_like(load);
  const kernels::BalanceResult pointers{
      choice.data_ptr<int32_t>(),   success.data_ptr<bool>(), load.data_ptr<double>(), value.data_ptr<double>(),
      attempts.data_ptr<int64_t>(), done.data_ptr<int64_t>(), room.data_ptr<double>()};
  if (probability.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(probability.device());
    kernels::stochastic_balance_cuda(args.problem, pointers, core::current_stream(probability.device()));
#endif
  } else {
    at::parallel_for(0, args.problem.batch * replicates, 1, [&](int64_t begin, int64_t end) {
      kernels::stochastic_balance_cpu(args.problem, pointers, begin, end);
    });
  }
  return results;
}

Results balance_meta(const at::Tensor& probability, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     std::string_view, std::string_view, int64_t top_k, std::string_view, int64_t, int64_t replicates) {
  return empty_results(probability, top_k, replicates);
}

// A problem for the exact values, on the CPU.
BalanceArguments one_problem(const char* what, const at::Tensor& probability, const OptionalTensor& weight,
                             const OptionalTensor& capacity, const BalanceOptions& options) {
  TORCH_CHECK_VALUE(probability.dim() == 2, what, ": probabilities must be [arrivals, servers], got ",
                    probability.sizes());
  TORCH_CHECK_VALUE(options.top_k() == 1, what, ": one server per arrival (top_k 1)");
  const auto on_cpu = [](const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(tensor->cpu()) : std::nullopt;
  };
  return balance_arguments(probability.cpu(), on_cpu(weight), on_cpu(capacity), options);
}

}  // namespace

BalanceResult stochastic_balance(const at::Tensor& probability, const OptionalTensor& weight,
                                 const OptionalTensor& capacity, const BalanceOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::stochastic_balance", "")
                             .typed<decltype(balance_impl)>();
  auto [choice, success, load, value] =
      op.call(probability, weight, capacity, options.table().defined() ? OptionalTensor(options.table()) : std::nullopt,
              options.rule(), options.g(), options.top_k(), options.overflow(), options.seed(), options.replicates());
  return {std::move(choice), std::move(success), std::move(load), std::move(value)};
}

double stochastic_balance_exact(const at::Tensor& probability, const OptionalTensor& weight,
                                const OptionalTensor& capacity, const BalanceOptions& options) {
  const auto args = one_problem("stochastic_balance_exact", probability, weight, capacity, options);
  TORCH_CHECK_VALUE(args.problem.arrivals <= 16,
                    "stochastic_balance_exact: at most 16 arrivals (it takes 2^n steps), got ", args.problem.arrivals);
  return kernels::stochastic_balance_exact_cpu(args.problem);
}

double stochastic_optimum(const at::Tensor& probability, const OptionalTensor& weight) {
  const auto args = one_problem("stochastic_optimum", probability, weight, std::nullopt, {});
  TORCH_CHECK_VALUE(args.problem.servers <= 16, "stochastic_optimum: at most 16 servers (it takes 2^m memory), got ",
                    args.problem.servers);
  TORCH_CHECK_VALUE(args.problem.weight_arrival == 0, "stochastic_optimum: weight must be [servers]");
  return kernels::stochastic_optimum_cpu(args.problem.probability, args.problem.weight, args.problem.arrivals,
                                         args.problem.servers);
}

double fluid_lp_equal_p(const at::Tensor& edges, double p, const OptionalTensor& capacity) {
  TORCH_CHECK_TYPE(edges.scalar_type() == at::kBool, "fluid_lp_equal_p: edges must be bool, got ", edges.scalar_type());
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "fluid_lp_equal_p: p must lie in [0, 1], got ", p);
  const auto args = one_problem("fluid_lp_equal_p", edges.to(at::kDouble), std::nullopt, capacity, {});
  const at::Tensor graph = edges.cpu().contiguous();
  return kernels::fluid_lp_cpu(graph.const_data_ptr<bool>(), p, args.problem.capacity, args.problem.arrivals,
                               args.problem.servers);
}

void balance_check(int64_t servers, const OptionalTensor& weight, const OptionalTensor& capacity,
                   const BalanceOptions& options) {
  TORCH_CHECK_VALUE(servers >= 1, "OnlineAssigner: at least one server");
  balance_arguments(at::zeros({1, servers}, at::kDouble), weight, capacity, options);
}

int64_t balance_assign(const at::Tensor& probability, const OptionalTensor& weight, const OptionalTensor& capacity,
                       const BalanceOptions& options, const at::Tensor& load, const at::Tensor& attempts,
                       const at::Tensor& done) {
  TORCH_CHECK_VALUE(probability.dim() == 1 && probability.size(0) == load.numel(), "assign: probabilities must be [",
                    load.numel(), "], got ", probability.sizes());
  const auto args = balance_arguments(probability.cpu().unsqueeze(0), weight, capacity, options);
  const kernels::BalanceProblem& problem = args.problem;
  const int64_t server =
      kernels::balance_choose(problem, problem.probability, problem.weight, load.const_data_ptr<double>(),
                              attempts.const_data_ptr<int64_t>(), done.const_data_ptr<int64_t>());
  if (server < 0) return server;
  attempts.data_ptr<int64_t>()[server] += 1;
  load.data_ptr<double>()[server] += problem.probability[server] / static_cast<double>(problem.capacity[server]);
  return server;
}

void balance_report(const at::Tensor& attempts, const at::Tensor& done, int64_t server, bool success) {
  TORCH_CHECK_VALUE(server >= 0 && server < done.numel(), "report: no server ", server, ", there are ", done.numel());
  TORCH_CHECK_VALUE(done.const_data_ptr<int64_t>()[server] < attempts.const_data_ptr<int64_t>()[server],
                    "report: server ", server, " has more successes than attempts");
  if (success) done.data_ptr<int64_t>()[server] += 1;
}

OnlineAssigner::OnlineAssigner(int64_t servers, OptionalTensor weight, OptionalTensor capacity, BalanceOptions options)
    : load(at::zeros({servers}, at::kDouble)),
      attempts(at::zeros({servers}, at::kLong)),
      done(at::zeros({servers}, at::kLong)),
      weight_(weight.value_or(at::Tensor())),
      capacity_(capacity.value_or(at::Tensor())),
      options_(std::move(options)) {
  balance_check(servers, weight, capacity, options_);
}

int64_t OnlineAssigner::assign(const at::Tensor& probability, const OptionalTensor& weight) {
  const auto given = [](const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; };
  return balance_assign(probability, weight.has_value() ? weight : given(weight_), given(capacity_), options_, load,
                        attempts, done);
}

void OnlineAssigner::report(int64_t server, bool success) { balance_report(attempts, done, server, success); }

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "stochastic_balance(Tensor probability, Tensor? weight=None, Tensor? capacity=None, Tensor? table=None, *, "
      "str rule=\"discount\", str g=\"auto\", int top_k=1, str overflow=\"drop\", int seed=0, int replicates=1) -> "
      "(Tensor choice, Tensor success, Tensor load, Tensor value)");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("stochastic_balance", balance_impl); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("stochastic_balance", balance_impl); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("stochastic_balance", balance_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("stochastic_balance", core::not_differentiable()); }

}  // namespace torch_ext::moe
