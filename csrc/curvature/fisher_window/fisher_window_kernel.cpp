// First pass over the window on the CPU.
#include "curvature/fisher_window/fisher_window_kernel.h"

#include <algorithm>

#include "curvature/fisher_window/fisher_window_encode.h"

namespace torch_ext::kernels {
namespace {

// Each adds to out[s] the product of `count` consecutive rows of one tile with the query.
template <typename S>
TX_CLONES void dots_wide(const S* __restrict rows, const double* __restrict query, int64_t count,
                         double* __restrict out) {
  for (int64_t s = 0; s < count; ++s) {
    const S* row = rows + s * kTile;
    out[s] += core::sum_segment(kTile, [=](int64_t i) { return static_cast<double>(decoded(row[i])) * query[i]; });
  }
}

TX_CLONES void dots_bfloat16(const core::BFloat16* __restrict rows, const float* __restrict query, int64_t count,
                             double* __restrict out) {
  for (int64_t s = 0; s < count; ++s) {
    const core::BFloat16* row = rows + s * kTile;
    out[s] += sum_tile_narrow([=](int64_t i) { return decoded(row[i]) * query[i]; });
  }
}

TX_CLONES void dots_int8(const int8_t* __restrict rows, const float* __restrict scales, const int16_t* __restrict codes,
                         const float* __restrict query_scales, int64_t count, double* __restrict out) {
  for (int64_t s = 0; s < count; ++s) {
    double total = 0;
    for (int64_t b = 0; b < kScales; ++b) {
      const int8_t* row = rows + s * kTile + b * kScaleBlock;
      const int16_t* code = codes + b * kScaleBlock;
      int32_t sum = 0;
      for (int64_t i = 0; i < kScaleBlock; ++i) sum += int32_t{code[i]} * int32_t{row[i]};
      const double scale = static_cast<double>(scales[s * kScales + b]) * static_cast<double>(query_scales[b]);
      total += scale * static_cast<double>(sum);
    }
    out[s] += total;
  }
}

TX_CLONES void project_int8(const int8_t* __restrict rows, const float* __restrict scales,
                            const double* __restrict query, int64_t count, double* __restrict out) {
  for (int64_t s = 0; s < count; ++s) {
    double total = 0;
    for (int64_t b = 0; b < kScales; ++b) {
      const int8_t* row = rows + s * kTile + b * kScaleBlock;
      const double* x = query + b * kScaleBlock;
      const double sum = core::sum_segment(kScaleBlock, [=](int64_t i) { return static_cast<double>(row[i]) * x[i]; });
      total += static_cast<double>(scales[s * kScales + b]) * sum;
    }
    out[s] += total;
  }
}

// T is float where the query is a stored row, double where it is any x.
template <typename T>
TX_CLONES void dots_topk(const core::BFloat16* __restrict values, const int16_t* __restrict indices, int64_t kept,
                         const T* __restrict query, int64_t count, double* __restrict out) {
  for (int64_t s = 0; s < count; ++s) {
    const core::BFloat16* value = values + s * kept;
    const int16_t* index = indices + s * kept;
    out[s] += core::sum_block(kept, [=](int64_t i) {
      return static_cast<double>(core::load(value[i])) * static_cast<double>(query[index[i]]);
    });
  }
}

enum class Query { kStored, kAny };

// Rows [begin, end) of one tile.
void dots_tile(const WindowView& w, int64_t tile, const TileQuery& q, Query kind, int64_t begin, int64_t end,
               double* partial) {
  const int64_t at = tile * w.slots + begin, count = end - begin;
  double* out = partial + begin;
  const auto rows = [&](auto type) { return static_cast<const decltype(type)*>(w.rows) + at * kTile; };
  switch (w.format) {
    case WindowFormat::kFloat:
      return dots_wide(rows(float{}), q.wide, count, out);
    case WindowFormat::kDouble:
      return dots_wide(rows(double{}), q.wide, count, out);
    case WindowFormat::kBFloat16:
      if (kind == Query::kAny) return dots_wide(rows(core::BFloat16{}), q.wide, count, out);
      return dots_bfloat16(rows(core::BFloat16{}), q.narrow, count, out);
    case WindowFormat::kInt8:
      if (kind == Query::kAny) return project_int8(rows(int8_t{}), w.scales + at * kScales, q.wide, count, out);
      return dots_int8(rows(int8_t{}), w.scales + at * kScales, q.codes, q.scales, count, out);
    case WindowFormat::kTopK:
      break;
  }
  const auto* values = static_cast<const core::BFloat16*>(w.rows) + at * w.kept;
  const int16_t* indices = w.indices + at * w.kept;
  if (kind == Query::kAny) return dots_topk(values, indices, w.kept, q.wide, count, out);
  dots_topk(values, indices, w.kept, q.narrow, count, out);
}

// All live rows, and the spare slot (the new row itself) if asked for.
void dots_live(const WindowView& w, int64_t tile, const TileQuery& q, Query kind, double* partial) {
  const int64_t count = w.ring[kRingCount], next = w.ring[kRingNext];
  dots_tile(w, tile, q, kind, 0, kind == Query::kStored ? next + 1 : next, partial);
  if (count == w.slots - 1) dots_tile(w, tile, q, kind, next + 1, w.slots, partial);
}

template <typename X>
TX_CLONES void widen(const X* __restrict from, int64_t size, double* __restrict to) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<double>(from[i]);
}

template <typename Body>
void for_tiles_of_group(const WindowView& w, int64_t group, const Body& body) {
  const int64_t each = tiles_per_group(w.tiles);
  for (int64_t tile = group * each; tile < std::min(w.tiles, (group + 1) * each); ++tile) body(tile);
}

}  // namespace

void window_dots_cpu(const WindowView& w, const std::vector<RowSegment>& segments, double factor, int64_t group,
                     double* partial) {
  TileQuery query;
  alignas(64) double row[kTile];  // of floats where the format is not double
  for_tiles_of_group(w, group, [&](int64_t tile) {
    window_gather_cpu(segments, factor, w.format == WindowFormat::kDouble, tile * kTile, (tile + 1) * kTile, row);
    window_encode_tile(w, tile, row, &query);
    dots_live(w, tile, query, Query::kStored, partial);
  });
}

void window_project_cpu(const WindowView& w, const void* x, bool wide, int64_t numel, int64_t group, double* partial) {
  TileQuery query;
  for_tiles_of_group(w, group, [&](int64_t tile) {
    const int64_t begin = tile * kTile, size = std::clamp<int64_t>(numel - begin, 0, kTile);
    std::fill(query.wide + size, query.wide + kTile, 0.0);
    if (wide) {
      widen(static_cast<const double*>(x) + begin, size, query.wide);
    } else {
      widen(static_cast<const float*>(x) + begin, size, query.wide);
    }
    dots_live(w, tile, query, Query::kAny, partial);
  });
}

void window_fold_cpu(const double* partial, int64_t groups, int64_t slots, double* dots) {
  std::fill(dots, dots + slots, 0.0);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t s = 0; s < slots; ++s) dots[s] += partial[g * slots + s];
  }
}

}  // namespace torch_ext::kernels
