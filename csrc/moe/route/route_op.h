// The operators behind moe.route.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>
#include <torch_ext/moe/route.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "moe/route/route_functor.h"

namespace torch_ext::moe {

// The words of the options as the kernels have them. dense: softmax without normalize, the one whose gradient is.
struct RouteMode {
  kernels::RouteScore score;
  kernels::RouteGate gate;
  bool dense, zero_nan;
};
// ValueError for unknown words.
RouteMode route_mode(int64_t top_k, std::string_view score, bool normalize, std::string_view nan_policy);

void check_route(const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                 const std::optional<at::Tensor>& valid, const RouteOptions& options,
                 const std::optional<at::Tensor>& load, const std::optional<at::Tensor>& histogram,
                 const std::optional<at::Tensor>& bounds);

// Where counts go.
struct RouteCounting {
  std::optional<at::Tensor> load, histogram, bounds;
};
// Gates (differentiable), ids, counts, cutoff.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_differentiable(const at::Tensor& logits,
                                                                                const std::optional<at::Tensor>& bias,
                                                                                const std::optional<at::Tensor>& valid,
                                                                                const RouteOptions& options,
                                                                                const RouteCounting& counting);

// gates, ids, counts, cutoff, and what the backward pass needs: `a` [T, K], the selected scores (softmax of the
// selected logits where gates are one), NaN in rows with a NaN; and for softmax without normalize `norm` [T, 2],
// maximum and sum of its exponentials (else [0]).
using RouteTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
RouteTensors route_forward(const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& valid, const RouteOptions& options, bool cutoff);

// What the backward pass starts from: ids, a, and of softmax without normalize logits and norm.
struct RouteSaved {
  at::Tensor ids, a;
  std::optional<at::Tensor> logits, norm;
  int64_t num_experts;
  at::ScalarType dtype;
};
// Gradient of the logits [T, num_experts] from those of gates and of a, which may be undefined.
at::Tensor route_backward(const at::Tensor& grad_gates, const at::Tensor& grad_a, const RouteSaved& saved,
                          const RouteOptions& options);
// The same of torch's operators, differentiable in the gradients, a and the logits.
at::Tensor route_backward_composite(const at::Tensor& grad_gates, const at::Tensor& grad_a, const RouteSaved& saved,
                                    const RouteOptions& options);

// [E, bins] int32: see RouteHistogram.
at::Tensor route_histogram(const at::Tensor& logits, const at::Tensor& cutoff, const std::optional<at::Tensor>& valid,
                           const at::Tensor& bounds, int64_t bins, std::string_view score);

// total += counts for int64 totals and int32 counts of equal shape.
TORCH_EXT_API void load_add_(const at::Tensor& total, const at::Tensor& counts);

}  // namespace torch_ext::moe
