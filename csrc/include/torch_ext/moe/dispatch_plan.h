// Movement of tokens to their experts and back, without a copy to the host and without atomics.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace torch_ext::moe {

// Rows sorted by expert, equal experts in the order of (t, k): a stable counting sort. Expert e owns the rows
// offsets[e] ... offsets[e + 1] - 1. The number of rows S is known without looking at ids: T K, or with a capacity
// min(T K, E capacity); align adds E (align - 1). Rows from offsets[E] on, and those that pad a segment, are empty.
struct DispatchPlan {
  at::Tensor offsets;  // [E + 1] int32, multiples of align
  at::Tensor slot_of;  // [T, K] int32: row of (t, k), or -1: dropped or not valid
  at::Tensor src_of;   // [S] int32: t K + k of a row, or -1: empty
};

// ids [T, K] int32 (or int64) in [0, num_experts), or -1. With `capacity` an expert takes at most so many rows: the
// first in (t, k) order, or, given gates [T, K], those with the largest gates (equal ones by position). Gates of what
// is dropped are not redistributed. `align`: multiple to which every segment is padded, for grouped products. Errors:
// ValueError for shapes, an id that is out of range (CPU; on CUDA such an entry is dropped), capacity < 1, align < 1,
// or 2^31 rows and more; TypeError for dtypes.
TORCH_EXT_API DispatchPlan dispatch_plan(const at::Tensor& ids, int64_t num_experts,
                                         std::optional<int64_t> capacity = std::nullopt,
                                         const std::optional<at::Tensor>& gates = std::nullopt, int64_t align = 1);

// x [T, D] -> [S, D]: row s is token src_of[s] / K, or zeros. Differentiable to any order.
TORCH_EXT_API at::Tensor permute(const at::Tensor& x, const DispatchPlan& plan);

// z [S, D], gates [T, K] -> [T, D]: sum over k of gates[t, k] z[slot_of[t, k]], added in the order of k in float32
// (float64 for float64). Differentiable to any order in both. Without gates all are 1.
TORCH_EXT_API at::Tensor combine(const at::Tensor& z, const std::optional<at::Tensor>& gates, const DispatchPlan& plan);

// For callers that want dense tensors: gates [T, E] (differentiable) and a bool map [T, E].
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor> to_dense(const at::Tensor& gates, const at::Tensor& ids,
                                                          int64_t num_experts);

}  // namespace torch_ext::moe
