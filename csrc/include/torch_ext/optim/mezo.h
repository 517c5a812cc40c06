// MeZO: fine-tuning with the memory of inference, from two losses a step.
//
// Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333, Algorithm 1: one pair of
// members with full-rank noise and raw values.
//
//   z ~ N(0, I), a function of (seed, step, parameter, element), never stored
//   slope = (loss(p + eps z) - loss(p - eps z)) / (2 eps)
//   p     = p - lr (slope z + weight_decay p)
//
// The losses are taken at the parameters' own storage, for modules of any kind. Before the update the parameters have
// their old bits again. Adding and subtracting the same noise does not give them back (the authors' code drifts): an
// element whose exponent grew has lost bits. Those elements, and a bit for each element that says whether it is one of
// them, are kept during a forward pass: numel / 8 bytes, and for parameters of size 0.02 with eps 1e-3 about 8 % of
// their memory. Where eps is far above the parameters that is a copy of them.
//
//   torch_ext::optim::MeZO optimizer(model->parameters(), torch_ext::optim::MeZOOptions(1e-6));
//   optimizer.step([&] { return loss(model->forward(x)); });   // called twice, without gradients
#pragma once

#include <torch_ext/optim/base.h>

#include <vector>

namespace torch_ext::optim {

class TORCH_EXT_API MeZOOptions : public OptionsOf<MeZOOptions> {
 public:
  MeZOOptions();
  MeZOOptions(double lr);  // NOLINT(google-explicit-constructor): as torch::optim::SGDOptions

  // Step size, [0, inf). Default 1e-6 (the paper: 1e-6 or 1e-7 for whole language models).
  double lr() const { return get("lr").toDouble(); }
  MeZOOptions& lr(double value) { return assign("lr", value); }
  // Size of the perturbation, (0, inf), the same for all groups. Default 1e-3 (the paper).
  double eps() const { return get("eps").toDouble(); }
  MeZOOptions& eps(double value) { return assign("eps", value); }
  // Added to the slope times z, times the parameter, [0, inf). Default 0.
  double weight_decay() const { return get("weight_decay").toDouble(); }
  MeZOOptions& weight_decay(double value) { return assign("weight_decay", value); }
  // Key of the noise, the same for all groups. Default 0.
  int64_t seed() const { return get("seed").toInt(); }
  MeZOOptions& seed(int64_t value) { return assign("seed", value); }
  // Ascends instead of descending, in all groups. Default false.
  bool maximize() const { return get("maximize").toBool(); }
  MeZOOptions& maximize(bool value) { return assign("maximize", value); }
};

class TORCH_EXT_API MeZO : public OptimizerBase {
 public:
  explicit MeZO(const std::vector<torch::optim::OptimizerParamGroup>& groups, MeZOOptions defaults = {});
  explicit MeZO(std::vector<at::Tensor> params, MeZOOptions defaults = {});
  MeZO(MeZO&&) = default;

  static const Schema& static_schema();

  // One update. The closure returns the loss at the parameters as they are; it is called twice, without gradients, and
  // must see the same data both times. Returns the mean of both losses, a 0-dim double. If their difference is infinite
  // or NaN nothing changes but skipped_steps(). A closure that throws leaves parameters and state as they were. With
  // set_reduce the losses are averaged over the processes, which then make the same update. RuntimeError without a
  // closure or without a loss. On CUDA the host waits once for each perturbation, for the number of elements to keep.
  at::Tensor step(LossClosure closure = nullptr) override;

 private:
  void check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const override;
};

}  // namespace torch_ext::optim
