// Entry points of the population's layers over raw pointers. A task is a pair of members and a block of its rows; tasks
// write disjoint elements, and the block's size is fixed, so no result depends on how tasks are shared out.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "ops/eggroll/eggroll_functor.h"

namespace torch_ext::kernels {

constexpr int64_t kEggrollRows = 64;       // rows of a member in one task
constexpr int64_t kEggrollColumns = 4096;  // elements of a vector in one task
constexpr int64_t kEggrollCudaRank = 64;   // largest rank on CUDA, which bounds the shared memory

// What the matrix product of a linear layer is added to:
//   y[i, row, j] = bias[j] + s sigma eps[j] + (s sigma / sqrt(rank)) sum_k (x[i, row] . in_k) out_k[j]
// with in_k, out_k the columns of the factors on either side. Products with x are sums of one shape: 32 lanes in the
// arithmetic type, which fold as a tree.
struct EggrollLayer {
  EggrollMembers members;
  core::NoiseLaw law;
  int64_t rank;
  double sigma;
  int64_t ordinal, bias_ordinal;  // -1: no noise
  core::PhiloxTag in_tag, out_tag;
  int64_t rows;   // of each member
  const void* x;  // [count, rows, in]
  int64_t in;
  const void* bias;  // [out] or null
  void* y;           // [count, rows, out]
  int64_t out;

  TX_HD int64_t blocks() const { return (rows + kEggrollRows - 1) / kEggrollRows; }
  TX_HD int64_t tasks() const { return members.pairs() * blocks(); }
};
void eggroll_layer_cpu(const EggrollLayer& layer, core::DType type, int64_t begin, int64_t end);
void eggroll_layer_cuda(const EggrollLayer& layer, core::DType type, void* stream);

// Rows of perturbed matrices: out[i, row] = W[id] + (s sigma / sqrt(rank)) sum_k A[id, k] B_k, id = ids[i, row], or row
// itself if `ids` is null. `out` may be W when there is one member and no ids.
struct EggrollRowsOf {
  EggrollMembers members;
  core::NoiseLaw law;
  int64_t rank;
  double sigma;
  int64_t ordinal;
  int64_t rows;        // of each member
  const int64_t* ids;  // [count, rows] or null
  const void* weight;  // [entries, n]
  int64_t entries, n;
  void* out;  // [count, rows, n]

  TX_HD int64_t blocks() const { return (rows + kEggrollRows - 1) / kEggrollRows; }
  TX_HD int64_t tasks() const { return members.pairs() * blocks(); }
};
void eggroll_rows_cpu(const EggrollRowsOf& rows, core::DType type, int64_t begin, int64_t end);
void eggroll_rows_cuda(const EggrollRowsOf& rows, core::DType type, void* stream);

// out[i] = theta + s sigma eps.
struct EggrollVector {
  EggrollMembers members;
  core::NoiseLaw law;
  double sigma;
  int64_t ordinal;
  const void* theta;  // [numel]
  int64_t numel;
  void* out;  // [count, numel]

  TX_HD int64_t blocks() const { return (numel + kEggrollColumns - 1) / kEggrollColumns; }
  TX_HD int64_t tasks() const { return members.pairs() * blocks(); }
};
void eggroll_vector_cpu(const EggrollVector& vector, core::DType type, int64_t begin, int64_t end);
void eggroll_vector_cuda(const EggrollVector& vector, core::DType type, void* stream);

// Factors of a stretch of pairs as the rows of a matrix, for the product that sums them up:
//   out[k * rank + column, row] = coeff[k] * element (row_begin + row, column) of pair + k; without coeff, 1.
// Elements are rounded as values of `type`; out and coeff have its arithmetic type.
struct EggrollFactors {
  core::NoiseLaw law;
  core::PhiloxStream stream;  // of the first pair
  const void* coeff;          // [pairs] or null
  int64_t pairs, row_begin, rows, rank;
  void* out;  // [pairs * rank, rows]
};
void eggroll_factors_cpu(const EggrollFactors& factors, core::DType type, int64_t begin, int64_t end);
void eggroll_factors_cuda(const EggrollFactors& factors, core::DType type, void* stream);

}  // namespace torch_ext::kernels
