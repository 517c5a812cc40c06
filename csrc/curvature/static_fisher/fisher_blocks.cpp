#include "curvature/static_fisher/fisher_blocks.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace torch_ext::curvature {
namespace {

constexpr int64_t kTileElements = int64_t{1} << 22;  // 32 MiB of float64
constexpr int64_t kPanel = 128;

at::TensorOptions like(const FisherBlocks& fisher) { return fisher.gradients.options().dtype(at::kDouble); }
double num_grads(const FisherBlocks& fisher) { return static_cast<double>(fisher.gradients.size(0)); }

at::Tensor factor_of(const FisherBlocks& fisher, const BlockRange& range) {
  const bool wide = range.wide(fisher);
  const int64_t order = wide ? fisher.gradients.size(0) : range.width;
  const at::Tensor gram = at::zeros({range.count, order, order}, like(fisher));
  for_each_tile(fisher, range, fisher.keep,
                [&](int64_t, const at::Tensor& tile) { add_gram(gram, wide ? tile : tile.mT()); });
  if (wide) return damped_cholesky(gram, num_grads(fisher) * fisher.damping);
  return at::cholesky_inverse(damped_cholesky(gram.div_(num_grads(fisher)), fisher.damping));
}

at::Tensor factor_in(const FisherFactor& factor, const BlockRange& range) {
  return range.part(factor).narrow(0, range.index, range.count);
}

// K^-1 G x for the blocks of a range, [count, m, k].
at::Tensor coefficients(const FisherBlocks& fisher, const BlockRange& range, const at::Tensor& factor,
                        const at::Tensor& x) {
  at::Tensor dots = at::zeros({range.count, fisher.gradients.size(0), x.size(2)}, like(fisher));
  for_each_tile(fisher, range, fisher.keep, [&](int64_t first, const at::Tensor& tile) {
    dots.add_(at::bmm(tile, x.narrow(1, first, tile.size(2))));
  });
  return at::cholesky_solve(dots, factor);
}

struct FactorSizes {
  std::vector<int64_t> blocks, tail;
};

FactorSizes factor_sizes(const FisherBlocks& fisher) {
  const int64_t m = fisher.gradients.size(0), d = fisher.gradients.size(1), rest = d % fisher.block;
  const int64_t order = std::min(m, fisher.block), tail_order = std::min(m, rest);
  return {{d / fisher.block, order, order}, {rest == 0 ? 0 : 1, tail_order, tail_order}};
}

}  // namespace

at::Tensor BlockRange::of(const at::Tensor& vector) const {
  return vector.narrow(0, column, count * width).unflatten(0, {count, width});
}

std::vector<BlockRange> block_ranges(const FisherBlocks& fisher, int64_t order) {
  const int64_t d = fisher.gradients.size(1), width = fisher.block, blocks = d / width;
  const int64_t elements = std::max(fisher.gradients.size(0) * width, order * order);
  const int64_t together = std::max<int64_t>(1, kTileElements / elements);
  std::vector<BlockRange> ranges;
  for (int64_t i = 0; i < blocks; i += together) {
    ranges.push_back({i * width, std::min(together, blocks - i), width, false, i});
  }
  if (d % width != 0) ranges.push_back({blocks * width, 1, d % width, true, 0});
  return ranges;
}

void for_each_tile(const FisherBlocks& fisher, const BlockRange& range, const at::Tensor& keep, const TileBody& body) {
  const int64_t m = fisher.gradients.size(0);
  // Only a wide block may be cut: a narrow one needs all its columns at once, and is no larger than m x m.
  const int64_t fits = std::max<int64_t>(1, kTileElements / (m * range.count));
  const int64_t step = range.wide(fisher) ? std::min(range.width, fits) : range.width;
  const at::Tensor columns = fisher.gradients.narrow(1, range.column, range.count * range.width)
                                 .unflatten(1, {range.count, range.width})
                                 .transpose(0, 1);
  const at::Tensor kept = keep.defined() ? range.of(keep).unsqueeze(1) : at::Tensor();
  for (int64_t first = 0; first < range.width; first += step) {
    const int64_t count = std::min(step, range.width - first);
    at::Tensor tile = columns.narrow(2, first, count);
    if (kept.defined() || tile.scalar_type() != at::kDouble) {
      tile = at::empty(tile.sizes(), like(fisher)).copy_(tile);
      if (kept.defined()) tile.mul_(kept.narrow(2, first, count));
    }
    body(first, tile);
  }
}

void add_gram(const at::Tensor& gram, const at::Tensor& a) {
  const int64_t order = a.size(1);  // in panels, since ATen has no product that computes one triangle only
  for (int64_t i = 0; i < order; i += kPanel) {
    const int64_t panel = std::min(kPanel, order - i);
    const at::Tensor product = at::bmm(a.narrow(1, i, order - i), a.narrow(1, i, panel).mT());
    gram.narrow(1, i, order - i).narrow(2, i, panel).add_(product);
  }
}

at::Tensor damped_cholesky(const at::Tensor& symmetric, double shift) {
  const at::Tensor diagonal = symmetric.diagonal(0, 1, 2);
  TORCH_CHECK_VALUE(diagonal.isfinite().all().item<bool>(),
                    "StaticFisher: a gradient holds NaN or infinity; leave it out, every other row is usable");
  diagonal.add_(shift);
  auto [factor, info] = at::linalg_cholesky_ex(symmetric);
  TORCH_CHECK_VALUE(info.eq(0).all().item<bool>(), "StaticFisher: damping ", shift,
                    " vanishes in float64 against the gradients' Gram matrix; use a larger damping");
  return factor;
}

FisherFactor factorize(const FisherBlocks& fisher) {
  const FactorSizes sizes = factor_sizes(fisher);
  FisherFactor factor{at::empty(sizes.blocks, like(fisher)), at::empty(sizes.tail, like(fisher))};
  for (const BlockRange& range : block_ranges(fisher)) factor_in(factor, range).copy_(factor_of(fisher, range));
  return factor;
}

FisherFactor checked_factor(const FisherBlocks& fisher, const at::Tensor& blocks, const at::Tensor& tail) {
  const FactorSizes sizes = factor_sizes(fisher);
  const auto fits = [&](const at::Tensor& tensor, at::IntArrayRef expected) {
    return tensor.sizes() == expected && tensor.scalar_type() == at::kDouble &&
           tensor.device() == fisher.gradients.device();
  };
  TORCH_CHECK_VALUE(fits(blocks, sizes.blocks) && fits(tail, sizes.tail),
                    "StaticFisher: the factor does not belong to these gradients and this block; move all tensors of a "
                    "StaticFisher together, or make it anew");
  return {blocks, tail};
}

at::Tensor inverse_diagonal(const FisherBlocks& fisher, const FisherFactor& factor) {
  at::Tensor result = at::empty({fisher.gradients.size(1)}, like(fisher));
  for (const BlockRange& range : block_ranges(fisher)) {
    const at::Tensor out = range.of(result), held = factor_in(factor, range);
    if (!range.wide(fisher)) {
      out.copy_(held.diagonal(0, 1, 2));
      continue;
    }
    for_each_tile(fisher, range, fisher.keep, [&](int64_t first, const at::Tensor& tile) {
      const at::Tensor w = at::linalg_solve_triangular(held, tile, /*upper=*/false);
      const at::Tensor from_rows = w.square_().sum(1).neg_().add_(1).div_(fisher.damping);
      const at::Tensor bound = tile.square().sum(1).div_(num_grads(fisher)).add_(fisher.damping).reciprocal_();
      out.narrow(1, first, tile.size(2)).copy_(from_rows.maximum(bound));
    });
  }
  return result;
}

at::Tensor inverse_times(const FisherBlocks& fisher, const FisherFactor& factor, at::Tensor x) {
  x = x.contiguous();
  at::Tensor result = at::empty_like(x);
  for (const BlockRange& range : block_ranges(fisher)) {
    const at::Tensor out = range.of(result), in = range.of(x), held = factor_in(factor, range);
    if (!range.wide(fisher)) {
      out.copy_(at::bmm(held, in));
      continue;
    }
    const at::Tensor z = coefficients(fisher, range, held, in);
    for_each_tile(fisher, range, fisher.keep, [&](int64_t first, const at::Tensor& tile) {
      const int64_t count = tile.size(2);
      out.narrow(1, first, count).copy_((in.narrow(1, first, count) - at::bmm(tile.mT(), z)).div_(fisher.damping));
    });
  }
  return result;
}

at::Tensor whitened_rows(const FisherBlocks& fisher) {
  const int64_t m = fisher.gradients.size(0);
  const at::Tensor result = at::empty({fisher.gradients.size(1), m}, like(fisher));  // W^T: blocks are contiguous
  for (const BlockRange& range : block_ranges(fisher, m)) {
    const at::Tensor gram = at::zeros({range.count, m, m}, like(fisher)), out = range.of(result);
    for_each_tile(fisher, range, fisher.keep, [&](int64_t, const at::Tensor& tile) { add_gram(gram, tile); });
    const at::Tensor factor = damped_cholesky(gram, num_grads(fisher) * fisher.damping);
    for_each_tile(fisher, range, fisher.keep, [&](int64_t first, const at::Tensor& tile) {
      out.narrow(1, first, tile.size(2)).copy_(at::linalg_solve_triangular(factor, tile, /*upper=*/false).mT());
    });
  }
  return result.t();
}

at::Tensor half_quadratic(const FisherBlocks& fisher, const at::Tensor& delta) {
  at::Tensor total = delta.square().sum().mul_(fisher.damping * num_grads(fisher));
  for (const BlockRange& range : block_ranges(fisher)) {
    const at::Tensor x = range.of(delta).unsqueeze(2);
    at::Tensor dots = at::zeros({range.count, fisher.gradients.size(0), 1}, like(fisher));
    for_each_tile(fisher, range, {}, [&](int64_t first, const at::Tensor& tile) {
      dots.add_(at::bmm(tile, x.narrow(1, first, tile.size(2))));
    });
    total.add_(dots.square_().sum());
  }
  return total.div_(2 * num_grads(fisher));
}

void check_fisher(const at::Tensor& gradients, double damping, std::optional<int64_t> block) {
  TORCH_CHECK(gradients.layout() == at::kStrided, "StaticFisher: gradients must be a dense tensor");
  core::dtype_of(gradients, "StaticFisher: gradients");
  TORCH_CHECK_VALUE(gradients.dim() == 2 && gradients.sym_size(0) >= 1 && gradients.sym_size(1) >= 1,
                    "StaticFisher: gradients must be [m, d] with at least one gradient and one weight, got ",
                    gradients.sym_sizes());
  TORCH_CHECK_VALUE(std::isfinite(damping) && damping > 0, "StaticFisher: damping must be positive, got ", damping);
  TORCH_CHECK_VALUE(!block.has_value() || *block >= 1, "StaticFisher: block must be at least 1 (None: one block), got ",
                    block.value_or(0));
}

FisherBlocks fisher_blocks(const at::Tensor& gradients, double damping, std::optional<int64_t> block) {
  check_fisher(gradients, damping, block);
  const int64_t d = gradients.size(1);
  return {gradients, damping, std::min(block.value_or(d), d), {}};
}

}  // namespace torch_ext::curvature
