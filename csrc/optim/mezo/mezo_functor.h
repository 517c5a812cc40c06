// The arithmetic of MeZO (Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333,
// Algorithm 1), and the perturbation in place that can be taken back to the bit.
#pragma once

#include "core/dtype.h"
#include "core/macros.h"

namespace torch_ext::kernels {

// Bits of a stored value: what restoring compares.
TX_HD uint32_t mezo_bits(float x) { return core::float_bits(x); }
TX_HD uint32_t mezo_bits(core::BFloat16 x) { return x.bits; }
TX_HD uint32_t mezo_bits(core::Half x) { return x.bits; }
TX_HD uint64_t mezo_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <typename S>
struct MezoStep {
  using T = core::opmath_t<S>;

  // p + scale z, rounded to storage: what a forward pass sees.
  static TX_HD S shifted(S p, T scale, T z) {
    S q;
    core::store(q, core::load(p) + scale * z);
    return q;
  }
  // What replaying the noise makes of it: p again, unless rounding lost some of its bits. It does where |p + scale z|
  // has a larger exponent than |p|, and there is no map without memory that would not: there are far more floating-
  // point numbers near 0 than near scale z. Those elements are kept.
  static TX_HD bool lost(S p, S q, T scale, T z) { return mezo_bits(shifted(q, -scale, z)) != mezo_bits(p); }

  // p - lr (slope z + weight_decay p), slope = (loss(p + eps z) - loss(p - eps z)) / (2 eps).
  static TX_HD S updated(S p, T slope, T z, T lr, T weight_decay) {
    const T x = core::load(p);
    S to;
    core::store(to, x - lr * (slope * z + weight_decay * x));
    return to;
  }
};

}  // namespace torch_ext::kernels
