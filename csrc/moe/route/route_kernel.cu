// One warp a token: lane l holds experts l, l + 32, ... in registers.
#include <algorithm>

#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "moe/route/route_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block
constexpr unsigned kAll = 0xffffffffu;

__device__ int32_t warp_max(int32_t x) { return __reduce_max_sync(kAll, x); }
__device__ int32_t warp_min(int32_t x) { return __reduce_min_sync(kAll, x); }
template <typename V>
__device__ V warp_max(V x) {
  for (int d = kWarp / 2; d > 0; d /= 2) {
    const V other = __shfl_xor_sync(kAll, x, d);
    x = other > x ? other : x;
  }
  return x;
}
// The tree of the CPU: lane 0 holds its sum.
template <typename T>
__device__ T warp_sum(T x) {
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_down_sync(kAll, x, d);
  return __shfl_sync(kAll, x, 0);
}

template <typename T>
__device__ T score_alone(RouteScore score, T l) {
  return score == RouteScore::kSigmoid        ? route_score<RouteScore::kSigmoid>(l)
         : score == RouteScore::kSqrtSoftplus ? route_score<RouteScore::kSqrtSoftplus>(l)
                                              : l;
}

// A row of logits becomes scores. I = experts a lane holds; what lies past the row becomes 0.
template <typename S, typename T, int I>
__device__ void score_row(const S* logits, int64_t experts, RouteScore score, int lane, T (&s)[I], T (&norm)[2]) {
#pragma unroll
  for (int i = 0; i < I; ++i) {
    const int64_t e = static_cast<int64_t>(i) * kWarp + lane;
    s[i] = e < experts ? static_cast<T>(core::load(logits[e])) : static_cast<T>(-HUGE_VALF);
  }
  norm[0] = 0, norm[1] = 1;
  if (score != RouteScore::kSoftmax) {
#pragma unroll
    for (int i = 0; i < I; ++i) s[i] = score_alone(score, s[i]);
    return;
  }
  T max = -HUGE_VALF, sum = 0;
#pragma unroll
  for (int i = 0; i < I; ++i) max = s[i] > max ? s[i] : max;
  max = warp_max(max);
#pragma unroll
  for (int i = 0; i < I; ++i) {
    s[i] = route_exp(s[i] - max);
    sum += s[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < I; ++i) s[i] = s[i] / sum;
  norm[0] = max, norm[1] = sum;
}

// The largest code of the warp and the lowest expert that holds it; takes it out.
template <typename Code, int I>
__device__ int32_t take_largest(Code (&codes)[I], Code out, int lane, Code& best, int& item) {
  const Code max = warp_max(best);
  const int32_t id = warp_min(best == max ? item * kWarp + lane : INT32_MAX);
  if (id % kWarp == lane) {
    best = out;
    item = 0;
#pragma unroll
    for (int i = 0; i < I; ++i) {
      if (i * kWarp + lane == id) codes[i] = out;
      if (codes[i] > best) best = codes[i], item = i;
    }
  }
  return id;
}

// The best of a lane, the first of equal ones; a lane that has none left stands at its first expert with `out`.
template <typename Code, int I>
__device__ void best_of_lane(const Code (&codes)[I], Code out, Code& best, int& item) {
  best = out;
  item = 0;
#pragma unroll
  for (int i = 0; i < I; ++i) {
    if (codes[i] > best) best = codes[i], item = i;
  }
}

// Leaves the experts of the best groups; `sums` and `kept`: scratch of the warp, num_groups entries each.
template <typename T, int I>
__device__ void mask_groups(const RouteProblem& p, int lane, route_code_t<T> (&codes)[I], route_code_t<T>* sums) {
  using Code = route_code_t<T>;
  constexpr Code kOut = RouteCode<T>::kOut;
  const int64_t size = p.experts / p.num_groups;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    Code group[I], best;
    int item;
#pragma unroll
    for (int i = 0; i < I; ++i) group[i] = (i * kWarp + lane) / size == g ? codes[i] : kOut;
    best_of_lane(group, kOut, best, item);
    T sum = 0;
    for (int64_t m = 0; m < p.group_score_k; ++m) {
      sum += route_key(warp_max(best));
      take_largest(group, kOut, lane, best, item);
    }
    if (lane == 0) sums[g] = route_code(sum);
  }
  __syncwarp();
  for (int64_t n = 0; n < p.top_groups; ++n) {  // every lane walks all groups: few, and the same for all
    int64_t best = 0;
    for (int64_t g = 1; g < p.num_groups; ++g) best = sums[g] > sums[best] ? g : best;
    __syncwarp();
    if (lane == 0) sums[best] = kOut;
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < I; ++i) {
    const int64_t e = i * kWarp + lane;
    if (e < p.experts && sums[e / size] != kOut) codes[i] = kOut;  // route_code never gives kOut
  }
}

template <typename S, int I>
__global__ void __launch_bounds__(kWarp* kWarps) forward_kernel(const RouteProblem p, int32_t* counts) {
  using T = core::opmath_t<S>;
  using Code = route_code_t<T>;
  constexpr Code kOut = RouteCode<T>::kOut;
  extern __shared__ long long shared[];
  Code* sums = reinterpret_cast<Code*>(shared) + threadIdx.x / kWarp * p.num_groups;
  int32_t* histogram = reinterpret_cast<int32_t*>(reinterpret_cast<Code*>(shared) + kWarps * p.num_groups);
  for (int64_t e = threadIdx.x; e < p.experts; e += blockDim.x) histogram[e] = 0;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  const RouteRow<T> row{p.score, p.gate, static_cast<T>(p.scale), p.zero_nan, p.top_k};
  auto *gates = static_cast<T*>(p.gates), *a = static_cast<T*>(p.a), *cutoff = static_cast<T*>(p.cutoff);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; t < p.tokens; t += step) {
    const int64_t at = t * p.top_k;
    const bool valid = p.valid == nullptr || p.valid[t];
    const S* logits = static_cast<const S*>(p.logits) + t * p.experts;
    T s[I], norm[2] = {0, 1};
    Code codes[I], best;
    int item, nan = 0;
    if (valid) score_row<S, T, I>(logits, p.experts, p.score, lane, s, norm);
    if (lane == 0 && p.norm != nullptr) {
      static_cast<T*>(p.norm)[2 * t] = norm[0];
      static_cast<T*>(p.norm)[2 * t + 1] = norm[1];
    }
    if (!valid) {
      for (int64_t k = lane; k < p.top_k; k += kWarp) p.ids[at + k] = -1, gates[at + k] = a[at + k] = 0;
      if (lane == 0 && cutoff != nullptr) cutoff[t] = -HUGE_VALF;
      continue;
    }
#pragma unroll
    for (int i = 0; i < I; ++i) {
      const int64_t e = static_cast<int64_t>(i) * kWarp + lane;
      const bool inside = e < p.experts;
      const T bias = inside && p.bias != nullptr ? static_cast<T>(p.bias[e]) : T(0);
      nan |= inside && s[i] != s[i];
      codes[i] = inside ? route_code(s[i] + bias) : kOut;
    }
    nan = __any_sync(kAll, nan);
    if (p.num_groups > 1) mask_groups<T, I>(p, lane, codes, sums);
    best_of_lane(codes, kOut, best, item);
    for (int64_t k = 0; k < p.top_k; ++k) {
      const int32_t id = take_largest(codes, kOut, lane, best, item);
      if (lane != 0) continue;
      p.ids[at + k] = id;
      atomicAdd(&histogram[id], 1);  // integers: the order does not matter
      const T l = static_cast<T>(core::load(logits[id]));
      a[at + k] = p.gate == RouteGate::kSoftmax     ? l
                  : p.score == RouteScore::kSoftmax ? route_softmax(l, norm[0], norm[1])
                                                    : score_alone(p.score, l);
    }
    if (lane == 0) route_gates(row, nan != 0, a + at, gates + at);
    if (cutoff != nullptr) {
      const Code last = warp_max(best);
      if (lane == 0) cutoff[t] = route_key(last);
    }
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    if (histogram[e] > 0) atomicAdd(&counts[e], histogram[e]);
  }
}

template <typename S>
__global__ void __launch_bounds__(kWarp* kWarps) backward_kernel(const RouteGradient g) {
  using T = core::opmath_t<S>;
  const int lane = threadIdx.x % kWarp;
  const RouteRow<T> row{g.score, g.gate, static_cast<T>(g.scale), g.zero_nan, g.top_k};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  extern __shared__ long long shared[];
  T* values = reinterpret_cast<T*>(shared) + threadIdx.x / kWarp * g.top_k;
  const auto *w = static_cast<const T*>(g.grad), *v = static_cast<const T*>(g.grad_a), *a = static_cast<const T*>(g.a);
  const T scale = static_cast<T>(g.scale);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; t < g.tokens; t += step) {
    const int64_t at = t * g.top_k;
    S* to = static_cast<S*>(g.grad_logits) + t * g.experts;
    const bool valid = g.ids[at] >= 0, dense = g.logits != nullptr;
    const auto upstream = [&](int64_t i) { return v == nullptr ? scale * w[i] : scale * w[i] + v[i]; };
    T mixed = 0, max = 0, sum = 1;
    const S* logits = static_cast<const S*>(g.logits) + t * g.experts;
    if (dense && valid) {
      for (int64_t k = 0; k < g.top_k; ++k) mixed += upstream(at + k) * a[at + k];
      max = static_cast<const T*>(g.norm)[2 * t], sum = static_cast<const T*>(g.norm)[2 * t + 1];
    }
    const bool zero = !valid || !dense || (g.zero_nan && a[at] != a[at]);
    for (int64_t e = lane; e < g.experts; e += kWarp) {
      core::store(to[e], zero ? T(0) : route_softmax(static_cast<T>(core::load(logits[e])), max, sum) * -mixed);
    }
    __syncwarp();
    if (!valid || (dense && zero)) continue;
    if (lane == 0 && !dense) route_gradient(row, w + at, v == nullptr ? nullptr : v + at, a + at, values);
    __syncwarp();
    for (int64_t k = lane; k < g.top_k; k += kWarp) {
      const int32_t id = g.ids[at + k];
      const T grad = dense
                         ? route_softmax(static_cast<T>(core::load(logits[id])), max, sum) * (upstream(at + k) - mixed)
                         : values[k];
      core::store(to[id], grad);
    }
    __syncwarp();
  }
}

template <typename S, int I>
__global__ void __launch_bounds__(kWarp* kWarps) histogram_kernel(const RouteBins b, int32_t* counts) {
  using T = core::opmath_t<S>;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  const T low = b.bounds[0], per_unit = static_cast<T>(b.bins) / (static_cast<T>(b.bounds[1]) - low);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; t < b.tokens; t += step) {
    if (b.valid != nullptr && !b.valid[t]) continue;
    T s[I], norm[2];
    score_row<S, T, I>(static_cast<const S*>(b.logits) + t * b.experts, b.experts, b.score, lane, s, norm);
    const T cutoff = static_cast<const T*>(b.cutoff)[t];
#pragma unroll
    for (int i = 0; i < I; ++i) {
      const int64_t e = static_cast<int64_t>(i) * kWarp + lane;
      const int64_t bin = e < b.experts ? route_bin(cutoff, s[i], low, per_unit, b.bins) : -1;
      if (bin >= 0) atomicAdd(&counts[e * b.bins + bin], 1);
    }
  }
}

__global__ void load_add_kernel(int64_t* total, const int32_t* counts, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) total[i] += counts[i];
}

// Experts a lane holds: the next of these.
template <typename Body>
void dispatch_items(int64_t experts, const Body& body) {
  if (experts <= 2 * kWarp) return body(std::integral_constant<int, 2>{});
  if (experts <= 4 * kWarp) return body(std::integral_constant<int, 4>{});
  if (experts <= 8 * kWarp) return body(std::integral_constant<int, 8>{});
  if (experts <= 32 * kWarp) return body(std::integral_constant<int, 32>{});
  return body(std::integral_constant<int, kRouteMaxExpertsCuda / kWarp>{});
}

unsigned blocks_for(int64_t tokens) {
  constexpr int64_t kMost = 132 * 16;  // then blocks stride
  return static_cast<unsigned>(std::clamp<int64_t>((tokens + kWarps - 1) / kWarps, 1, kMost));
}

}  // namespace

void route_forward_cuda(const RouteProblem& p, core::DType type, int32_t* counts, void* stream) {
  if (p.tokens == 0) return;
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    using Code = route_code_t<core::opmath_t<S>>;
    const size_t shared =
        sizeof(Code) * static_cast<size_t>(kWarps * p.num_groups) + sizeof(int32_t) * static_cast<size_t>(p.experts);
    dispatch_items(p.experts, [&](auto items) {
      forward_kernel<S, decltype(items)::value>
          <<<blocks_for(p.tokens), kWarp * kWarps, shared, static_cast<cudaStream_t>(stream)>>>(p, counts);
    });
    core::check_launch("moe_route");
  });
}

void route_backward_cuda(const RouteGradient& g, core::DType type, void* stream) {
  if (g.tokens == 0) return;
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    const size_t shared = sizeof(core::opmath_t<S>) * static_cast<size_t>(kWarps * g.top_k);
    backward_kernel<S><<<blocks_for(g.tokens), kWarp * kWarps, shared, static_cast<cudaStream_t>(stream)>>>(g);
    core::check_launch("moe_route_backward");
  });
}

void route_histogram_cuda(const RouteBins& b, core::DType type, int32_t* counts, void* stream) {
  if (b.tokens == 0) return;
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    dispatch_items(b.experts, [&](auto items) {
      histogram_kernel<S, decltype(items)::value>
          <<<blocks_for(b.tokens), kWarp * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(b, counts);
    });
    core::check_launch("moe_route_histogram");
  });
}

void load_add_cuda(int64_t* total, const int32_t* counts, int64_t size, void* stream) {
  if (size == 0) return;
  constexpr int kThreads = 256;
  load_add_kernel<<<static_cast<unsigned>((size + kThreads - 1) / kThreads), kThreads, 0,
                    static_cast<cudaStream_t>(stream)>>>(total, counts, size);
  core::check_launch("moe_load_add_");
}

}  // namespace torch_ext::kernels
