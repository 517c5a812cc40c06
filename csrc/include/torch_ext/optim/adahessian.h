// AdaHessian: Adam whose second moment is built from the Hessian diagonal instead of the gradient.
//
// Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine
// Learning", AAAI 2021, arXiv:2006.00719.
//
//   D   = average over a block of |z * Hz|, z = +-1 with equal probability      (Hutchinson estimate of diag(H))
//   v   = b v + (1 - b) D^2,  b = beta2^update_each                              on refresh steps
//   m   = beta1 m + (1 - beta1) g
//   p   = p - lr ( m_hat / (v_hat^(k/2) + eps) + weight_decay p ),  k = hessian_power
//
// m_hat and v_hat are m and v divided by 1 minus the product of their betas so far. Defaults are the authors' code
// (lr 0.15, betas (0.9, 0.999), eps 1e-4, averaging over convolution kernels).
//
//   torch_ext::optim::AdaHessian optimizer(model->parameters(), torch_ext::optim::AdaHessianOptions(0.15));
//   optimizer.step([&] { return torch::nll_loss(model->forward(x), y); });   // the closure returns the loss
//
// A refresh costs one more backward pass. Memory per parameter: exp_avg 4 bytes, exp_hessian_diag_sq 4 bytes (4 / block
// where averaged), both float32 for half-precision parameters (8 each for float64), and the probes of the last refresh
// in the parameter's dtype.
#pragma once

#include <torch_ext/optim/base.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torch_ext::optim {

class TORCH_EXT_API AdaHessianOptions : public OptionsOf<AdaHessianOptions> {
 public:
  AdaHessianOptions();
  AdaHessianOptions(double lr);  // NOLINT(google-explicit-constructor): as torch::optim::AdamOptions

  // Step size, [0, inf). Default 0.15.
  double lr() const { return get("lr").toDouble(); }
  AdaHessianOptions& lr(double value) { return assign("lr", value); }
  // Decay of the averages of gradient and squared curvature, each in [0, 1). Default (0.9, 0.999).
  std::tuple<double, double> betas() const { return pair("betas"); }
  AdaHessianOptions& betas(std::tuple<double, double> value) { return assign("betas", value); }
  // Added to the denominator after root and power, [0, inf). Default 1e-4.
  double eps() const { return get("eps").toDouble(); }
  AdaHessianOptions& eps(double value) { return assign("eps", value); }
  // Decoupled weight decay, [0, inf), multiplied by lr. Default 0. (The authors' script divides its 5e-4 by lr first.)
  double weight_decay() const { return get("weight_decay").toDouble(); }
  AdaHessianOptions& weight_decay(double value) { return assign("weight_decay", value); }
  // k in [0, 1]: 1 is diagonal Newton, 0 is SGD with momentum. Default 1.
  double hessian_power() const { return get("hessian_power").toDouble(); }
  AdaHessianOptions& hessian_power(double value) { return assign("hessian_power", value); }
  // Probes averaged per refresh, >= 1, the same for all groups. Default 1.
  int64_t n_samples() const { return get("n_samples").toInt(); }
  AdaHessianOptions& n_samples(int64_t value) { return assign("n_samples", value); }
  // A refresh every so many steps, >= 1, the same for all groups; the steps between are first-order. Default 1.
  int64_t update_each() const { return get("update_each").toInt(); }
  AdaHessianOptions& update_each(int64_t value) { return assign("update_each", value); }
  // Blocks of 2-D parameters that share one curvature: "none", "row" (mean over dim 1), "block" (block_size contiguous
  // elements of a row). Default "none".
  std::string linear_averaging() const { return get("linear_averaging").toStringRef(); }
  AdaHessianOptions& linear_averaging(std::string value) { return assign("linear_averaging", std::move(value)); }
  // Elements per block of "block"; must divide dim 1 of every 2-D parameter. Default 0 (unused).
  int64_t block_size() const { return get("block_size").toInt(); }
  AdaHessianOptions& block_size(int64_t value) { return assign("block_size", value); }
  // Averages over the kernel of 3-D, 4-D and 5-D (convolution) parameters. Default true.
  bool average_conv() const { return get("average_conv").toBool(); }
  AdaHessianOptions& average_conv(bool value) { return assign("average_conv", value); }
  // "abs_mean" averages |z * Hz| (the authors' code), "signed_mean" z * Hz (unbiased for the block's trace).
  std::string averaging() const { return get("averaging").toStringRef(); }
  AdaHessianOptions& averaging(std::string value) { return assign("averaging", std::move(value)); }
  // Bound on |m_hat / denominator| per element, > 0. Default none. Guards directions of zero curvature.
  std::optional<double> max_update() const { return get("max_update").toOptional<double>(); }
  AdaHessianOptions& max_update(std::optional<double> value) { return assign("max_update", value); }
  // "double_backward" (exact) or "finite_difference" (no second derivatives needed, smooth losses only); the same for
  // all groups.
  std::string hvp() const { return get("hvp").toStringRef(); }
  AdaHessianOptions& hvp(std::string value) { return assign("hvp", std::move(value)); }
  // Key of the probes; the same for all groups. Default 0.
  int64_t seed() const { return get("seed").toInt(); }
  AdaHessianOptions& seed(int64_t value) { return assign("seed", value); }
  // Ascends instead of descending. Default false.
  bool maximize() const { return get("maximize").toBool(); }
  AdaHessianOptions& maximize(bool value) { return assign("maximize", value); }
};

// Everything a step may be given besides .grad.
struct AdaHessianInputs {
  torch::optim::Optimizer::LossClosure closure;            // returns the loss, or calls backward itself
  torch::optim::Optimizer::LossClosure curvature_closure;  // returns the loss whose curvature a refresh takes
  std::vector<at::Tensor> hessian;   // the (averaged) Hessian diagonal of each parameter: replaces the estimate
  std::optional<double> loss_scale;  // the loss was multiplied by this; gradient and curvature are divided by it
};

class TORCH_EXT_API AdaHessian : public OptimizerBase {
 public:
  explicit AdaHessian(const std::vector<torch::optim::OptimizerParamGroup>& groups, AdaHessianOptions defaults = {});
  explicit AdaHessian(std::vector<at::Tensor> params, AdaHessianOptions defaults = {});
  AdaHessian(AdaHessian&&) = default;

  static const Schema& static_schema();

  // One update. The closure (a) returns the loss and does not call backward (preferred: no graph outlives the step), or
  // (b) calls backward(create_graph = is_second_order()) itself. Without a closure .grad is used as it is and must
  // carry a graph when is_second_order(). Returns the closure's loss without its graph, an undefined tensor without a
  // closure. Parameters without a gradient are left alone. If any gradient or curvature is infinite or NaN nothing
  // changes but skipped_steps(). A closure that throws leaves parameters and state as they were.
  at::Tensor step(LossClosure closure = nullptr) override;
  // The same with the curvature of another loss, such as that of a quarter of the batch.
  at::Tensor step(LossClosure closure, LossClosure curvature_closure);
  at::Tensor step(LossClosure closure, std::nullptr_t curvature_closure) = delete;
  at::Tensor step(const AdaHessianInputs& inputs);

  // Adds weight * gradient and weight * curvature of one micro-batch; the following step() takes the sums instead of
  // .grad. All micro-batches of a step share their probes, so the sums equal those of the weighted total loss.
  void accumulate(const at::Tensor& loss, double weight = 1);

  // True if the next step() refreshes the curvature by double backward, so backward needs create_graph.
  bool is_second_order() const;

 private:
  struct Sums {
    std::vector<at::Tensor> params, grads, curvature;
  };
  struct Plan;

  void check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const override;
  void state_replaced() override { sums_ = {}; }
  Plan plan(bool external) const;
  void apply(const Plan& plan, std::vector<at::Tensor> grads, std::vector<at::Tensor> curvature,
             const AdaHessianInputs& inputs);

  Sums sums_;
  std::vector<at::Tensor> probes_;  // memory of the last refresh's probes, written over by the next
};

}  // namespace torch_ext::optim
