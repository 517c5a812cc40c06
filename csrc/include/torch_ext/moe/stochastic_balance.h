// Online assignment with stochastic rewards and capacities: arrivals come one by one, each goes to one server (or to
// top_k) at once and for good; an attempt on server u succeeds with probability p_uv, and a server leaves after
// capacity_u successes. Uses: matching and routing simulators, and a causal assignment of tokens to experts that never
// exceeds a capacity. Experimental.
//
// Among the servers with p > 0 and room left, arrival v goes to the one with the largest key, of equal ones the lowest
// number. load_u = sum of p over the attempts on u / capacity_u:
//
//   "discount"  weight_u p_uv (1 - g(load_u))        default
//   "balance"   - attempts_u / capacity_u            the rule for equal p (Mehta and Panigrahi, FOCS 2012)
//   "load"      - load_u, of equal ones the larger p   (a weak rule for unequal p, for comparison)
//   "greedy"    weight_u p_uv                        1/2-competitive
//
//   g "exp"       exp(x - 1), below 1 - 2^-20: 1 - 1/e-competitive for large capacities (Mehta, Saberi, Vazirani,
//                 Vazirani 2007; Albers and Schubert, arXiv:2411.16947)
//   g "survival"  1 - exp(-x): 1 - g is the chance that a server of capacity 1 is still free
//   g "auto"      "exp" if every capacity is at least 10, else "survival"
//   g "table"     linear between given points
//
// Analyses of such rules: Huang and Zhang, arXiv:2002.01802; Huang et al., arXiv:2309.10289. Their discount functions
// are solutions of differential equations; none is built in and no ratio is claimed for unequal p.
//
// Tokens to experts: p = 1, the scores as weight [arrivals, servers], capacity C, top_k = K, overflow "spill". Routing
// then depends on the tokens before, so training and inference must begin a sequence alike.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>

namespace torch_ext::moe {

struct BalanceOptions {
  TORCH_ARG(std::string, rule) = "discount";
  TORCH_ARG(std::string, g) = "auto";
  TORCH_ARG(at::Tensor, table);   // of g "table": [points, 2] of x (increasing) and g(x) in [0, 1), not decreasing
  TORCH_ARG(int64_t, top_k) = 1;  // servers per arrival, all different, their keys those before the arrival
  TORCH_ARG(std::string, overflow) = "drop";  // no server with room: "drop" (-1), or "spill" to the least loaded
  TORCH_ARG(int64_t, seed) = 0;               // of the outcomes
  TORCH_ARG(int64_t, replicates) = 1;         // R runs of the same problem with other outcomes
};

struct BalanceResult {
  at::Tensor choice;   // [..., R, n, K] int32, -1: dropped
  at::Tensor success;  // [..., R, n, K] bool
  at::Tensor load;     // [..., R, m] float64
  at::Tensor value;    // [..., R] float64: sum of the weights of the successes
};

// probability [..., n arrivals, m servers] in [0, 1], 0: no edge; weight >= 0, [m], [n, m] or like probability (default
// 1); capacity [m] int64 >= 1 (default 1). Computed in float64; CPU and CUDA choose alike, to the bit, for any number
// of threads. The outcome of attempt k of arrival v depends on seed, place in the batch, replicate, v and k alone, so
// rules can be compared on common chances. Not differentiable.
// Errors: ValueError for shapes, options and, on the CPU, values (on CUDA p that is NaN or below 0 is no edge);
// TypeError for dtypes.
TORCH_EXT_API BalanceResult stochastic_balance(const at::Tensor& probability,
                                               const std::optional<at::Tensor>& weight = std::nullopt,
                                               const std::optional<at::Tensor>& capacity = std::nullopt,
                                               const BalanceOptions& options = {});

// The expected value of a rule on one problem [n, m] with n <= 16, top_k 1: the recursion over all outcomes.
TORCH_EXT_API double stochastic_balance_exact(const at::Tensor& probability,
                                              const std::optional<at::Tensor>& weight = std::nullopt,
                                              const std::optional<at::Tensor>& capacity = std::nullopt,
                                              const BalanceOptions& options = {});
// The most that any policy reaches in expectation which knows all of probability [n, m], m <= 16, and sees outcomes;
// capacities 1. No rule exceeds it.
TORCH_EXT_API double stochastic_optimum(const at::Tensor& probability,
                                        const std::optional<at::Tensor>& weight = std::nullopt);
// max sum p x over edges [n, m] bool, sum_v p x <= capacity_u, sum_u x <= 1, x >= 0: what outcomes equal to their mean
// would allow. Nothing exceeds it. By maximum flow.
TORCH_EXT_API double fluid_lp_equal_p(const at::Tensor& edges, double p,
                                      const std::optional<at::Tensor>& capacity = std::nullopt);

// The same rules where the outcomes come from outside. State: load [m] float64, attempts and done [m] int64, on the
// CPU.
class TORCH_EXT_API OnlineAssigner {
 public:
  // weight and capacity [m]; options: rule, g and table.
  OnlineAssigner(int64_t servers, std::optional<at::Tensor> weight = std::nullopt,
                 std::optional<at::Tensor> capacity = std::nullopt, BalanceOptions options = {});

  // The server for an arrival with these probabilities [m], or -1; counts the attempt. `weight` [m] for this arrival.
  int64_t assign(const at::Tensor& probability, const std::optional<at::Tensor>& weight = std::nullopt);
  // How the attempt on a server ended.
  void report(int64_t server, bool success);

  at::Tensor load, attempts, done;

 private:
  at::Tensor weight_, capacity_;
  BalanceOptions options_;
};

}  // namespace torch_ext::moe
