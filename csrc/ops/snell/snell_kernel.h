// Entry points of the SNELL kernels over raw pointers. The weights exist as blocks only: every call recomputes the
// entries that it needs, and equal blocks have equal bits in every call.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "ops/snell/snell_functor.h"

namespace torch_ext::kernels {

// Both factors in the arithmetic type (float or double).
struct SnellWeights {
  const void* a;  // [2, rows, q]
  const void* b;  // [2 q, columns]: row p q + k holds coordinate k of piece p
  int64_t rows, columns, q;
  double scale;
  SnellRule rule;
};

struct SnellBlock {
  int64_t row, rows, column, columns;
};

// Entry (row, column) alone: the gradient `pull` of its magnitude, chained to its rows of A and B.
template <typename T>
TX_HD void snell_threshold_gradient(const SnellWeights& weights, T pull, int64_t holder, T* grad_a, T* grad_b) {
  const int64_t row = holder / weights.columns, column = holder % weights.columns, q = weights.q;
  const T* a = static_cast<const T*>(weights.a) + row * q;
  const T* b = static_cast<const T*>(weights.b) + column;
  T d[2] = {0, 0};
  for (int64_t p = 0; p < 2; ++p) {
    for (int64_t k = 0; k < q; ++k) {
      d[p] = snell_square(d[p], a[p * weights.rows * q + k], b[(p * q + k) * weights.columns]);
    }
    d[p] = core::square_root(d[p]);
  }
  const T scale = static_cast<T>(weights.scale), w = snell_weight(d[0], d[1], scale);
  const T m = scale * (w < 0 ? -pull : pull);
  for (int64_t p = 0; p < 2; ++p) {
    const T chained = snell_over_distance(p == 0 ? m : -m, d[p]);
    for (int64_t k = 0; k < q; ++k) {
      const T product = chained * (a[p * weights.rows * q + k] - b[(p * q + k) * weights.columns]);
      grad_a[(p * weights.rows + row) * q + k] += product;
      grad_b[(p * weights.columns + column) * q + k] -= product;
    }
  }
}

template <typename Body>
void dispatch_snell_rule(SnellRule rule, const Body& body) {
  switch (rule) {
    case SnellRule::kCode:
      return body(std::integral_constant<SnellRule, SnellRule::kCode>{});
    case SnellRule::kPaper:
      return body(std::integral_constant<SnellRule, SnellRule::kPaper>{});
    case SnellRule::kHard:
      return body(std::integral_constant<SnellRule, SnellRule::kHard>{});
    case SnellRule::kSoft:
      return body(std::integral_constant<SnellRule, SnellRule::kSoft>{});
    case SnellRule::kNone:
      return body(std::integral_constant<SnellRule, SnellRule::kNone>{});
  }
}
template <typename Body>
auto dispatch_snell_type(core::DType type, const Body& body) {
  return type == core::DType::kDouble ? body(double{}) : body(float{});
}

constexpr int64_t kSnellSegment = 128;  // columns that are worked on together
constexpr int kSnellDigit = 11;         // bits of |w| that one histogram resolves
constexpr int64_t kSnellBuckets = int64_t{1} << kSnellDigit;

// out[i, j] = phi(w) of a block; rows of `out` are `stride` apart.
void snell_tile_cpu(const SnellWeights& weights, core::DType type, double threshold, const SnellBlock& block, void* out,
                    int64_t stride);

// Adds to counts[(bits - low) >> shift] for every |w| of the block whose bucket is below kSnellBuckets.
void snell_histogram_cpu(const SnellWeights& weights, core::DType type, const SnellBlock& block, uint64_t low,
                         int shift, uint64_t* counts);

// Appends every |w| of the block with bits in [low, high] at out[(*used)++], in any order, as long as out is not null;
// returns the least bits above `high`, UINT64_MAX if there are none.
uint64_t snell_collect_cpu(const SnellWeights& weights, core::DType type, const SnellBlock& block, uint64_t low,
                           uint64_t high, void* out, std::atomic<int64_t>* used);

// The backward pass of one segment of a tile (block.columns <= kSnellSegment), from G = x^T grad_y.
struct SnellGradient {
  const void* g;   // in: G of the block
  void* phi;       // out: phi(w) of the block, for the gradient of x; may be null and may be g itself
  int64_t stride;  // of the rows of both
  void* grad_a;    // out: [block.rows, 2 q], this segment's share
  void* grad_b;    // in and out: [2, columns, q] of the whole layer
  double threshold;
  bool exact;
  // Out, if exact and phi depends on the threshold: sum G d phi / d t, and the least row-major index of an entry whose
  // magnitude is the threshold.
  double pull;
  int64_t holder;
};
void snell_gradient_cpu(const SnellWeights& weights, core::DType type, const SnellBlock& block,
                        SnellGradient& gradient);

// The threshold is the magnitude of one entry: adds the gradient `pull` that reaches it to that entry's rows of A and
// B.
void snell_threshold_gradient_cpu(const SnellWeights& weights, core::DType type, double pull, int64_t holder,
                                  void* grad_a, void* grad_b);

// The same on a stream. `threshold` points to a scalar of the arithmetic type on the device.
void snell_tile_cuda(const SnellWeights& weights, core::DType type, const void* threshold, const SnellBlock& block,
                     void* out, int64_t stride, void* stream);

// The threshold without waiting for the device: order statistic `rank` (from 0) of all |w|, or, if fraction > 0, what
// lies between it and the next. `scratch`: kSnellScratch int64 on the device.
constexpr int64_t kSnellScratch = 3 + kSnellBuckets;
void snell_threshold_cuda(const SnellWeights& weights, core::DType type, int64_t rank, double fraction, void* scratch,
                          void* threshold, void* stream);

// Adds a tile's part to grad_a [2, rows, q] and grad_b [2, columns, q]. `pull`, if not null: a double, to which sum G d
// phi / d t is added, and behind it an int64, the least index of an entry that holds the threshold.
void snell_gradient_cuda(const SnellWeights& weights, core::DType type, const void* threshold, bool exact,
                         const SnellBlock& block, const void* g, int64_t stride, void* grad_a, void* grad_b, void* pull,
                         void* stream);
void snell_threshold_gradient_cuda(const SnellWeights& weights, core::DType type, const void* pull, void* grad_a,
                                   void* grad_b, void* stream);

}  // namespace torch_ext::kernels
