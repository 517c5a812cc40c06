// Entropic optimal transport between point clouds as a loss.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch_ext/export.h>

#include <optional>
#include <ostream>

namespace torch_ext::nn {

// V(x, y) of ops::sinkhorn_newton for the cost C_ij = |x_i - y_j|^2 / 2; with `debias` the Sinkhorn divergence
//   V(x, y) - V(x, x) / 2 - V(y, y) / 2      (Feydy et al., AISTATS 2019, arXiv:1810.08278),
// >= 0 and 0 for equal clouds. eps > 0 is in units of the cost, a squared length (ValueError otherwise).
//
// The cost is recomputed in every pass and never stored: memory O((n + m) d). Differentiable once; for second
// derivatives call ops::sinkhorn_newton on the cost matrix.
class TORCH_EXT_API SinkhornLossImpl : public torch::nn::Module {
 public:
  explicit SinkhornLossImpl(double eps, bool debias = false);

  // x [..., n, d] and y [..., m, d], float32 or float64; a [..., n] and b [..., m] of equal sum, 1/n and 1/m if not
  // given. Returns [...].
  at::Tensor forward(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a = std::nullopt,
                     const std::optional<at::Tensor>& b = std::nullopt);
  void pretty_print(std::ostream& stream) const override;

  double eps() const { return eps_; }
  bool debias() const { return debias_; }

 private:
  double eps_;
  bool debias_;
};
TORCH_MODULE(SinkhornLoss);

}  // namespace torch_ext::nn
