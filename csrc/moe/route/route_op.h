// The operators behind moe.route.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace torch_ext::moe {

// The options in the order of the schemas.
struct RouteSettings {
  int64_t top_k;
  std::string score;
  bool normalize;
  double route_scale;
  int64_t num_groups, top_groups, group_score_k;
  std::string nan_policy;
};

// gates, ids, counts, cutoff, and what the backward pass needs: `a` [T, K], the selected scores (softmax of the selected
// logits where gates are one), NaN in rows with a NaN; and for softmax without normalize `norm` [T, 2], maximum and sum
// of its exponentials (else [0]).
using RouteTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
RouteTensors route_forward(const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& valid, const RouteSettings& settings, bool cutoff);

// Gradient of the logits [T, num_experts], in `like`'s dtype, from those of gates and of a (either may be undefined).
at::Tensor route_backward(const at::Tensor& grad_gates, const at::Tensor& grad_a, const at::Tensor& ids,
                          const at::Tensor& a, const at::Tensor& logits, const at::Tensor& norm, int64_t num_experts,
                          at::ScalarType dtype, const RouteSettings& settings);

// [E, bins] int32: see RouteHistogram.
at::Tensor route_histogram(const at::Tensor& logits, const at::Tensor& cutoff, const std::optional<at::Tensor>& valid,
                           const at::Tensor& bounds, int64_t bins, std::string_view score);

// total += counts for int64 totals and int32 counts of any equal shape.
TORCH_EXT_API void load_add_(const at::Tensor& total, const at::Tensor& counts);

}  // namespace torch_ext::moe
