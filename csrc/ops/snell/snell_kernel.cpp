#include "ops/snell/snell_kernel.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/block_reduce.h"

namespace torch_ext::kernels {
namespace {

constexpr int64_t kWidth = kSnellSegment;
constexpr int64_t kSumLanes = 16;  // partial sums of a row of kWidth products

// One row of a segment.
template <typename T>
struct alignas(64) Row {
  T d0[kWidth], d1[kWidth], w[kWidth];
};

// Q = coordinates of a piece, 0 if known at run time only. All loops run over the full width: the columns that a short
// segment lacks are zeros, whose results nobody reads.
template <typename T, int Q>
TX_CLONES void weigh(const T* __restrict a0, const T* __restrict a1, const T* __restrict b, int64_t q, T scale,
                     Row<T>& row) {
  const int64_t n = Q > 0 ? Q : q;
  const T* __restrict b1 = b + n * kWidth;
  if (Q > 0) {
    for (int64_t j = 0; j < kWidth; ++j) {
      T s0 = 0, s1 = 0;
      for (int64_t k = 0; k < Q; ++k) s0 = snell_square(s0, a0[k], b[k * kWidth + j]);
      for (int64_t k = 0; k < Q; ++k) s1 = snell_square(s1, a1[k], b1[k * kWidth + j]);
      row.d0[j] = core::square_root(s0);
      row.d1[j] = core::square_root(s1);
    }
  } else {
    for (int64_t j = 0; j < kWidth; ++j) row.d0[j] = row.d1[j] = 0;
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t j = 0; j < kWidth; ++j) row.d0[j] = snell_square(row.d0[j], a0[k], b[k * kWidth + j]);
      for (int64_t j = 0; j < kWidth; ++j) row.d1[j] = snell_square(row.d1[j], a1[k], b1[k * kWidth + j]);
    }
    for (int64_t j = 0; j < kWidth; ++j) row.d0[j] = core::square_root(row.d0[j]);
    for (int64_t j = 0; j < kWidth; ++j) row.d1[j] = core::square_root(row.d1[j]);
  }
  for (int64_t j = 0; j < kWidth; ++j) row.w[j] = snell_weight(row.d0[j], row.d1[j], scale);
}

template <typename T, SnellRule R>
TX_CLONES void sparsify(const T* __restrict w, T t, int64_t count, T* __restrict out) {
  for (int64_t j = 0; j < count; ++j) out[j] = snell_phi<R>(w[j], t);
}

// Q_0 and Q_1: the gradient of the entry, chained through each distance.
template <typename T, SnellRule R, bool kExact>
TX_CLONES void chain(const Row<T>& row, const T* __restrict g, T t, T scale, T* __restrict q0, T* __restrict q1) {
  for (int64_t j = 0; j < kWidth; ++j) {
    const T m = scale * (g[j] * snell_slope<R, kExact>(row.w[j], t));
    q0[j] = snell_over_distance(m, row.d0[j]);
    q1[j] = snell_over_distance(-m, row.d1[j]);
  }
}

template <typename T, SnellRule R>
TX_CLONES double pull_of(const T* __restrict w, const T* __restrict g, T t) {
  return core::sum_segment(
      kWidth, [&](int64_t j) { return static_cast<double>(g[j]) * static_cast<double>(snell_pull<R>(w[j], t)); });
}

// One piece: sum_j Q (a - b) to this row of A, Q (a - b) to the columns of B (negative there).
template <typename T>
TX_CLONES void spread(const T* __restrict a, const T* __restrict b, int64_t q, const T* __restrict chained,
                      T* __restrict grad_a, T* __restrict grad_b) {
  for (int64_t k = 0; k < q; ++k) {
    T lane[kSumLanes] = {};
    for (int64_t j = 0; j < kWidth; j += kSumLanes) {
      for (int64_t l = 0; l < kSumLanes; ++l) {
        const T product = chained[j + l] * (a[k] - b[k * kWidth + j + l]);
        grad_b[k * kWidth + j + l] += product;
        lane[l] += product;
      }
    }
    for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
      for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    grad_a[k] = lane[0];
  }
}

template <typename T>
auto weigh_for(int64_t q) {
  switch (q) {
    case 2:
      return &weigh<T, 2>;
    case 4:
      return &weigh<T, 4>;
    case 8:
      return &weigh<T, 8>;
    case 16:
      return &weigh<T, 16>;
    default:
      return &weigh<T, 0>;
  }
}

// Walks a block segment by segment, rows inside, so that a segment of B stays in the first-level cache.
template <typename T>
class Walk {
 public:
  explicit Walk(const SnellWeights& weights)
      : weights_(weights),
        weigh_(weigh_for<T>(weights.q)),
        b_(static_cast<size_t>(2 * weights.q * kWidth)),
        scale_(static_cast<T>(weights.scale)) {}

  const T* a(int64_t piece, int64_t row) const {
    return static_cast<const T*>(weights_.a) + (piece * weights_.rows + row) * weights_.q;
  }
  const T* b(int64_t piece) const { return b_.data() + piece * weights_.q * kWidth; }

  // visit(row number, row, first column, columns)
  template <typename Visit>
  void run(const SnellBlock& block, const Visit& visit) {
    Row<T> row;
    for (int64_t at = block.column; at < block.column + block.columns; at += kWidth) {
      const int64_t count = std::min(kWidth, block.column + block.columns - at);
      load(at, count);
      for (int64_t i = block.row; i < block.row + block.rows; ++i) {
        weigh_(a(0, i), a(1, i), b_.data(), weights_.q, scale_, row);
        visit(i, row, at, count);
      }
    }
  }

 private:
  void load(int64_t at, int64_t count) {
    for (int64_t k = 0; k < 2 * weights_.q; ++k) {
      const T* from = static_cast<const T*>(weights_.b) + k * weights_.columns + at;
      T* to = b_.data() + k * kWidth;
      std::fill(std::copy(from, from + count, to), to + kWidth, T(0));
    }
  }

  const SnellWeights& weights_;
  void (*weigh_)(const T*, const T*, const T*, int64_t, T, Row<T>&);
  std::vector<T> b_;
  T scale_;
};

}  // namespace

void snell_tile_cpu(const SnellWeights& weights, core::DType type, double threshold, const SnellBlock& block, void* out,
                    int64_t stride) {
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T t = static_cast<T>(threshold);
    dispatch_snell_rule(weights.rule, [&](auto rule) {
      Walk<T>(weights).run(block, [&](int64_t i, const Row<T>& row, int64_t at, int64_t count) {
        T* to = static_cast<T*>(out) + (i - block.row) * stride + (at - block.column);
        sparsify<T, decltype(rule)::value>(row.w, t, count, to);
      });
    });
  });
}

void snell_histogram_cpu(const SnellWeights& weights, core::DType type, const SnellBlock& block, uint64_t low,
                         int shift, uint64_t* counts) {
  // Neighbours fall into the same few buckets: four tables keep one increment from waiting for the other.
  std::vector<uint32_t> tables(static_cast<size_t>(4 * kSnellBuckets));
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Bits = decltype(snell_bits(zero));
    Walk<T>(weights).run(block, [&](int64_t, const Row<T>& row, int64_t, int64_t count) {
      for (int64_t j = 0; j < count; ++j) {
        const Bits bucket = (snell_bits(row.w[j]) - static_cast<Bits>(low)) >> shift;
        if (bucket < static_cast<Bits>(kSnellBuckets)) {
          ++tables[static_cast<size_t>(j % 4 * kSnellBuckets) + static_cast<size_t>(bucket)];
        }
      }
    });
  });
  for (size_t i = 0; i < tables.size(); ++i) counts[i % static_cast<size_t>(kSnellBuckets)] += tables[i];
}

uint64_t snell_collect_cpu(const SnellWeights& weights, core::DType type, const SnellBlock& block, uint64_t low,
                           uint64_t high, void* out, std::atomic<int64_t>* used) {
  uint64_t above = UINT64_MAX;
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Bits = decltype(snell_bits(zero));
    const auto from = static_cast<Bits>(low), to = static_cast<Bits>(high);
    Bits least = ~Bits{0};
    Walk<T>(weights).run(block, [&](int64_t, const Row<T>& row, int64_t, int64_t count) {
      T kept[kWidth];
      int64_t number = 0;
      for (int64_t j = 0; j < count; ++j) {
        const Bits bits = snell_bits(row.w[j]);
        kept[number] = core::absolute(row.w[j]);
        number += bits >= from && bits <= to ? 1 : 0;
        least = bits > to && bits < least ? bits : least;
      }
      if (out != nullptr && number > 0) std::copy_n(kept, number, static_cast<T*>(out) + used->fetch_add(number));
    });
    if (least != ~Bits{0}) above = least;
  });
  return above;
}

namespace {

template <typename T, SnellRule R>
void gradient_of(const SnellWeights& weights, const SnellBlock& block, SnellGradient& gradient) {
  const int64_t q = weights.q;
  const T t = static_cast<T>(gradient.threshold), scale = static_cast<T>(weights.scale);
  const bool pulled = gradient.exact && (R == SnellRule::kPaper || R == SnellRule::kSoft);
  std::vector<T> grad_b(static_cast<size_t>(2 * q * kWidth));
  Walk<T> walk(weights);
  alignas(64) T g[kWidth] = {}, q0[kWidth], q1[kWidth];
  walk.run(block, [&](int64_t i, const Row<T>& row, int64_t at, int64_t count) {
    const int64_t offset = (i - block.row) * gradient.stride;
    std::copy_n(static_cast<const T*>(gradient.g) + offset, count, g);
    if (gradient.exact) {
      chain<T, R, true>(row, g, t, scale, q0, q1);
    } else {
      chain<T, R, false>(row, g, t, scale, q0, q1);
    }
    T* grad_a = static_cast<T*>(gradient.grad_a) + (i - block.row) * 2 * q;
    spread(walk.a(0, i), walk.b(0), q, q0, grad_a, grad_b.data());
    spread(walk.a(1, i), walk.b(1), q, q1, grad_a + q, grad_b.data() + q * kWidth);
    if (gradient.phi != nullptr) sparsify<T, R>(row.w, t, count, static_cast<T*>(gradient.phi) + offset);
    if (!pulled) return;
    gradient.pull += pull_of<T, R>(row.w, g, t);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t index = i * weights.columns + at + j;
      if (core::absolute(row.w[j]) == t) gradient.holder = std::min(gradient.holder, index);
    }
  });
  for (int64_t p = 0; p < 2; ++p) {
    for (int64_t j = 0; j < block.columns; ++j) {
      T* to = static_cast<T*>(gradient.grad_b) + (p * weights.columns + block.column + j) * q;
      for (int64_t k = 0; k < q; ++k) to[k] -= grad_b[static_cast<size_t>((p * q + k) * kWidth + j)];
    }
  }
}

}  // namespace

void snell_gradient_cpu(const SnellWeights& weights, core::DType type, const SnellBlock& block,
                        SnellGradient& gradient) {
  dispatch_snell_type(type, [&](auto zero) {
    dispatch_snell_rule(
        weights.rule, [&](auto rule) { gradient_of<decltype(zero), decltype(rule)::value>(weights, block, gradient); });
  });
}

void snell_threshold_gradient_cpu(const SnellWeights& weights, core::DType type, double pull, int64_t holder,
                                  void* grad_a, void* grad_b) {
  dispatch_snell_type(type, [&](auto zero) {
    using T = decltype(zero);
    snell_threshold_gradient(weights, static_cast<T>(pull), holder, static_cast<T*>(grad_a), static_cast<T*>(grad_b));
  });
}

}  // namespace torch_ext::kernels
