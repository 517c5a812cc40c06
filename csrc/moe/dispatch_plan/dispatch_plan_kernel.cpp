#include "moe/dispatch_plan/dispatch_plan_kernel.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <vector>

#include "core/block_reduce.h"
#include "core/dtype_dispatch.h"
#include "moe/route/route_functor.h"

namespace torch_ext::kernels {
namespace {

constexpr int64_t kTile = 512;  // elements of a row whose sum stays in the first-level cache

template <typename S, typename T>
TX_CLONES void scale_row(const S* __restrict x, int64_t count, T gate, S* __restrict y) {
  for (int64_t d = 0; d < count; ++d) core::store(y[d], gate * core::load(x[d]));
}

template <typename S, typename T>
TX_CLONES void add_row(const S* __restrict z, int64_t count, T gate, T* __restrict sum) {
  for (int64_t d = 0; d < count; ++d) sum[d] = combine_step(sum[d], gate, static_cast<T>(core::load(z[d])));
}

template <typename S, typename T>
TX_CLONES void store_row(const T* __restrict sum, int64_t count, S* __restrict o) {
  for (int64_t d = 0; d < count; ++d) core::store(o[d], sum[d]);
}

template <typename S>
TX_CLONES double dot(const S* __restrict x, const S* __restrict z, int64_t count) {
  return core::sum_block(
      count, [&](int64_t d) { return static_cast<double>(core::load(x[d])) * static_cast<double>(core::load(z[d])); });
}

template <typename S>
void combine(const Rows& rows, const S* z, S* o, int64_t t) {
  using T = core::opmath_t<S>;
  T sum[kTile];
  for (int64_t from = 0; from < rows.dim; from += kTile) {
    const int64_t count = std::min(kTile, rows.dim - from);
    std::fill_n(sum, count, T(0));
    for (int64_t e = t * rows.top_k; e < (t + 1) * rows.top_k; ++e) {
      const int64_t slot = rows.slot_of[e];
      if (slot < 0) continue;
      add_row(z + slot * rows.dim + from, count, rows.gates == nullptr ? T(1) : static_cast<const T*>(rows.gates)[e],
              sum);
    }
    store_row(sum, count, o + t * rows.dim + from);
  }
}

}  // namespace

int64_t plan_count_cpu(const int32_t* ids, int64_t begin, int64_t end, int64_t experts, int32_t* counts) {
  for (int64_t i = begin; i < end; ++i) {
    if (ids[i] >= 0 && ids[i] < experts) {
      ++counts[ids[i]];
    } else if (ids[i] != -1) {
      return i;
    }
  }
  return -1;
}

void plan_place_cpu(const int32_t* ids, int64_t begin, int64_t end, int32_t* next, const int32_t* limit,
                    int32_t* slot_of, int32_t* src_of) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t id = ids[i];
    slot_of[i] = -1;
    if (id < 0) continue;
    const int32_t slot = next[id]++;
    if (slot >= limit[id]) continue;
    slot_of[i] = slot;
    src_of[slot] = static_cast<int32_t>(i);
  }
}

void plan_keep_cpu(const int32_t* entries, int64_t count, const void* gates, core::DType gate_type, int64_t capacity,
                   int32_t first, int32_t* slot_of, int32_t* src_of) {
  core::dispatch_dtype(gate_type, [&](auto storage) {
    using S = decltype(storage);
    using Code = route_code_t<core::opmath_t<S>>;
    const auto code = [&](int64_t i) { return route_code(core::load(static_cast<const S*>(gates)[entries[i]])); };
    std::vector<Code> order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = code(i);
    Code least = RouteCode<core::opmath_t<S>>::kOut;
    int64_t equal = 0;  // how many with the least gate are kept
    if (count > capacity) {
      std::nth_element(order.begin(), order.begin() + (capacity - 1), order.end(), std::greater<Code>());
      least = order[static_cast<size_t>(capacity - 1)];
      equal = capacity - std::count_if(order.begin(), order.end(), [&](Code c) { return c > least; });
    }
    for (int64_t i = 0; i < count; ++i) {
      const Code c = code(i);
      const bool kept = c > least || (c == least && equal-- > 0);
      slot_of[entries[i]] = kept ? first : -1;
      if (kept) src_of[first++] = entries[i];
    }
  });
}

void permute_cpu(const Rows& rows, core::DType type, const void* x, void* y, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    using T = core::opmath_t<S>;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t src = rows.src_of[s];
      S* to = static_cast<S*>(y) + s * rows.dim;
      const S* from = static_cast<const S*>(x) + (src < 0 ? 0 : src / rows.top_k) * rows.dim;
      const size_t bytes = static_cast<size_t>(rows.dim) * sizeof(S);
      if (src < 0) {
        memset(static_cast<void*>(to), 0, bytes);
      } else if (rows.gates == nullptr) {
        memcpy(static_cast<void*>(to), static_cast<const void*>(from), bytes);
      } else {
        scale_row(from, rows.dim, static_cast<const T*>(rows.gates)[src], to);
      }
    }
  });
}

void combine_cpu(const Rows& rows, core::DType type, const void* z, void* o, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t t = begin; t < end; ++t) combine(rows, static_cast<const S*>(z), static_cast<S*>(o), t);
  });
}

void match_cpu(const Rows& rows, core::DType type, const void* x, const void* z, void* u, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    using T = core::opmath_t<S>;
    for (int64_t e = begin * rows.top_k; e < end * rows.top_k; ++e) {
      const int64_t slot = rows.slot_of[e];
      const S* a = static_cast<const S*>(x) + e / rows.top_k * rows.dim;
      const S* b = static_cast<const S*>(z) + (slot < 0 ? 0 : slot) * rows.dim;
      static_cast<T*>(u)[e] = slot < 0 ? T(0) : static_cast<T>(dot(a, b, rows.dim));
    }
  });
}

}  // namespace torch_ext::kernels
