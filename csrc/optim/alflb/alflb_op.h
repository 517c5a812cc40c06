// The update of all biases of one group as an op, the state it works on, and what the balancer reports.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "torch_ext/optim/alflb.h"

namespace torch_ext::optim {

constexpr const char* kAlflbName = "ALFLB";
// Number of experts per token of a layer that nobody told the balancer.
constexpr int64_t kUnknownTopK = -1;

// A bias is float32 [E], E >= 1, contiguous: TypeError or ValueError naming it by its ordinal.
TORCH_EXT_API void alflb_check_bias(const at::Tensor& bias, size_t ordinal);
// Completes a bias's state (new, or from a checkpoint) in place and moves it to the bias's device.
TORCH_EXT_API void alflb_init_state(const at::Tensor& bias, const Options& options, StateTensors& state);
// ValueError if a state tensor does not fit the bias.
TORCH_EXT_API void alflb_check_state(const at::Tensor& bias, const Options& options, const StateTensors& state);

// Layers of one group with their state. momenta, histograms and bounds hold undefined tensors where the rule has none.
struct TORCH_EXT_API AlflbLayers {
  std::vector<at::Tensor> biases, loads, last_loads, steps, updates, momenta, histograms, bounds;
  std::vector<int64_t> top_k;
};
// Fresh memory for the quantile rule: zeros [E, bins], and [2] the range around the bias.
TORCH_EXT_API void alflb_make_histogram(const at::Tensor& bias, int64_t bins, at::Tensor& histogram,
                                        at::Tensor& bounds);

// torch_ext::alflb_update_: one launch for all layers of a device; every list has one tensor per layer, but momenta is
// empty except for the momentum rule, histograms and bounds except for the quantile rule. top_k may be kUnknownTopK
// where the rule does not use it. See kernels::AlflbLayer for what is written.
TORCH_EXT_API void alflb_update_(at::TensorList biases, at::TensorList loads, at::TensorList last_loads,
                                 at::TensorList steps, at::TensorList updates, at::TensorList momenta,
                                 at::TensorList histograms, at::TensorList bounds, const at::Tensor& nonfinite,
                                 at::IntArrayRef top_k, double lr, double lr_power, std::string_view rule,
                                 std::string_view norm, bool center, double ema, double momentum, double kappa);

// alflb_update_ for every group. Where found_inf is set or a bias is not finite the loads are dropped, nothing else
// changes, and `skipped` grows.
TORCH_EXT_API void alflb_apply(const std::vector<AlflbLayers>& groups, const std::vector<const Options*>& options,
                               const std::optional<at::Tensor>& found_inf, const at::Tensor& skipped);

// torch_ext::alflb_record_: load[e] += number of entries of ids (any shape, int32 or int64) that are e; negative ones
// are padding.
TORCH_EXT_API void alflb_record_(const at::Tensor& load, const at::Tensor& ids);

}  // namespace torch_ext::optim
