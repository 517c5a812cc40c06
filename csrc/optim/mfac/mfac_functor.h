// The arithmetic of one M-FAC parameter update (Frantar et al., arXiv:2107.03356, Algorithm 1, with momentum and
// decay).
#pragma once

#include "core/macros.h"

namespace torch_ext::kernels {

// u = F^-1 g is the preconditioned gradient.
template <typename T>
struct MfacStep {
  T lr, momentum, one_minus_dampening, keep;  // keep = 1 - lr * decoupled weight decay

  // b <- momentum b + (1 - dampening) u.
  TX_HD T buffer(T b, T u) const { return momentum * b + one_minus_dampening * u; }
  // p <- p (1 - lr weight_decay) - lr b; without momentum b is u.
  TX_HD T parameter(T p, T b) const { return keep * p - lr * b; }
};

}  // namespace torch_ext::kernels
