// Routing of a mixture of experts without an auxiliary loss, in one operator: scores, a bias that only selects, top-k
// (within groups), gates and loads.
//
//   s = score(l)                                                     l = logits [T, E]
//   ids[t] = the K largest of s[t, e] + p[e], largest first; equal ones by the lower e          p = bias [E]
//   a[t, k] = s[t, ids[t, k]]                                        the bias is not in the gates
//   gates = route_scale * (normalize and K > 1 ? a / (sum_k a + 1e-20) : a)
//   counts[e] = number of (t, k) with ids = e
//
// Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437 (groups, scale); theory: Han and Zhong,
// arXiv:2512.03915.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>

namespace torch_ext::moe {

struct RouteOptions {
  TORCH_ARG(int64_t, top_k) = 2;  // K, experts per token
  // "sigmoid"; "softmax" over all experts; "sqrtsoftplus" = sqrt(log(1 + exp l)); "none" = l; "post_softmax": select by
  // l + p, gates = softmax of the K selected logits (Mixtral).
  TORCH_ARG(std::string, score) = "sigmoid";
  TORCH_ARG(bool, normalize) = true;     // softmax: as the softmax of the K selected logits, which is the same number
  TORCH_ARG(double, route_scale) = 1.0;  // DeepSeek-V3: 2.5
  // Node-limited routing: experts in num_groups blocks of E / num_groups; only the top_groups blocks with the largest
  // sum of their group_score_k largest keys take part. DeepSeek-V3: 8, 4, 2.
  TORCH_ARG(int64_t, num_groups) = 1;
  TORCH_ARG(int64_t, top_groups) = 1;
  TORCH_ARG(int64_t, group_score_k) = 2;  // checked only if num_groups > 1
  // Gates of a row with a NaN score, or with an infinite one among the selected: "propagate" NaN, so that a loss scaler
  // sees it, or "zero". Its ids are distinct and in range either way: NaN ranks as minus infinity.
  TORCH_ARG(std::string, nan_policy) = "propagate";
  // When `load` grows by counts: in the "backward" pass of the gates, once however often it runs, which is right under
  // every kind of activation checkpointing; in the "forward" pass; or never ("manual").
  TORCH_ARG(std::string, count_in) = "backward";
};

struct RouteResult {
  at::Tensor gates;   // [T, K] float32 (float64 for float64 logits), differentiable twice in the logits
  at::Tensor ids;     // [T, K] int32; -1 in rows that are not valid
  at::Tensor counts;  // [E] int32
  at::Tensor cutoff;  // [T], the (K + 1)-th largest key, if a histogram is asked for; else [0]
};

// What the quantile rule of ALFLB collects: histogram[e, b] counts the valid tokens with cutoff - s[:, e] in bin b of
// `bins` equal ones on [bounds[0], bounds[1]]; what lies outside goes to the first or last bin. Grows when `load` does.
struct RouteHistogram {
  at::Tensor counts;  // [E, bins] int64
  at::Tensor bounds;  // [2] float32
};

// logits [T, E] of a floating dtype (scores are computed in float32, of float64 logits in float64); bias [E] float32;
// valid [T] bool, false for padding, which gets ids -1 and gates 0 and is not counted; load [E] int64, see count_in.
//
// Scores, and so ids and counts, have the same bits on CPU and CUDA, for every thread count and instruction set.
// Saved for the backward pass: ids and one [T, K] tensor (softmax without normalize: the logits and two numbers per
// token instead). Logits that are not selected get gradient 0 exactly, but for softmax without normalize.
// Errors: ValueError for shapes, devices, unknown words, top_k outside [1, E], num_groups that does not divide E,
// top_groups * E / num_groups < top_k, group_score_k > E / num_groups, a histogram with groups or top_k = E; TypeError
// for dtypes.
TORCH_EXT_API RouteResult route(const at::Tensor& logits, const std::optional<at::Tensor>& bias = std::nullopt,
                                const RouteOptions& options = {}, const std::optional<at::Tensor>& valid = std::nullopt,
                                const std::optional<at::Tensor>& load = std::nullopt,
                                const std::optional<RouteHistogram>& histogram = std::nullopt);

// Everything of the options that does not need tensors: what a module checks when it is made.
TORCH_EXT_API void check_route_options(const RouteOptions& options, int64_t num_experts);

}  // namespace torch_ext::moe
