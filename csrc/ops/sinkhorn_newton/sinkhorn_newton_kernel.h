// Passes over the cost matrix, over raw pointers. Entry (i, j) is c_ij = C_ij - offset (dense), or half the squared
// distance of two points, which is computed where it is needed and never stored.
//
// Every sum has one shape: along a row segments of 1024 entries, summed in 32 lanes and a tree
// (core/block_reduce.h); along a column segments of 32 entries, one by one; segments merged in order. So the bits do
// not depend on threads, instruction set or device.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/dtype_dispatch.h"
#include "ops/sinkhorn_newton/sinkhorn_newton_functor.h"

namespace torch_ext::kernels {

constexpr int64_t kRowSegment = 1024;
constexpr int64_t kColumnSegment = 32;
constexpr int64_t kColumnTile = 64;  // columns that one call of the CPU kernel takes together

struct SinkhornCost {
  const void* dense;  // [n, m] row-major, or null
  core::DType type;   // of dense
  double offset;      // subtracted from dense entries
  const double* x;    // [n, d] points of the rows
  const double* y_t;  // [d, m] points of the columns, one coordinate after another
  int64_t n, m, d;
};

// Calls body(entries) with the cost's entries as a functor of their type.
template <typename Body>
void with_cost(const SinkhornCost& cost, const Body& body) {
  if (cost.dense == nullptr) {
    body(PointCost{cost.x, cost.y_t, cost.m, cost.d});
    return;
  }
  core::dispatch_dtype(cost.type, [&](auto storage) {
    using S = decltype(storage);
    body(DenseCost<S>{static_cast<const S*>(cost.dense), cost.offset, cost.m});
  });
}

// Potentials and 1/eps of a plan exp((f_i + g_j - c_ij) / eps).
struct SinkhornPoint {
  const double* f;
  const double* g;
  double inv_eps;
};

// Nonzeros of the sparsified plan, row by row, columns ascending.
struct SparsePlan {
  std::vector<int64_t> start;  // [n + 1]
  std::vector<int32_t> column;
  std::vector<double> value;
};

struct CostRange {
  double min, max;  // over finite entries
  bool invalid;     // a NaN or -infinity
};

// log sum_j exp((g_j - c_ij) / eps) for rows [begin, end), and log sum_i exp((f_i - c_ij) / eps) for columns.
void sinkhorn_rows_cpu(const SinkhornCost& cost, const double* g, double inv_eps, double* out, int64_t begin,
                       int64_t end);
void sinkhorn_columns_cpu(const SinkhornCost& cost, const double* f, double inv_eps, double* out, int64_t begin,
                          int64_t end);
// Of dense costs.
CostRange sinkhorn_range_cpu(const SinkhornCost& cost, int64_t begin, int64_t end);
// sum_j P_ij w_j for rows [begin, end), and sum_i P_ij w_i for columns.
void sinkhorn_apply_rows_cpu(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* out,
                             int64_t begin, int64_t end);
void sinkhorn_apply_columns_cpu(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* out,
                                int64_t begin, int64_t end);
// Appends the entries of rows [begin, end) with exponent > min(log_row_i, log_column_j); count[i] of them per row.
void sinkhorn_compact_cpu(const SinkhornCost& cost, const SinkhornPoint& at, const double* log_row,
                          const double* log_column, int64_t begin, int64_t end, std::vector<int32_t>& column,
                          std::vector<double>& value, int64_t* count);
// mass * plan [n, m], rows [begin, end), as float or double.
void sinkhorn_plan_cpu(const SinkhornCost& cost, const SinkhornPoint& at, double mass, void* out, core::DType type,
                       int64_t begin, int64_t end);
// out[i, k] = sum_j P_ij (x_ik - y_jk) for points: the gradient of <P, C> with respect to x.
void sinkhorn_displacement_cpu(const SinkhornCost& cost, const SinkhornPoint& at, double* out, int64_t begin,
                               int64_t end);

// The same for all rows or columns on a stream; pointers to device memory. scratch: 2 * ceil(n / 32) * m doubles.
void sinkhorn_rows_cuda(const SinkhornCost& cost, const double* g, double inv_eps, double* out, void* stream);
void sinkhorn_columns_cuda(const SinkhornCost& cost, const double* f, double inv_eps, double* scratch, double* out,
                           void* stream);
void sinkhorn_apply_rows_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* out,
                              void* stream);
void sinkhorn_apply_columns_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* w, double* scratch,
                                 double* out, void* stream);
void sinkhorn_range_cuda(const SinkhornCost& cost, double* per_row /* [n, 3]: min, max, invalid */, void* stream);
void sinkhorn_count_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* log_row,
                         const double* log_column, int64_t* count, void* stream);
void sinkhorn_fill_cuda(const SinkhornCost& cost, const SinkhornPoint& at, const double* log_row,
                        const double* log_column, const int64_t* start, int32_t* column, double* value, void* stream);
void sinkhorn_plan_cuda(const SinkhornCost& cost, const SinkhornPoint& at, double mass, void* out, core::DType type,
                        void* stream);
void sinkhorn_displacement_cuda(const SinkhornCost& cost, const SinkhornPoint& at, double* out, void* stream);

}  // namespace torch_ext::kernels
