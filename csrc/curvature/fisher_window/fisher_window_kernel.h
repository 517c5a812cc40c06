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
constexpr double kResidualBound = 1e-8;  // of |K p - e|_inf, beyond which the factor is made anew
constexpr int64_t kInverseScratch = 4;   // vectors of `slots` doubles that the device form needs
void window_commit_cpu(const CommitTensors& t, const CommitArgs& args);
// solution = K^-1 right_side by slot, or m K^-1 e_newest where right_side is null.
void window_solve_cpu(const CommitTensors& t, const CommitArgs& args, const double* right_side, double* solution);

// The form that CUDA uses (fisher_window_inverse.h) on one CPU thread, for tests: the same bits.
void window_commit_inverse_cpu(const CommitTensors& t, const CommitArgs& args);
void window_solve_inverse_cpu(const CommitTensors& t, const CommitArgs& args, const double* right_side,
                              double* solution);

// --- CUDA, on `stream` of the current device; every pointer is the device's ---

// Row elements [0, padded) in double (`wide`) or float; factor = sign / *grad_scale (null: 1).
void window_gather_cuda(const std::vector<RowSegment>& segments, double sign, const float* grad_scale, bool wide,
                        int64_t padded, void* row, void* stream);
// Encodes row[tiles * kTile] into the spare slot.
void window_encode_cuda(const WindowView& window, const void* row, void* stream);
// The same, and fills dots[slots]; partial: doubles, groups * slots.
void window_dots_cuda(const WindowView& window, const void* row, double* partial, double* dots, void* stream);
void window_project_cuda(const WindowView& window, const void* x, bool wide, int64_t numel, double* partial,
                         double* dots, void* stream);
// out[tiles * kTile].
void window_combine_cuda(const WindowView& window, const double* coefficients, void* out, void* stream);
void window_residual_cuda(const WindowView& window, const double* coefficients, const double* x, int64_t numel,
                          double damping, void* out, void* stream);
// scratch: kInverseScratch * slots doubles.
void window_commit_cuda(const CommitTensors& t, const CommitArgs& args, double* scratch, void* stream);
void window_solve_cuda(const CommitTensors& t, const CommitArgs& args, const double* right_side, double* solution,
                       double* scratch, void* stream);

}  // namespace torch_ext::kernels
