// The block-diagonal Fisher matrix as the operators work on it; the public face is
// <torch_ext/curvature/static_fisher.h>.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace torch_ext::curvature {

// Columns that `keep` leaves out count as zero gradients: F^-1 of the others is then that of F restricted to them.
struct FisherBlocks {
  at::Tensor gradients;  // [m, d]
  double damping;
  int64_t block;    // in [1, d]
  at::Tensor keep;  // bool [d], or undefined: all
};

struct FisherFactor {
  at::Tensor blocks, tail;  // as in StaticFisher
};

// Consecutive blocks of one width, as many as fit the work space together (at least one), each with a matrix of `order`
// rows and columns.
struct BlockRange {
  int64_t column, count, width;  // first column, number of blocks, columns a block
  bool tail;
  int64_t index;  // of the first block within FisherFactor::blocks or ::tail

  bool wide(const FisherBlocks& fisher) const { return width > fisher.gradients.size(0); }
  // This range of a tensor [d, ...] as a view [count, width, ...].
  at::Tensor of(const at::Tensor& vector) const;
  const at::Tensor& part(const FisherFactor& factor) const { return tail ? factor.tail : factor.blocks; }
};
std::vector<BlockRange> block_ranges(const FisherBlocks& fisher, int64_t order = 0);

// body(first, tile) over tiles [count, m, columns] float64 of G, which together hold columns 0 ... width - 1 of every
// block of the range; `keep` as in FisherBlocks. Do not write to a tile: it may be the gradients themselves.
using TileBody = std::function<void(int64_t first, const at::Tensor& tile)>;
void for_each_tile(const FisherBlocks& fisher, const BlockRange& range, const at::Tensor& keep, const TileBody& body);

// gram += a a^T, lower triangle only; a [n, k, c].
void add_gram(const at::Tensor& gram, const at::Tensor& a);
// L of `symmetric` + shift I, batched; overwrites the diagonal of its argument. ValueError where it is not positive
// definite, which only a shift below the rounding of the matrix can cause.
at::Tensor damped_cholesky(const at::Tensor& symmetric, double shift);

FisherFactor factorize(const FisherBlocks& fisher);
// The tensors of an earlier factorize(); ValueError if they cannot be.
FisherFactor checked_factor(const FisherBlocks& fisher, const at::Tensor& blocks, const at::Tensor& tail);
at::Tensor inverse_diagonal(const FisherBlocks& fisher, const FisherFactor& factor);             // [d] float64
at::Tensor inverse_times(const FisherBlocks& fisher, const FisherFactor& factor, at::Tensor x);  // x [d, k] float64
at::Tensor whitened_rows(const FisherBlocks& fisher);                                            // W [m, d] float64
// delta^T F delta / 2, a 0-dim float64 tensor; a sum of squares.
at::Tensor half_quadratic(const FisherBlocks& fisher, const at::Tensor& delta);

// ValueError or TypeError; fisher_blocks checks, too. The check works on meta tensors.
void check_fisher(const at::Tensor& gradients, double damping, std::optional<int64_t> block);
FisherBlocks fisher_blocks(const at::Tensor& gradients, double damping, std::optional<int64_t> block);

}  // namespace torch_ext::curvature
