// A network as the operators take it: a list of layers in the order of evaluation, each naming its inputs. Both
// languages build it here, so that what is supported and what is said about the rest stands once.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torch {
namespace nn {
class Module;
}
}  // namespace torch

namespace torch_ext::ops {

enum class LipschitzKind : int64_t { kLinear, kConv2d, kBatchNorm, kActivation, kAdd, kFlatten };
enum class LipschitzActivation : int64_t { kRelu, kLeakyRelu, kTanh, kSigmoid, kSoftplus, kGelu, kSilu };

// Value 0 is the network's input; each method adds a layer named by its path in the model and returns the number of the
// layer's value. The last value is the output. ValueError or TypeError naming the path for what has no bound.
class TORCH_EXT_API LipschitzLayers {
 public:
  int64_t linear(const std::string& path, int64_t input, const at::Tensor& weight,
                 const std::optional<at::Tensor>& bias);
  // padding [-1, -1]: "same".
  int64_t conv2d(const std::string& path, int64_t input, const at::Tensor& weight,
                 const std::optional<at::Tensor>& bias, const std::vector<int64_t>& stride,
                 std::vector<int64_t> padding, const std::vector<int64_t>& dilation, int64_t groups,
                 const std::string& padding_mode);
  int64_t batch_norm(const std::string& path, int64_t input, const std::optional<at::Tensor>& mean,
                     const std::optional<at::Tensor>& var, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, double eps, bool training);
  // kind: "relu", "leaky_relu" (a: slope), "tanh", "sigmoid", "softplus" (a: beta, b: threshold), "gelu", "silu".
  int64_t activation(const std::string& path, int64_t input, const std::string& kind, double a, double b);
  int64_t add(const std::string& path, int64_t first, int64_t second);
  int64_t flatten(const std::string& path, int64_t input, int64_t start_dim, int64_t end_dim);
  // TypeError: a layer (or, in Python, a function) of this type has no bound.
  [[noreturn]] static void refuse(const std::string& path, const std::string& type);
  // ValueError: a layer of a supported type has a setting that is not.
  [[noreturn]] static void refuse_setting(const std::string& path, const std::string& what);

  // For the operators: `layers` holds kind and fields of one layer after the other, `numbers` their real options,
  // `names` one line a layer.
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> layers;
  std::vector<double> numbers;
  std::string names;

 private:
  int64_t begin(LipschitzKind kind, const std::string& path, std::vector<int64_t> fields);
  int64_t count_ = 0;
};

// The layers of a torch::nn::Sequential, nested ones, and torch_ext::nn::Residual.
LipschitzLayers lipschitz_layers(const torch::nn::Module& model);

}  // namespace torch_ext::ops
