// Entry points of the kernels that write M-FAC's update into parameters.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "curvature/fisher_window/fisher_window_kernel.h"
#include "optim/mfac/mfac_functor.h"

namespace torch_ext::kernels {

// One parameter: columns [begin, begin + numel) of the window. The buffer is float for float/bfloat16/half parameters
// and double for double ones; null without momentum.
struct MfacTensor {
  void* param;
  void* buffer;
  float* step;  // written steps
  int64_t begin, numel;
  double lr, momentum, dampening, weight_decay;  // weight_decay: decoupled
  core::DType type;
};

template <typename T>
TX_HD MfacStep<T> mfac_scalars(const MfacTensor& t) {
  return {static_cast<T>(t.lr), static_cast<T>(t.momentum), static_cast<T>(1 - t.dampening),
          static_cast<T>(1 - t.lr * t.weight_decay)};
}

// Elements [begin, end) of one parameter; update points to that of element `begin`, double (`wide`) or float.
void mfac_update_cpu(const MfacTensor& tensor, const void* update, bool wide, int64_t begin, int64_t end);

// All parameters, counters included, on `stream` of the current device; nothing happens where *ring rejected the row.
// From a flat update that stands ready, double (`wide`) or float:
void mfac_update_cuda(const std::vector<MfacTensor>& tensors, const void* update, bool wide, const int64_t* ring,
                      void* stream);
// Forming the update on the way; not for topk windows.
void mfac_fused_cuda(const std::vector<MfacTensor>& tensors, const WindowView& window, const double* coefficients,
                     void* stream);

}  // namespace torch_ext::kernels
