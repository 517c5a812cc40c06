// Entry points of the kernels that plan and move tokens, over raw pointers.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "moe/dispatch_plan/dispatch_plan_functor.h"

namespace torch_ext::kernels {

// --- the plan: a stable counting sort of the entries t K + k by expert ----------------------------------------------
// Adds to counts [experts]; returns the index of an entry that is neither -1 nor an expert, or -1.
int64_t plan_count_cpu(const int32_t* ids, int64_t begin, int64_t end, int64_t experts, int32_t* counts);
// Entries [begin, end): slot = next[id]++, or -1 from limit[id] on.
void plan_place_cpu(const int32_t* ids, int64_t begin, int64_t end, int32_t* next, const int32_t* limit,
                    int32_t* slot_of, int32_t* src_of);
// One expert's entries in order: keeps the `capacity` ones with the largest gates (equal ones: the first), in order,
// from row `first` on.
void plan_keep_cpu(const int32_t* entries, int64_t count, const void* gates, core::DType gate_type, int64_t capacity,
                   int32_t first, int32_t* slot_of, int32_t* src_of);

struct Plan {
  const int32_t* ids;  // [entries]
  int64_t entries, experts, rows, align;
  int64_t capacity;   // -1: none
  const void* gates;  // [entries] or null
  core::DType gate_type;
  int32_t* offsets;  // [experts + 1]
  int32_t* slot_of;  // [entries]
  int32_t* src_of;   // [rows]
};
// int32 that plan_cuda needs as scratch.
int64_t plan_scratch_cuda(const Plan& plan);
void plan_cuda(const Plan& plan, int32_t* scratch, void* stream);
constexpr int64_t kPlanMaxExpertsCuda = 4096;  // their counters fit into shared memory

// --- rows -----------------------------------------------------------------------------------------------------------
struct Rows {
  int64_t tokens, top_k, slots, dim;
  const int32_t* slot_of;  // [tokens, top_k]
  const int32_t* src_of;   // [slots]
  const void* gates;       // [tokens, top_k] of the arithmetic type, or null: 1
};
// y[s] = g[src] x[src / K]: rows [begin, end) of y.
void permute_cpu(const Rows& rows, core::DType type, const void* x, void* y, int64_t begin, int64_t end);
// o[t] = sum_k g[t, k] z[slot]: tokens [begin, end).
void combine_cpu(const Rows& rows, core::DType type, const void* z, void* o, int64_t begin, int64_t end);
// u[t, k] = <x[t], z[slot]> in the arithmetic type: tokens [begin, end).
void match_cpu(const Rows& rows, core::DType type, const void* x, const void* z, void* u, int64_t begin, int64_t end);

void permute_cuda(const Rows& rows, core::DType type, const void* x, void* y, void* stream);
void combine_cuda(const Rows& rows, core::DType type, const void* z, void* o, void* stream);
void match_cuda(const Rows& rows, core::DType type, const void* x, const void* z, void* u, void* stream);

}  // namespace torch_ext::kernels
