#include <cuda_runtime.h>

#include <climits>

#include "core/multi_tensor_cuda.cuh"
#include "moe/stochastic_balance/stochastic_balance_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr int kWarp = 32, kWarpsPerBlock = 4;
constexpr unsigned kAll = 0xffffffffu;

// A candidate of a lane; u < 0: none.
struct Best {
  double key, probability;
  int u;
};

__device__ bool better(const Best& a, const Best& b, bool by_probability) {
  if (a.u < 0 || b.u < 0) return a.u >= 0;
  if (a.key != b.key) return a.key > b.key;
  if (by_probability && a.probability != b.probability) return a.probability > b.probability;
  return a.u < b.u;
}

__device__ Best best_of_warp(Best mine, bool by_probability) {
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const Best other{__shfl_xor_sync(kAll, mine.key, half), __shfl_xor_sync(kAll, mine.probability, half),
                     __shfl_xor_sync(kAll, mine.u, half)};
    if (better(other, mine, by_probability)) mine = other;
  }
  return mine;
}

// One warp runs one instance; lane l owns the servers l, l + 32, ..., whose state only it reads and writes.
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    run_instances(const BalanceProblem problem, const BalanceResult result) {
  const int64_t instance = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (instance >= problem.batch * problem.replicates) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t b = instance / problem.replicates, m = problem.servers, entries = problem.arrivals * problem.top_k;
  double* load = result.load + instance * m;
  double* room = result.room + instance * m;
  int64_t* attempts = result.attempts + instance * m;
  int64_t* done = result.done + instance * m;
  for (int64_t u = lane; u < m; u += kWarp) room[u] = problem.room(load[u]);
  core::PhiloxStream stream = core::PhiloxStream{
      static_cast<uint32_t>(problem.seed), static_cast<uint32_t>(static_cast<uint64_t>(problem.seed) >> 32), 0,
      (static_cast<uint32_t>(b) << 8) | static_cast<uint32_t>(core::PhiloxTag::kOutcome),
      static_cast<uint32_t>(instance % problem.replicates)};
  double value = 0;
  for (int64_t v = 0; v < problem.arrivals; ++v) {
    const double* probability = problem.probability + (b * problem.arrivals + v) * m;
    const double* weight = problem.weight + b * problem.weight_batch + v * problem.weight_arrival;
    int32_t* chosen = result.choice + instance * entries + v * problem.top_k;
    bool* success = result.success + instance * entries + v * problem.top_k;
    stream.stream = static_cast<uint32_t>(v);
    bool spilling = false;
    // Keys are those before the arrival: what is chosen is excluded by the list, its state follows after the last.
    for (int64_t k = 0; k < problem.top_k; ++k) {
      Best best{0, 0, -1};
      for (;;) {
        Best mine{0, 0, -1};
        for (int64_t u = lane; u < m; u += kWarp) {
          bool open = probability[u] > 0 && (spilling || done[u] < problem.capacity[u]);
          for (int64_t i = 0; i < k && open; ++i) open = chosen[i] != u;
          if (!open) continue;
          const double key = spilling ? -load[u]
                                      : balance_key(problem.rule, weight[u], probability[u], room[u], load[u],
                                                    attempts[u], problem.capacity[u]);
          const Best candidate{key, probability[u], static_cast<int>(u)};
          if (better(candidate, mine, !spilling && problem.rule == BalanceRule::kLoad)) mine = candidate;
        }
        best = best_of_warp(mine, !spilling && problem.rule == BalanceRule::kLoad);
        if (best.u >= 0 || spilling || !problem.spill) break;
        spilling = true;
      }
      if (lane == 0) chosen[k] = best.u;
      __syncwarp();
    }
    for (int64_t k = 0; k < problem.top_k; ++k) {
      const int64_t u = chosen[k];
      const bool won = u >= 0 && balance_chance(stream, k) < probability[u];
      if (lane == 0) success[k] = won;
      if (won) value += weight[u];
      if (u < 0 || u % kWarp != lane) continue;
      attempts[u] += 1;
      load[u] += probability[u] / static_cast<double>(problem.capacity[u]);
      room[u] = problem.room(load[u]);
      if (won) done[u] += 1;
    }
    __syncwarp();
  }
  if (lane == 0) result.value[instance] = value;
}

}  // namespace

void stochastic_balance_cuda(const BalanceProblem& problem, const BalanceResult& result, void* stream) {
  const int64_t instances = problem.batch * problem.replicates;
  if (instances == 0) return;
  const int64_t blocks = (instances + kWarpsPerBlock - 1) / kWarpsPerBlock;
  run_instances<<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0, static_cast<cudaStream_t>(stream)>>>(
      problem, result);
  core::check_launch("stochastic_balance");
}

}  // namespace torch_ext::kernels
