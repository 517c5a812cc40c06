// Products with phi(W), which is made tile by tile; the products themselves are ATen's.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "core/check.h"
#include "ops/snell/snell_layer.h"

namespace torch_ext::ops {
namespace {

using kernels::kSnellSegment;
using kernels::SnellBlock;
using kernels::SnellRule;

constexpr int64_t kTile = 512, kCudaTile = 2048;  // most rows and columns of a tile
constexpr int64_t kRowChunk = 2048;  // rows of x that are widened at a time, if x is narrower than the arithmetic type

// body(i) for all i < count. ATen's products inside run on one thread each and see the same shapes for every number of
// threads, so the bits do not depend on it: a region is opened even for a single task.
template <typename Body>
void in_parallel(int64_t count, const Body& body) {
  at::parallel_for(0, std::max<int64_t>(2, count), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // not inherited by other threads
    for (int64_t i = begin; i < std::min(end, count); ++i) body(i);
  });
}

// out = a b, or out += a b.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  const auto one = [accumulate](at::Tensor to, const at::Tensor& left, const at::Tensor& right) {
    if (accumulate) {
      at::addmm_out(to, to, left, right);
    } else {
      at::mm_out(to, left, right);
    }
  };
  if (out.numel() == 0) return;
  if (out.is_cuda()) return one(out, a, b);
  // Both halves of the columns for a short result, else blocks of rows.
  const int64_t rows = out.size(0), columns = out.size(1);
  if (rows <= kTile) {
    const int64_t half = std::max<int64_t>(1, (columns / 2 + 15) / 16 * 16);
    return in_parallel((columns + half - 1) / half, [&](int64_t i) {
      const int64_t width = std::min(half, columns - i * half);
      one(out.narrow(1, i * half, width), a, b.narrow(1, i * half, width));
    });
  }
  in_parallel((rows + kTile - 1) / kTile, [&](int64_t i) {
    const int64_t height = std::min(kTile, rows - i * kTile);
    one(out.narrow(0, i * kTile, height), a.narrow(0, i * kTile, height), b);
  });
}

double threshold_value(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : *t.const_data_ptr<float>();
}

void fill_block(const SnellLayer& layer, const at::Tensor& t, const SnellBlock& block, const at::Tensor& out) {
  if (layer.on_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::snell_tile_cuda(layer.weights, layer.type, t.const_data_ptr(), block, out.mutable_data_ptr(),
                             out.stride(0), core::current_stream(layer.a.device()));
#endif
    return;
  }
  const int64_t segments = (block.columns + kSnellSegment - 1) / kSnellSegment;
  at::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kSnellSegment, to = std::min(end * kSnellSegment, block.columns);
    kernels::snell_tile_cpu(layer.weights, layer.type, threshold_value(t),
                            {block.row, block.rows, block.column + from, to - from},
                            static_cast<char*>(out.mutable_data_ptr()) + from * out.element_size(), out.stride(0));
  });
}

// The tile's part of a buffer.
at::Tensor view_of(const at::Tensor& buffer, const SnellBlock& block) {
  return buffer.narrow(0, 0, block.rows * block.columns).view({block.rows, block.columns});
}

// Length of a tile: [0, size) in equal parts of at most kTile, whole multiples of 16.
int64_t tile_step(const SnellLayer& layer, int64_t size) {
  const int64_t most = layer.on_cuda() ? kCudaTile : kTile;
  const int64_t parts = (size + most - 1) / most;
  return ((size + parts - 1) / parts + 15) / 16 * 16;
}

at::Tensor tile_buffer(const SnellLayer& layer) {
  return at::empty({tile_step(layer, layer.weights.rows) * tile_step(layer, layer.weights.columns)}, layer.a.options());
}

struct Range {
  int64_t begin, size;
};
std::vector<Range> tiles(const SnellLayer& layer, int64_t size) {
  std::vector<Range> result;
  const int64_t step = tile_step(layer, size);
  for (int64_t at = 0; at < size; at += step) result.push_back({at, std::min(step, size - at)});
  return result;
}

// x and out in the arithmetic type.
void product_into(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& x, const at::Tensor& out,
                  const at::Tensor& buffer, bool transposed) {
  for (const Range to : tiles(layer, transposed ? layer.weights.rows : layer.weights.columns)) {
    for (const Range from : tiles(layer, transposed ? layer.weights.columns : layer.weights.rows)) {
      const SnellBlock block = transposed ? SnellBlock{to.begin, to.size, from.begin, from.size}
                                          : SnellBlock{from.begin, from.size, to.begin, to.size};
      const at::Tensor tile = view_of(buffer, block);
      fill_block(layer, t, block, tile);
      multiply(out.narrow(1, to.begin, to.size), x.narrow(1, from.begin, from.size), transposed ? tile.t() : tile,
               from.begin > 0);
    }
  }
}

// body(first row, rows) over chunks of x, which are widened one at a time; one chunk if x has the arithmetic type.
template <typename Body>
void for_each_chunk_of_rows(const SnellLayer& layer, const at::Tensor& x, const Body& body) {
  const int64_t rows = x.size(0), step = x.scalar_type() == layer.a.scalar_type() ? rows : kRowChunk;
  for (int64_t at = 0; at < rows; at += step) body(at, std::min(step, rows - at));
}

at::Tensor widened(const SnellLayer& layer, const at::Tensor& x) { return x.to(layer.a.scalar_type()); }

// G = x^T grad_y of one tile.
void correlate(const SnellLayer& layer, const at::Tensor& x, const at::Tensor& grad_y, const SnellBlock& block,
               const at::Tensor& out) {
  for_each_chunk_of_rows(layer, x, [&](int64_t at, int64_t rows) {
    const at::Tensor inputs = widened(layer, x.narrow(0, at, rows).narrow(1, block.row, block.rows));
    const at::Tensor outputs = widened(layer, grad_y.narrow(0, at, rows).narrow(1, block.column, block.columns));
    multiply(out, inputs.t(), outputs, at > 0);
  });
}

// Accumulates what all tiles give to A and B.
class FactorGradients {
 public:
  FactorGradients(const SnellLayer& layer, const at::Tensor& t, bool pulled)
      : layer_(layer),
        t_(t),
        a_(at::zeros_like(layer.a)),
        b_(at::zeros({2, layer.weights.columns, layer.weights.q}, layer.a.options())) {
    const int64_t segments = (tile_step(layer, layer.weights.columns) + kSnellSegment - 1) / kSnellSegment;
    const SnellRule rule = layer.weights.rule;
    pulled_ = pulled && layer.exact && (rule == SnellRule::kPaper || rule == SnellRule::kSoft);
    if (layer.on_cuda()) {
      if (!pulled_) return;
      pull_on_device_ = at::full({2}, kNone, layer.a.options().dtype(at::kLong));  // the sum's bits, and the holder
      pull_on_device_.narrow(0, 0, 1).zero_();
    } else {
      shares_ = at::empty({segments, tile_step(layer, layer.weights.rows), 2 * layer.weights.q}, layer.a.options());
    }
  }

  // `tile` holds G and afterwards, if `want_phi`, phi(W).
  void add(const SnellBlock& block, const at::Tensor& tile, bool want_phi) {
#if TORCH_EXT_WITH_CUDA
    if (layer_.on_cuda()) {
      kernels::snell_gradient_cuda(layer_.weights, layer_.type, t_.const_data_ptr(), layer_.exact, block,
                                   tile.const_data_ptr(), tile.stride(0), a_.mutable_data_ptr(), b_.mutable_data_ptr(),
                                   pull_on_device_.defined() ? pull_on_device_.mutable_data_ptr() : nullptr,
                                   core::current_stream(a_.device()));
      if (want_phi) fill_block(layer_, t_, block, tile);
      return;
    }
#endif
    std::vector<kernels::SnellGradient> segments(
        static_cast<size_t>((block.columns + kSnellSegment - 1) / kSnellSegment));
    at::parallel_for(0, static_cast<int64_t>(segments.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t from = s * kSnellSegment;
        void* g = static_cast<char*>(tile.mutable_data_ptr()) + from * tile.element_size();
        auto& segment = segments[static_cast<size_t>(s)];
        segment = {g,
                   want_phi ? g : nullptr,
                   tile.stride(0),
                   static_cast<char*>(shares_.mutable_data_ptr()) + s * shares_.stride(0) * shares_.element_size(),
                   b_.mutable_data_ptr(),
                   threshold_value(t_),
                   layer_.exact,
                   0,
                   kNone};
        const int64_t width = std::min(kSnellSegment, block.columns - from);
        kernels::snell_gradient_cpu(layer_.weights, layer_.type, {block.row, block.rows, block.column + from, width},
                                    segment);
      }
    });
    at::Tensor rows = a_.narrow(1, block.row, block.rows);
    for (size_t s = 0; s < segments.size(); ++s) {
      rows.add_(shares_[static_cast<int64_t>(s)].narrow(0, 0, block.rows).view({block.rows, 2, -1}).transpose(0, 1));
      pull_ += segments[s].pull;
      holder_ = std::min(holder_, segments[s].holder);
    }
  }

  void finish() {
#if TORCH_EXT_WITH_CUDA
    if (pull_on_device_.defined()) {
      kernels::snell_threshold_gradient_cuda(layer_.weights, layer_.type, pull_on_device_.const_data_ptr(),
                                             a_.mutable_data_ptr(), b_.mutable_data_ptr(),
                                             core::current_stream(a_.device()));
    }
#endif
    if (!pulled_ || holder_ == kNone) return;
    kernels::snell_threshold_gradient_cpu(layer_.weights, layer_.type, pull_, holder_, a_.mutable_data_ptr(),
                                          b_.mutable_data_ptr());
  }

  const at::Tensor& a() const { return a_; }
  const at::Tensor& b() const { return b_; }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const SnellLayer& layer_;
  const at::Tensor& t_;
  bool pulled_;
  at::Tensor a_, b_, shares_, pull_on_device_;
  double pull_ = 0;
  int64_t holder_ = kNone;
};

}  // namespace

void snell_fill(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& out) {
  fill_block(layer, t, {0, layer.weights.rows, 0, layer.weights.columns}, out);
}

at::Tensor snell_product(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& x, bool transposed) {
  at::Tensor out = at::empty({x.size(0), transposed ? layer.weights.rows : layer.weights.columns}, x.options());
  const at::Tensor buffer = tile_buffer(layer);
  for_each_chunk_of_rows(layer, x, [&](int64_t at, int64_t rows) {
    const at::Tensor from = widened(layer, x.narrow(0, at, rows));
    const at::Tensor to = out.narrow(0, at, rows);
    const at::Tensor wide = to.scalar_type() == from.scalar_type() ? to : at::empty(to.sizes(), from.options());
    product_into(layer, t, from, wide, buffer, transposed);
    if (!wide.is_same(to)) to.copy_(wide);
  });
  return out;
}

SnellGradients snell_gradients(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& x,
                               const at::Tensor& grad_y, bool pulled, bool want_x) {
  const bool together = want_x && x.scalar_type() == layer.a.scalar_type();
  SnellGradients result;
  if (want_x) result.x = together ? at::empty(x.sizes(), x.options()) : snell_product(layer, t, grad_y, true);
  FactorGradients factors(layer, t, pulled);
  const at::Tensor buffer = tile_buffer(layer);
  for (const Range in : tiles(layer, layer.weights.rows)) {
    for (const Range out : tiles(layer, layer.weights.columns)) {
      if (x.size(0) == 0) continue;
      const SnellBlock block{in.begin, in.size, out.begin, out.size};
      const at::Tensor tile = view_of(buffer, block);
      correlate(layer, x, grad_y, block, tile);
      factors.add(block, tile, together);
      if (together) {
        multiply(result.x.narrow(1, in.begin, in.size), grad_y.narrow(1, out.begin, out.size), tile.t(), out.begin > 0);
      }
    }
  }
  factors.finish();
  result.a = factors.a();
  result.b = factors.b();
  return result;
}

}  // namespace torch_ext::ops
