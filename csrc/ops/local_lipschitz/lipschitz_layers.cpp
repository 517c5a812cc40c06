#include "ops/local_lipschitz/lipschitz_layers.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <utility>

namespace torch_ext::ops {
namespace {

constexpr const char* kNames[] = {"relu", "leaky_relu", "tanh", "sigmoid", "softplus", "gelu", "silu"};

int64_t activation_number(const std::string& kind) {
  for (int64_t i = 0; i < static_cast<int64_t>(std::size(kNames)); ++i) {
    if (kind == kNames[i]) return i;
  }
  TORCH_CHECK_VALUE(false, "local_lipschitz: no activation is called '", kind, "'");
}

}  // namespace

int64_t LipschitzLayers::begin(LipschitzKind kind, const std::string& path, std::vector<int64_t> fields) {
  layers.push_back(static_cast<int64_t>(kind));
  layers.insert(layers.end(), fields.begin(), fields.end());
  names += (count_ == 0 ? "" : "\n") + path;
  return ++count_;
}

void LipschitzLayers::refuse(const std::string& path, const std::string& type) {
  TORCH_CHECK_TYPE(false, "local_lipschitz: layer '", path, "' (", type,
                   ") has no bound. Supported are Linear, Conv2d, BatchNorm1d and BatchNorm2d in eval mode, ReLU, "
                   "LeakyReLU, Tanh, Sigmoid, Softplus, GELU, SiLU, Flatten, Dropout, Identity, Sequential and sums of "
                   "branches (torch_ext.nn.Residual)");
}

void LipschitzLayers::refuse_setting(const std::string& path, const std::string& what) {
  TORCH_CHECK_VALUE(false, "local_lipschitz: layer '", path, "' ", what);
}

int64_t LipschitzLayers::linear(const std::string& path, int64_t input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  const bool has_bias = bias.has_value() && bias->defined();
  tensors.push_back(weight);
  if (has_bias) tensors.push_back(*bias);
  return begin(LipschitzKind::kLinear, path, {input, has_bias ? 1 : 0});
}

int64_t LipschitzLayers::conv2d(const std::string& path, int64_t input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const std::vector<int64_t>& stride,
                                std::vector<int64_t> padding, const std::vector<int64_t>& dilation, int64_t groups,
                                const std::string& padding_mode) {
  if (padding_mode != "zeros") refuse_setting(path, "has padding_mode '" + padding_mode + "'; only 'zeros' is linear");
  for (size_t i = 0; i < 2; ++i) {
    if (padding[i] >= 0) continue;
    const int64_t total = dilation[i] * (weight.size(2 + static_cast<int64_t>(i)) - 1);
    if (total % 2 != 0) refuse_setting(path, "pads one side more than the other ('same' with an even kernel)");
    padding[i] = total / 2;
  }
  const bool has_bias = bias.has_value() && bias->defined();
  tensors.push_back(weight);
  if (has_bias) tensors.push_back(*bias);
  return begin(
      LipschitzKind::kConv2d, path,
      {input, has_bias ? 1 : 0, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups});
}

int64_t LipschitzLayers::batch_norm(const std::string& path, int64_t input, const std::optional<at::Tensor>& mean,
                                    const std::optional<at::Tensor>& var, const std::optional<at::Tensor>& weight,
                                    const std::optional<at::Tensor>& bias, double eps, bool training) {
  const auto given = [](const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); };
  if (training || !given(mean) || !given(var)) {
    refuse_setting(path,
                   "(BatchNorm) normalises by the batch, which couples its rows: call model.eval() and keep "
                   "track_running_stats");
  }
  tensors.insert(tensors.end(), {*mean, *var});
  if (given(weight)) tensors.push_back(*weight);
  if (given(bias)) tensors.push_back(*bias);
  numbers.push_back(eps);
  return begin(LipschitzKind::kBatchNorm, path, {input, given(weight) ? 1 : 0, given(bias) ? 1 : 0});
}

int64_t LipschitzLayers::activation(const std::string& path, int64_t input, const std::string& kind, double a,
                                    double b) {
  const int64_t number = activation_number(kind);
  const auto which = static_cast<LipschitzActivation>(number);
  if (which == LipschitzActivation::kLeakyRelu && !(a >= 0 && a <= 1)) {
    refuse_setting(path, "has a negative_slope outside [0, 1]");
  }
  if (which == LipschitzActivation::kSoftplus && !(a > 0 && std::isfinite(a))) {
    refuse_setting(path, "has a beta that is not positive");
  }
  numbers.insert(numbers.end(), {a, b});
  return begin(LipschitzKind::kActivation, path, {input, number});
}

int64_t LipschitzLayers::add(const std::string& path, int64_t first, int64_t second) {
  return begin(LipschitzKind::kAdd, path, {first, second});
}

int64_t LipschitzLayers::flatten(const std::string& path, int64_t input, int64_t start_dim, int64_t end_dim) {
  if (start_dim != 1 || end_dim != -1) refuse_setting(path, "must flatten from dimension 1 to -1");
  return begin(LipschitzKind::kFlatten, path, {input});
}

}  // namespace torch_ext::ops
