// The arithmetic of one AdaHessian update (Yao et al., arXiv:2006.00719, Algorithm 1), the only place where it is
// written.
#pragma once

#include "core/math.h"

namespace torch_ext::kernels {

// How denom = v_hat^(k/2) is formed: k = 1, 1/2 and 0 need no pow.
enum class Root { kSqrt, kQuartic, kNone, kPower };

template <typename T, Root R>
struct AdaHessianStep {
  T lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, max_update;
  T grad_scale, curvature_scale;   // multiply g and the curvature estimate as they are read
  T inverse_bias1, inverse_bias2;  // 1 / (1 - product of the betas so far)
  double half_power;               // k / 2

  // v <- beta2^u v + (1 - beta2^u) D^2, D the (averaged) Hessian diagonal. D^2 saturates: an infinite v would freeze
  // the parameter for good.
  TX_HD T second_moment(T v, T d) const {
    constexpr T kMost = sizeof(T) == sizeof(float) ? T(3.4028234663852886e38) : T(1.7976931348623157e308);
    const T square = d * d;
    return beta2 * v + one_minus_beta2 * (square > kMost ? kMost : square);
  }

  // (v / (1 - beta2^...))^(k/2) + eps
  TX_HD T denominator(T v) const {
    const T v_hat = v * inverse_bias2;
    if constexpr (R == Root::kSqrt) return core::square_root(v_hat) + eps;
    if constexpr (R == Root::kQuartic) return core::square_root(core::square_root(v_hat)) + eps;
    if constexpr (R == Root::kNone) return T(1) + eps;
    return static_cast<T>(core::power(static_cast<double>(v_hat), half_power)) + eps;
  }

  // m <- beta1 m + (1 - beta1) g;  p <- p - lr (clip(m_hat / denom) + weight_decay p), decoupled decay of the old p.
  TX_HD void parameter(T& p, T& m, T g, T denom) const {
    m = beta1 * m + one_minus_beta1 * (g * grad_scale);
    const T m_hat = m * inverse_bias1;
    T update = m_hat == T(0) ? T(0) : m_hat / denom;  // eps = 0 with no curvature and no gradient is no step, not NaN
    update = update > max_update ? max_update : update < -max_update ? -max_update : update;
    p = p - lr * (update + weight_decay * p);
  }
};

}  // namespace torch_ext::kernels
