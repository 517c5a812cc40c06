// The fused AdaHessian step as an op, and the state it works on.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "torch_ext/optim/options.h"

namespace torch_ext::optim {

inline constexpr const char* kAdaHessian = "AdaHessian";  // in messages

// Elements that share one second moment, from a parameter's shape and options; ValueError naming the parameter if
// block_size does not divide it.
TORCH_EXT_API int64_t adahessian_block(const at::Tensor& param, const std::string& linear_averaging, int64_t block_size,
                                       bool average_conv, int64_t ordinal);
// Shape of exp_hessian_diag_sq.
std::vector<int64_t> adahessian_reduced_shape(const at::Tensor& param, int64_t block);

// Completes a parameter's state (new, or from a checkpoint of another implementation) in place and moves it to the
// parameter's device.
TORCH_EXT_API void adahessian_init_state(const at::Tensor& param, const Options& options, int64_t ordinal,
                                         StateTensors& state);
// ValueError if a state tensor does not fit the parameter.
TORCH_EXT_API void adahessian_check_state(const at::Tensor& param, const Options& options, const StateTensors& state);

// torch_ext::adahessian_step_: one group's update, any mix of devices and dtypes.
//   params, exp_avg, exp_hessian_diag_sq, steps, bias_products   mutated, one per parameter
//   grads, curvature     one per parameter; curvature empty unless refresh
//   nonfinite            0-dim float32: nonzero leaves everything as it is
//   grad_scale           0-dim float32 or None: gradient and curvature are divided by it (a GradScaler's scale)
//   loss_scale           divides curvature, and gradient unless grads_unscaled
TORCH_EXT_API void adahessian_step_(at::TensorList params, at::TensorList grads, at::TensorList curvature,
                                    at::TensorList exp_avg, at::TensorList exp_hessian_diag_sq, at::TensorList steps,
                                    at::TensorList bias_products, const at::Tensor& nonfinite,
                                    const std::optional<at::Tensor>& grad_scale, double lr, double beta1, double beta2,
                                    double eps, double weight_decay, double hessian_power,
                                    std::optional<double> max_update, std::string_view linear_averaging,
                                    int64_t block_size, bool average_conv, std::string_view averaging,
                                    int64_t update_each, bool refresh, bool maximize, double loss_scale,
                                    bool grads_unscaled, bool external_curvature);

// One group's parameters that take part in an update, with their state.
struct TORCH_EXT_API AdaHessianLists {
  std::vector<at::Tensor> params, grads, curvature, exp_avg, exp_hessian_diag_sq, steps, bias_products;
};
// What the loss was multiplied by; see adahessian_step_.
struct AdaHessianScaling {
  std::optional<at::Tensor> grad_scale;
  double loss_scale = 1;
  bool grads_unscaled = false, external_curvature = false;
};
// adahessian_step_ for every group that has parameters, once all of them are gathered; `options` one per group. Nothing
// changes, and `skipped` grows, if a tensor of `read` (every gradient and curvature) is not finite or found_inf is set.
TORCH_EXT_API void adahessian_apply(const std::vector<AdaHessianLists>& groups,
                                    const std::vector<const Options*>& options, at::TensorList read,
                                    const std::optional<at::Tensor>& found_inf, const at::Tensor& skipped, bool refresh,
                                    const AdaHessianScaling& scaling);

}  // namespace torch_ext::optim
