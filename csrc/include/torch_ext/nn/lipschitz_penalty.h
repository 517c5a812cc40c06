// A penalty on the certified local Lipschitz constant, for training.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/pimpl.h>
#include <torch_ext/export.h>
#include <torch_ext/ops/local_lipschitz.h>

#include <ostream>

namespace torch_ext::nn {

// forward: x [rows, ...] -> mean over the rows of max_i L_i, with L of ops::local_lipschitz over the box [x - eps, x +
// eps]; add a multiple of it to the loss. The model is the one that is trained: its parameters are used, not owned, and
// do not appear among those of this module.
// Errors: those of ops::local_lipschitz, and ValueError for an eps that is negative or not finite.
class TORCH_EXT_API LipschitzPenaltyImpl : public torch::nn::Module {
 public:
  LipschitzPenaltyImpl(torch::nn::Sequential model, double eps, ops::LocalLipschitzOptions options = {});

  at::Tensor forward(const at::Tensor& x);
  void pretty_print(std::ostream& stream) const override;

  double eps() const { return eps_; }

 private:
  torch::nn::Sequential model_;
  double eps_;
  ops::LocalLipschitzOptions options_;
};
TORCH_MODULE(LipschitzPenalty);

}  // namespace torch_ext::nn
