// Entry points of the AdaHessian kernels over raw pointers; the same descriptors serve CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/multi_tensor.h"
#include "optim/adahessian/adahessian_functor.h"

namespace torch_ext::kernels {

// One parameter. State is float for float/bfloat16/half parameters and double for double ones.
struct AdaHessianTensor {
  void* param;
  const void* grad;
  const void* curvature;  // Hz or the signed estimate z * Hz; unused unless refreshing
  void* exp_avg;
  void* exp_hessian_diag_sq;  // numel / block elements
  float* step;                // accepted steps
  double* bias_products;      // [product of beta1, product of beta2^update_each]
  int64_t numel;
  int64_t block;  // elements that share one second moment; 1 = no averaging
};

struct AdaHessianArgs {
  double lr, beta1, beta2, eps, weight_decay, hessian_power, max_update;  // beta2 already to the power update_each
  double grad_factor, curvature_factor;                                   // from loss_scale, maximize, world size
  bool refresh;
  bool signed_mean;
  bool scaled_curvature;              // grad_scale divides the curvature too (not an external Hessian)
  core::DType param_type, grad_type;  // grad_type also holds for the curvature: the parameter's, or its arithmetic type
  const float* nonfinite;             // on the tensors' device: nonzero leaves everything as it is
  const float* grad_scale;            // on the tensors' device, may be null: what multiplied the loss
};

// Scalars of one tensor's update, from its (already advanced) bias products.
template <typename T, Root R>
TX_HD AdaHessianStep<T, R> adahessian_scalars(const AdaHessianArgs& a, const double* bias_products) {
  const double scale = a.grad_scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*a.grad_scale);
  return {static_cast<T>(a.lr),
          static_cast<T>(a.beta1),
          static_cast<T>(1 - a.beta1),
          static_cast<T>(a.beta2),
          static_cast<T>(1 - a.beta2),
          static_cast<T>(a.eps),
          static_cast<T>(a.weight_decay),
          static_cast<T>(a.max_update),
          static_cast<T>(a.grad_factor * scale),
          static_cast<T>(a.scaled_curvature ? a.curvature_factor * scale : a.curvature_factor),
          static_cast<T>(1 / (1 - bias_products[0])),
          static_cast<T>(1 / (1 - bias_products[1])),
          a.hessian_power / 2};
}

// Counts an accepted step of one parameter. Without any curvature so far (it joined between two refreshes) it waits.
TX_HD void adahessian_advance(const AdaHessianArgs& a, const AdaHessianTensor& t) {
  if (*a.nonfinite != 0 || (!a.refresh && t.bias_products[1] == 1)) return;
  *t.step += 1;
  t.bias_products[0] *= a.beta1;
  if (a.refresh) t.bias_products[1] *= a.beta2;
}

// True if adahessian_advance has decided that this tensor stays as it is.
TX_HD bool adahessian_waits(const AdaHessianArgs& a, const AdaHessianTensor& t) {
  return *a.nonfinite != 0 || t.bias_products[1] == 1;
}

template <Root R>
struct RootTag {
  static constexpr Root value = R;
};

// Calls body(Storage{}, GradStorage{}, RootTag{}) with the types that the arguments name.
template <typename Body>
void adahessian_dispatch(const AdaHessianArgs& a, const Body& body) {
  const auto by_root = [&](auto storage, auto grad) {
    if (a.hessian_power == 1) return body(storage, grad, RootTag<Root::kSqrt>{});
    if (a.hessian_power == 0.5) return body(storage, grad, RootTag<Root::kQuartic>{});
    if (a.hessian_power == 0) return body(storage, grad, RootTag<Root::kNone>{});
    return body(storage, grad, RootTag<Root::kPower>{});
  };
  const bool wide = a.grad_type != a.param_type;
  switch (a.param_type) {
    case core::DType::kFloat:
      return by_root(float{}, float{});
    case core::DType::kDouble:
      return by_root(double{}, double{});
    case core::DType::kBFloat16:
      return wide ? by_root(core::BFloat16{}, float{}) : by_root(core::BFloat16{}, core::BFloat16{});
    case core::DType::kHalf:
      return wide ? by_root(core::Half{}, float{}) : by_root(core::Half{}, core::Half{});
  }
}

// Elements [begin, end) of one tensor, both multiples of its block (or its end); call adahessian_advance before.
void adahessian_step_cpu(const AdaHessianTensor& tensor, const AdaHessianArgs& args, int64_t begin, int64_t end);

// All tensors, counters included, on `stream` of the current device.
void adahessian_step_cuda(const std::vector<AdaHessianTensor>& tensors, const AdaHessianArgs& args, void* stream);

}  // namespace torch_ext::kernels
