#include <algorithm>

#include "core/block_reduce.h"
#include "core/dtype_dispatch.h"
#include "core/multi_tensor_cuda.cuh"
#include "moe/dispatch_plan/dispatch_plan_kernel.h"
#include "moe/route/route_functor.h"

namespace torch_ext::kernels {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kPart = 1024;  // entries that one warp sorts, 32 at a time
constexpr int kScanThreads = 1024;
constexpr int kRowThreads = 128;

__device__ int32_t id_at(const Plan& plan, int64_t i) {
  const int32_t id = i < plan.entries ? plan.ids[i] : -1;
  return id < plan.experts ? id : -1;
}

// counts[part, e]; one warp a part.
__global__ void count_kernel(const Plan plan, int32_t* counts) {
  extern __shared__ int32_t own[];
  for (int64_t e = threadIdx.x; e < plan.experts; e += kWarp) own[e] = 0;
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPart;
  for (int64_t i = begin + threadIdx.x; i < begin + kPart; i += kWarp) {
    const int32_t id = id_at(plan, i);
    if (id >= 0) atomicAdd(&own[id], 1);
  }
  __syncwarp();
  for (int64_t e = threadIdx.x; e < plan.experts; e += kWarp) counts[blockIdx.x * plan.experts + e] = own[e];
}

// counts[part, e] becomes the number of e's entries in earlier parts, total[e] all of them; the offsets. One block.
__global__ void scan_kernel(const Plan plan, int64_t parts, int32_t* counts, int32_t* total) {
  for (int64_t e = threadIdx.x; e < plan.experts; e += blockDim.x) {
    int32_t sum = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const int32_t count = counts[p * plan.experts + e];
      counts[p * plan.experts + e] = sum;
      sum += count;
    }
    total[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int32_t at = 0;
  for (int64_t e = 0; e < plan.experts; ++e) {
    plan.offsets[e] = at;
    at += static_cast<int32_t>(plan_padded(plan_kept(total[e], plan.capacity), plan.align));
  }
  plan.offsets[plan.experts] = at;
}

// Rank of every entry among those of its expert, and from it the slot. `sorted`, if given, takes the entries of each
// expert in order, from the sum of the totals before it: which of them stay is decided by gate later.
__global__ void place_kernel(const Plan plan, const int32_t* before, const int32_t* total, int32_t* sorted) {
  extern __shared__ int32_t next[];
  int32_t* start = sorted == nullptr ? nullptr : next + plan.experts;
  for (int64_t e = threadIdx.x; e < plan.experts; e += kWarp) next[e] = before[blockIdx.x * plan.experts + e];
  if (start != nullptr && threadIdx.x == 0) {
    int32_t at = 0;
    for (int64_t e = 0; e < plan.experts; ++e) start[e] = at, at += total[e];
  }
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPart;
  for (int64_t i = begin + threadIdx.x; i < begin + kPart; i += kWarp) {
    const int32_t id = id_at(plan, i);
    const unsigned same = __match_any_sync(kAll, id);
    const unsigned earlier = same & ((1u << threadIdx.x) - 1);
    const int32_t rank = id < 0 ? 0 : next[id] + __popc(earlier);
    __syncwarp();
    if (id >= 0 && earlier == 0) next[id] += __popc(same);
    __syncwarp();
    if (i >= plan.entries) continue;
    const bool kept = id >= 0 && (plan.capacity < 0 || rank < plan.capacity);
    if (start != nullptr) {
      if (id >= 0) sorted[start[id] + rank] = static_cast<int32_t>(i);
      plan.slot_of[i] = -1;
      continue;
    }
    plan.slot_of[i] = kept ? plan.offsets[id] + rank : -1;
    if (kept) plan.src_of[plan.offsets[id] + rank] = static_cast<int32_t>(i);
  }
}

__global__ void fill_kernel(int32_t* to, int64_t count, int32_t value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = value;
}

// One warp an expert: the capacity-th largest gate bit by bit, then the kept ones in order.
template <typename S>
__global__ void keep_kernel(const Plan plan, const int32_t* total, const int32_t* sorted) {
  using Code = route_code_t<core::opmath_t<S>>;
  using Bits = std::conditional_t<sizeof(Code) == 4, uint32_t, uint64_t>;
  constexpr Bits kTop = Bits{1} << (8 * sizeof(Bits) - 1);
  const int64_t expert = blockIdx.x;
  int64_t start = 0;
  for (int64_t e = 0; e < expert; ++e) start += total[e];
  const int64_t count = total[expert];
  const auto code = [&](int64_t i) {  // unsigned, in the same order
    return static_cast<Bits>(route_code(core::load(static_cast<const S*>(plan.gates)[sorted[start + i]]))) ^ kTop;
  };
  const auto number = [&](const auto& wanted) {
    int32_t own = 0;
    for (int64_t i = threadIdx.x; i < count; i += kWarp) own += wanted(code(i)) ? 1 : 0;
    return __reduce_add_sync(kAll, own);
  };
  Bits least = 0;  // the largest value that at least `capacity` codes reach
  int64_t equal = 0;
  if (count > plan.capacity) {
    for (Bits bit = kTop; bit > 0; bit >>= 1) {
      const Bits raised = least | bit;
      if (number([&](Bits c) { return c >= raised; }) >= plan.capacity) least = raised;
    }
    equal = plan.capacity - number([&](Bits c) { return c > least; });
  }
  int32_t slot = plan.offsets[expert];
  for (int64_t i = threadIdx.x; i - threadIdx.x < count; i += kWarp) {
    const Bits c = i < count ? code(i) : 0;
    const bool tied = i < count && c == least && count > plan.capacity;
    const unsigned ties = __ballot_sync(kAll, tied), below = (1u << threadIdx.x) - 1;
    const bool kept = i < count && (count <= plan.capacity || c > least || (tied && __popc(ties & below) < equal));
    const unsigned keeping = __ballot_sync(kAll, kept);
    if (kept) {
      const int32_t entry = sorted[start + i], to = slot + __popc(keeping & below);
      plan.slot_of[entry] = to;
      plan.src_of[to] = entry;
    }
    slot += __popc(keeping);
    equal -= __popc(ties);
  }
}

// --- rows -----------------------------------------------------------------------------------------------------------
template <typename S>
__global__ void permute_kernel(const Rows rows, const S* x, S* y) {
  using T = core::opmath_t<S>;
  const int64_t slot = blockIdx.x, src = rows.src_of[slot];
  S* to = y + slot * rows.dim;
  const S* from = x + (src < 0 ? 0 : src / rows.top_k) * rows.dim;
  const T gate = src < 0 || rows.gates == nullptr ? T(1) : static_cast<const T*>(rows.gates)[src];
  for (int64_t d = threadIdx.x; d < rows.dim; d += blockDim.x) {
    if (src < 0) {
      core::store(to[d], T(0));
    } else if (rows.gates == nullptr) {
      to[d] = from[d];
    } else {
      core::store(to[d], gate * core::load(from[d]));
    }
  }
}

// Rows as 16-byte words.
__global__ void copy_kernel(const Rows rows, int64_t words, const uint4* x, uint4* y) {
  const int64_t slot = blockIdx.x, src = rows.src_of[slot];
  const uint4* from = x + (src < 0 ? 0 : src / rows.top_k) * words;
  for (int64_t d = threadIdx.x; d < words; d += blockDim.x) {
    y[slot * words + d] = src < 0 ? make_uint4(0, 0, 0, 0) : from[d];
  }
}

template <typename S>
__global__ void combine_kernel(const Rows rows, const S* z, S* o) {
  using T = core::opmath_t<S>;
  const int64_t t = blockIdx.x;
  for (int64_t d = threadIdx.x; d < rows.dim; d += blockDim.x) {
    T sum = 0;
    for (int64_t e = t * rows.top_k; e < (t + 1) * rows.top_k; ++e) {
      const int64_t slot = rows.slot_of[e];
      if (slot < 0) continue;
      const T gate = rows.gates == nullptr ? T(1) : static_cast<const T*>(rows.gates)[e];
      sum = combine_step(sum, gate, static_cast<T>(core::load(z[slot * rows.dim + d])));
    }
    core::store(o[t * rows.dim + d], sum);
  }
}

// One warp an entry; the shape of core::sum_block.
template <typename S>
__global__ void match_kernel(const Rows rows, const S* x, const S* z, core::opmath_t<S>* u) {
  const int64_t entry = blockIdx.x, slot = rows.slot_of[entry];
  const S* a = x + entry / rows.top_k * rows.dim;
  const S* b = z + (slot < 0 ? 0 : slot) * rows.dim;
  const auto value = [&](int64_t d) {
    return static_cast<double>(core::load(a[d])) * static_cast<double>(core::load(b[d]));
  };
  double total = 0;
  if (slot >= 0 && rows.dim < core::kLanes) total = core::sum_short(rows.dim, value);
  for (int64_t begin = 0; slot >= 0 && rows.dim >= core::kLanes && begin < rows.dim; begin += core::kSegment) {
    const int64_t end = begin + core::kSegment < rows.dim ? begin + core::kSegment : rows.dim;
    double lane = 0;
    for (int64_t d = begin + threadIdx.x; d < end; d += kWarp) lane += value(d);
    for (int step = kWarp / 2; step > 0; step /= 2) lane += __shfl_down_sync(kAll, lane, step);
    total += lane;
  }
  if (threadIdx.x == 0) u[entry] = static_cast<core::opmath_t<S>>(total);
}

int64_t parts_of(const Plan& plan) { return (plan.entries + kPart - 1) / kPart; }
unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }
bool by_gate(const Plan& plan) { return plan.capacity >= 0 && plan.gates != nullptr; }

void fill(int32_t* to, int64_t count, int32_t value, cudaStream_t stream) {
  constexpr int kThreads = 256;
  if (count > 0) fill_kernel<<<grid((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(to, count, value);
}

}  // namespace

int64_t plan_scratch_cuda(const Plan& plan) {
  return (parts_of(plan) + 1) * plan.experts + (by_gate(plan) ? plan.entries : 0);
}

void plan_cuda(const Plan& plan, int32_t* scratch, void* opaque) {
  auto* const stream = static_cast<cudaStream_t>(opaque);
  const int64_t parts = parts_of(plan);
  int32_t *total = scratch, *counts = scratch + plan.experts;
  int32_t* sorted = by_gate(plan) ? counts + parts * plan.experts : nullptr;
  const size_t table = sizeof(int32_t) * static_cast<size_t>(plan.experts);
  fill(plan.src_of, plan.rows, -1, stream);
  if (parts > 0) count_kernel<<<grid(parts), kWarp, table, stream>>>(plan, counts);
  scan_kernel<<<1, kScanThreads, 0, stream>>>(plan, parts, counts, total);
  if (parts > 0) {
    const size_t tables = sorted == nullptr ? table : 2 * table;
    place_kernel<<<grid(parts), kWarp, tables, stream>>>(plan, counts, total, sorted);
  }
  if (sorted != nullptr && parts > 0) {
    core::dispatch_dtype(plan.gate_type, [&](auto storage) {
      keep_kernel<decltype(storage)><<<grid(plan.experts), kWarp, 0, stream>>>(plan, total, sorted);
    });
  }
  core::check_launch("moe_dispatch_plan");
}

void permute_cuda(const Rows& rows, core::DType type, const void* x, void* y, void* opaque) {
  if (rows.slots == 0 || rows.dim == 0) return;
  auto* const stream = static_cast<cudaStream_t>(opaque);
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    const int64_t bytes = rows.dim * static_cast<int64_t>(sizeof(S)), word = static_cast<int64_t>(sizeof(uint4));
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0; };
    if (rows.gates == nullptr && bytes % word == 0 && aligned(x) && aligned(y)) {
      copy_kernel<<<grid(rows.slots), kRowThreads, 0, stream>>>(rows, bytes / word, static_cast<const uint4*>(x),
                                                                static_cast<uint4*>(y));
    } else {
      permute_kernel<S>
          <<<grid(rows.slots), kRowThreads, 0, stream>>>(rows, static_cast<const S*>(x), static_cast<S*>(y));
    }
    core::check_launch("moe_permute");
  });
}

void combine_cuda(const Rows& rows, core::DType type, const void* z, void* o, void* opaque) {
  if (rows.tokens == 0 || rows.dim == 0) return;
  auto* const stream = static_cast<cudaStream_t>(opaque);
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    combine_kernel<S>
        <<<grid(rows.tokens), kRowThreads, 0, stream>>>(rows, static_cast<const S*>(z), static_cast<S*>(o));
    core::check_launch("moe_combine");
  });
}

void match_cuda(const Rows& rows, core::DType type, const void* x, const void* z, void* u, void* opaque) {
  if (rows.tokens == 0) return;
  auto* const stream = static_cast<cudaStream_t>(opaque);
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    match_kernel<S><<<grid(rows.tokens * rows.top_k), kWarp, 0, stream>>>(
        rows, static_cast<const S*>(x), static_cast<const S*>(z), static_cast<core::opmath_t<S>*>(u));
    core::check_launch("moe_match");
  });
}

}  // namespace torch_ext::kernels
