// Entry points of the routing kernels over raw pointers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "moe/route/route_functor.h"

namespace torch_ext::kernels {

// T tokens, E experts, K of them selected. "float" below: the arithmetic type of the logits' dtype.
struct RouteProblem {
  int64_t tokens, experts, top_k;
  const void* logits;  // [T, E], any storage type
  const float* bias;   // [E] or null
  const bool* valid;   // [T] or null
  RouteScore score;
  RouteGate gate;
  double scale;
  int64_t num_groups, top_groups, group_score_k;
  bool zero_nan;
  // results
  void* gates;   // [T, K] float
  int32_t* ids;  // [T, K]
  void* a;       // [T, K] float: selected scores; kSoftmax: the softmax of the selected logits; NaN in bad rows
  void* cutoff;  // [T] float or null: the (K + 1)-th largest key
  void* norm;    // [T, 2] float or null: maximum and sum of a softmax's exponentials
};

// Tokens [begin, end); adds to counts [E].
void route_forward_cpu(const RouteProblem& problem, core::DType type, int64_t begin, int64_t end, int32_t* counts);
// Adds to counts [E] on the device.
void route_forward_cuda(const RouteProblem& problem, core::DType type, int32_t* counts, void* stream);
// What fits into registers and into 48 KiB of shared memory.
constexpr int64_t kRouteMaxExpertsCuda = 4096, kRouteMaxTopKCuda = 512, kRouteMaxGroupsCuda = 256;

struct RouteGradient {
  int64_t tokens, experts, top_k;
  RouteScore score;
  RouteGate gate;
  double scale;
  bool zero_nan;
  const int32_t* ids;  // [T, K]
  const void* a;       // [T, K] float
  const void* grad;    // [T, K] float: of gates
  const void* grad_a;  // [T, K] float or null
  const void* logits;  // softmax without normalize: [T, E], else null
  const void* norm;    // with it [T, 2]
  void* grad_logits;   // out: [T, E] in the logits' storage type
};
void route_backward_cpu(const RouteGradient& gradient, core::DType type, int64_t begin, int64_t end);
void route_backward_cuda(const RouteGradient& gradient, core::DType type, void* stream);

struct RouteBins {
  int64_t tokens, experts, bins;
  const void* logits;   // [T, E]
  const void* cutoff;   // [T] float
  const bool* valid;    // [T] or null
  const float* bounds;  // [2]
  RouteScore score;
};
// Adds to counts [E, bins].
void route_histogram_cpu(const RouteBins& bins, core::DType type, int64_t begin, int64_t end, int32_t* counts);
void route_histogram_cuda(const RouteBins& bins, core::DType type, int32_t* counts, void* stream);

// total[i] += counts[i]
void load_add_cpu(int64_t* total, const int32_t* counts, int64_t size);
void load_add_cuda(int64_t* total, const int32_t* counts, int64_t size, void* stream);

template <typename Body>
void dispatch_route_score(RouteScore score, const Body& body) {
  switch (score) {
    case RouteScore::kSigmoid:
      return body(std::integral_constant<RouteScore, RouteScore::kSigmoid>{});
    case RouteScore::kSoftmax:
      return body(std::integral_constant<RouteScore, RouteScore::kSoftmax>{});
    case RouteScore::kSqrtSoftplus:
      return body(std::integral_constant<RouteScore, RouteScore::kSqrtSoftplus>{});
    case RouteScore::kIdentity:
      return body(std::integral_constant<RouteScore, RouteScore::kIdentity>{});
  }
}

}  // namespace torch_ext::kernels
