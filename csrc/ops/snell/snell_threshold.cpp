// The threshold: exact order statistics of |W| by radix selection over recomputed blocks, without storing W. (torch's
// quantile sorts, and refuses more than 2^24 elements.)
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#include "core/check.h"
#include "ops/snell/snell_layer.h"

namespace torch_ext::ops {
namespace {

using kernels::SnellBlock;
using kernels::SnellRule;

// Ranks count from 0. `fraction` > 0: the threshold lies between this order statistic and the next.
struct Rank {
  int64_t rank;
  double fraction;
};

Rank rank_of(const SnellLayer& layer, double sparsity) {
  if (layer.weights.rule == SnellRule::kCode) {
    const double position = sparsity * static_cast<double>(layer.entries() - 1);
    return {static_cast<int64_t>(std::floor(position)), position - std::floor(position)};
  }
  return {static_cast<int64_t>(std::ceil(sparsity * static_cast<double>(layer.entries()))) - 1, 0};
}

constexpr int64_t kCandidates = int64_t{1} << 18;  // this many are selected from directly

// visit(block) over all entries in fixed blocks; several at a time.
template <typename Visit>
void for_each_block(const SnellLayer& layer, const Visit& visit) {
  const int64_t rows = std::max<int64_t>(1, kCandidates / layer.weights.columns);
  const int64_t blocks = (layer.weights.rows + rows - 1) / rows;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      visit(SnellBlock{i * rows, std::min(rows, layer.weights.rows - i * rows), 0, layer.weights.columns});
    }
  });
}

// Bits of |w| that are still possible for the wanted rank: [low, high], of which `count` entries exist; `below` entries
// are smaller.
struct Interval {
  uint64_t low, high;
  int64_t count, below;
};

void narrow(const SnellLayer& layer, int64_t rank, int shift, Interval& interval) {
  std::vector<uint64_t> counts(static_cast<size_t>(kernels::kSnellBuckets));
  std::mutex lock;
  for_each_block(layer, [&](const SnellBlock& block) {
    std::vector<uint64_t> local(counts.size());
    kernels::snell_histogram_cpu(layer.weights, layer.type, block, interval.low, shift, local.data());
    const std::lock_guard<std::mutex> guard(lock);
    for (size_t i = 0; i < counts.size(); ++i) counts[i] += local[i];
  });
  size_t bucket = 0;
  while (interval.below + static_cast<int64_t>(counts[bucket]) <= rank) {
    interval.below += static_cast<int64_t>(counts[bucket++]);
  }
  interval.count = static_cast<int64_t>(counts[bucket]);
  interval.low += static_cast<uint64_t>(bucket) << shift;
  interval.high = interval.low + ((uint64_t{1} << shift) - 1);
}

// Order statistics `rank` and `rank` + 1 of |w|.
template <typename T>
std::pair<T, T> neighbours(const SnellLayer& layer, int64_t rank, bool want_next) {
  int shift = sizeof(T) * 8 - 1;
  Interval interval{0, (uint64_t{1} << shift) - 1, layer.entries(), 0};
  while (interval.count > kCandidates && shift > 0) {
    shift = std::max(0, shift - kernels::kSnellDigit);
    narrow(layer, rank, shift, interval);
  }
  T value, next;
  kernels::snell_from_bits(interval.low, value);  // exact once all bits are resolved
  next = value;
  const bool resolved = shift == 0;
  const bool next_inside = rank + 1 - interval.below < interval.count;
  if (resolved && (next_inside || !want_next)) return {value, next};

  const at::Tensor buffer = at::empty({resolved ? 0 : interval.count}, layer.a.options());
  std::atomic<int64_t> used{0};
  std::atomic<uint64_t> above{UINT64_MAX};
  void* out = resolved ? nullptr : buffer.mutable_data_ptr();
  for_each_block(layer, [&](const SnellBlock& block) {
    const uint64_t least =
        kernels::snell_collect_cpu(layer.weights, layer.type, block, interval.low, interval.high, out, &used);
    uint64_t seen = above.load();
    while (least < seen && !above.compare_exchange_weak(seen, least)) {
    }
  });
  if (!resolved) {
    T* first = buffer.mutable_data_ptr<T>();
    T* const nth = first + (rank - interval.below);
    T* const last = first + interval.count;
    std::nth_element(first, nth, last);
    value = next = *nth;
    if (next_inside) next = *std::min_element(nth + 1, last);
  }
  if (!next_inside && above.load() != UINT64_MAX) kernels::snell_from_bits(above.load(), next);
  return {value, next};
}

template <typename T>
T select(const SnellLayer& layer, const Rank& rank) {
  const auto [low, high] = neighbours<T>(layer, rank.rank, rank.fraction > 0);
  return rank.fraction > 0 ? kernels::snell_interpolate(low, high, static_cast<T>(rank.fraction)) : low;
}

}  // namespace

at::Tensor snell_threshold(const SnellLayer& layer, double sparsity) {
  const Rank rank = rank_of(layer, sparsity);
  if (layer.weights.rule == SnellRule::kNone || rank.rank < 0) return at::zeros({}, layer.a.options());
#if TORCH_EXT_WITH_CUDA
  if (layer.on_cuda()) {
    const at::Tensor t = at::empty({}, layer.a.options());
    const at::Tensor scratch = at::empty({kernels::kSnellScratch}, layer.a.options().dtype(at::kLong));
    kernels::snell_threshold_cuda(layer.weights, layer.type, rank.rank, rank.fraction, scratch.mutable_data_ptr(),
                                  t.mutable_data_ptr(), core::current_stream(layer.a.device()));
    return t;
  }
#endif
  const double t = layer.type == core::DType::kDouble ? select<double>(layer, rank) : select<float>(layer, rank);
  return at::full({}, t, layer.a.options());
}

}  // namespace torch_ext::ops
