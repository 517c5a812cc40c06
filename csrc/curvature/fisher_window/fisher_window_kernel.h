// Entry points of the Fisher window's kernels over raw pointers. No kernel needs the host to know what the ring holds.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "curvature/fisher_window/fisher_window_functor.h"

namespace torch_ext::kernels {

enum class WindowFormat : uint8_t { kFloat, kDouble, kBFloat16, kInt8, kTopK };

enum RingField : int {
  kRingCount,      // live rows
  kRingNext,       // the spare slot, which the next row takes
  kRingOffset,     // first row and column of the Cholesky factor inside `factor`
  kRingSince,      // rows accepted since the factor was made from the Gram matrix
  kRingAccepted,   // 1 if the last row was accepted, else 0
  kRingRejected,   // rows rejected in total
  kRingForm,       // what `factor` holds: FactorForm
  kRingRefactors,  // how often a factor was made from the Gram matrix
  kRingTotal,      // rows accepted in total
  kRingSize
};
enum FactorForm : int64_t { kFormNone, kFormCholesky, kFormInverse };

struct WindowView {
  void* rows;
  float* scales;
  int16_t* indices;
  float* error;  // null without error feedback
  const int64_t* ring;
  int64_t tiles, slots, kept;
  WindowFormat format;
};

// A piece of the row: columns [begin, begin + numel), factor * grad + weight_decay * param, zeros where grad is null.
struct RowSegment {
  const void* grad;
  const void* param;
  double weight_decay;
  int64_t begin, numel;
  core::DType grad_type, param_type;
};

// The row's columns [begin, end) in R = double (`wide`) or float; the segments are ascending and may leave gaps
// (zeros).
void window_gather_cpu(const std::vector<RowSegment>& segments, double factor, bool wide, int64_t begin, int64_t end,
                       void* row);
// Tiles of one group: gather, encode into the spare slot, and add to partial[slots] the products with each live row
// and, at the spare slot, with itself.
void window_dots_cpu(const WindowView& window, const std::vector<RowSegment>& segments, double factor, int64_t group,
                     double* partial);
// The same for an x that is not stored: x[begin, end) flat, of float or double.
void window_project_cpu(const WindowView& window, const void* x, bool wide, int64_t numel, int64_t group,
                        double* partial);
// dots[s] = sum of partial[g][s] over the groups, in order.
void window_fold_cpu(const double* partial, int64_t groups, int64_t slots, double* dots);

struct LiveRow {
  int64_t slot;
  double coefficient;
};
// Live rows in ascending slots with their coefficients.
std::vector<LiveRow> window_live(const int64_t* ring, const double* coefficients);
// One tile of G^T coefficients: into float (double for kDouble).
void window_combine_cpu(const WindowView& window, const std::vector<LiveRow>& live, int64_t tile, void* out);
// out[i] = (x[i] - (G^T coefficients)[i]) / damping for the first `size` columns of a tile, all products in double.
void window_residual_cpu(const WindowView& window, const std::vector<LiveRow>& live, int64_t tile, const double* x,
                         int64_t size, double damping, void* out);

// The m x m part.
struct CommitArgs {
  double damping;   // lambda
  int64_t slots;    // m + 1
  int64_t leading;  // of `factor`
  int64_t warmup_steps, refactor_every;
  bool warmup_scaling;
};
struct CommitTensors {
  double* gram;
  double* factor;
  int64_t* ring;
  double* coefficients;
  const double* dots;
  const float* nonfinite;  // null, or a flag that rejects the row
};
void window_commit_cpu(const CommitTensors& t, const CommitArgs& args);
// solution = K^-1 right_side by slot, or m K^-1 e_newest where right_side is null.
void window_solve_cpu(const CommitTensors& t, const CommitArgs& args, const double* right_side, double* solution);

}  // namespace torch_ext::kernels
