// Entry points of online assignment over raw pointers.
#pragma once

#include <cstdint>

#include "moe/stochastic_balance/stochastic_balance_functor.h"

namespace torch_ext::kernels {

// What all instances share. An instance is one replicate of one problem of the batch; it is serial over its arrivals.
struct BalanceProblem {
  const double* probability;  // [batch, arrivals, servers]
  const double* weight;       // element (b, v, u) at b * weight_batch + v * weight_arrival + u
  int64_t weight_batch, weight_arrival;
  const int64_t* capacity;  // [servers]
  BalanceRoom room;
  BalanceRule rule;
  bool spill;
  int64_t batch, replicates, arrivals, servers, top_k, seed;
};

// Results of all instances [batch, replicates], and their state.
struct BalanceResult {
  int32_t* choice;    // [..., arrivals, top_k], -1: dropped
  bool* success;      // [..., arrivals, top_k]
  double* load;       // [..., servers], zeros at first
  double* value;      // [...]
  int64_t* attempts;  // [..., servers], zeros at first
  int64_t* done;      // [..., servers], zeros at first
  double* room;       // [..., servers], scratch
};

inline core::PhiloxStream balance_stream(int64_t seed, int64_t problem) {
  return core::philox_stream(seed, 0, problem, core::PhiloxTag::kOutcome, 0);
}

// Instances [begin, end); any range on its own.
void stochastic_balance_cpu(const BalanceProblem& problem, const BalanceResult& result, int64_t begin, int64_t end);
void stochastic_balance_cuda(const BalanceProblem& problem, const BalanceResult& result, void* stream);

// The server of one arrival, or -1. State as in BalanceResult.
int64_t balance_choose(const BalanceProblem& problem, const double* probability, const double* weight,
                       const double* load, const int64_t* attempts, const int64_t* done);

// Expected value of a rule on one problem with capacities 1, by recursion over the outcomes: O(2^arrivals).
double stochastic_balance_exact_cpu(const BalanceProblem& problem);
// The best adaptive policy that knows the arrivals, capacities 1: O(arrivals 2^servers servers).
double stochastic_optimum_cpu(const double* probability, const double* weight, int64_t arrivals, int64_t servers);
// max sum of p x over the graph's edges, sum_v p x_uv <= capacity_u, sum_u x_uv <= 1, x >= 0, by maximum flow.
double fluid_lp_cpu(const bool* edges, double probability, const int64_t* capacity, int64_t arrivals, int64_t servers);

}  // namespace torch_ext::kernels
