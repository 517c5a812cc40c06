// The sum of two branches, for models that torch_ext::ops::local_lipschitz bounds.
#pragma once

#include <torch/nn/modules/container/sequential.h>
#include <torch_ext/export.h>

#include <ostream>

namespace torch_ext::nn {

// forward: x -> body(x) + shortcut(x), with the identity where no shortcut is given. Parameters are saved under "body"
// and "shortcut"; Python's torch_ext.nn.Residual uses the same names.
class TORCH_EXT_API ResidualImpl : public torch::nn::Module {
 public:
  explicit ResidualImpl(torch::nn::Sequential body, torch::nn::Sequential shortcut = nullptr);

  at::Tensor forward(const at::Tensor& x);
  void pretty_print(std::ostream& stream) const override;

  torch::nn::Sequential body;
  torch::nn::Sequential shortcut;  // empty (is_empty()) where it is the identity
};
TORCH_MODULE(Residual);

}  // namespace torch_ext::nn
