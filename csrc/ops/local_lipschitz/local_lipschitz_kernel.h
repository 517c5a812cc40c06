// Entry points of the kernels of the Lipschitz relaxation over raw pointers, float or double.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "ops/local_lipschitz/local_lipschitz_functor.h"

namespace torch_ext::kernels {

constexpr int kLipschitzLanes = 32;  // partial sums of a row, folded as a tree on every device

// Elements [0, count) of gl, gu, sl, su -> lines [4, count]: au, iu, al, il.
struct LipschitzLinesWork {
  const void *gl, *gu, *sl, *su;
  int64_t count;
  bool constant;
  void* lines;
  // Backward: gradients of the lines, and of the four arrays.
  const void* grad_lines;
  void *grad_gl, *grad_gu, *grad_sl, *grad_su;
};
void lipschitz_lines_cpu(const LipschitzLinesWork& work, core::DType type, int64_t begin, int64_t end);
void lipschitz_lines_gradient_cpu(const LipschitzLinesWork& work, core::DType type, int64_t begin, int64_t end);
void lipschitz_lines_cuda(const LipschitzLinesWork& work, core::DType type, void* stream);
void lipschitz_lines_gradient_cuda(const LipschitzLinesWork& work, core::DType type, void* stream);

// Coefficients a [groups or 1, rows, width] of p, replaced by coefficients of g: where a > 0 the upper line counts,
// else the lower. mirror: the same for -a, in rows rows ... 2 rows - 1 of the results.
struct LipschitzRelaxWork {
  const void* a;
  const void* lines;  // [4, groups, width] au, iu, al, il; without slopes [2, groups, width] iu, il
  int64_t groups, rows, width;
  bool shared, mirror, slopes;  // shared: a is the same for all groups
  void* out;                    // [groups, rows (or 2 rows), width]; not written without slopes
  void* sums;                   // [groups, rows (or 2 rows)]: sum over the width of a times the intercept
  // Backward.
  const void *grad_out, *grad_sums;
  void* grad_a;      // [groups, rows, width]
  void* grad_lines;  // like lines
};
// Rows [begin, end) of groups * rows; each in one piece.
void lipschitz_relax_cpu(const LipschitzRelaxWork& work, core::DType type, int64_t begin, int64_t end);
// Groups [begin, end).
void lipschitz_relax_gradient_cpu(const LipschitzRelaxWork& work, core::DType type, int64_t begin, int64_t end);
void lipschitz_relax_cuda(const LipschitzRelaxWork& work, core::DType type, void* stream);
void lipschitz_relax_gradient_cuda(const LipschitzRelaxWork& work, core::DType type, void* stream);

template <typename Body>
auto dispatch_lipschitz_type(core::DType type, const Body& body) {
  return type == core::DType::kDouble ? body(double{}) : body(float{});
}

template <typename Body>
void dispatch_lipschitz_relax(const LipschitzRelaxWork& work, const Body& body) {
  if (work.slopes) {
    work.mirror ? body(std::true_type{}, std::true_type{}) : body(std::true_type{}, std::false_type{});
  } else {
    work.mirror ? body(std::false_type{}, std::true_type{}) : body(std::false_type{}, std::false_type{});
  }
}

}  // namespace torch_ext::kernels
