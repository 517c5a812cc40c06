// ALFLB: the auxiliary-loss-free balancer of mixtures of experts. It moves the bias that each router adds to its scores
// for selection only, so that every expert gets the same number of tokens; no loss, and no gradient, is involved.
//
// Wang et al., arXiv:2408.15664 (sign); DeepSeek-V3, arXiv:2412.19437; Han and Zhong, arXiv:2512.03915 (the rules as
// primal-dual steps). In a layer of E experts, K of which each of T tokens selects, A_e is the load of expert e over
// the whole step (all micro-batches and processes), L = K T / E the target, p [E] the bias, n = 1, 2, ... the update:
//
//   u_n = lr / n^lr_power
//   "sign"          p_e += u_n sign(L - A_e)                                    in integers
//   "proportional"  p_e += u_n (L - A_e) / T   (norm "tokens"), or  u_n v_e     (norm "load"),  v_e = (L - A_e) / L
//   "momentum"      d_e = u_n tanh(kappa v_e);  m = momentum m + (1 - momentum)(d - mean d);  p += m
//   "quantile"      p_e = the K/E quantile over the tokens of (K+1-th largest key - score_e), from a histogram that the
//                   router fills; averaged: ema p_before + (1 - ema) p. lr is not used
//   center          p -= mean(p): the selection does not change, and p does not drift
//
//   torch_ext::optim::ALFLB balancer(*model);        // every MoERouter in the model
//   loss.backward(); optimizer.step(); balancer.step(); optimizer.zero_grad();
//
// step() takes the loads that have come in since the last one and clears them; discard() drops them where the
// optimizer's step was skipped. Layers without loads stay as they are. zero_grad() does nothing. Learning-rate
// schedulers drive lr; lr 0 freezes the biases. Which rule: "sign" is the published method, "proportional" with
// lr 0.1 ... 0.3, or 1 ... 3 and lr_power 1 for data that does not drift, balances in ten steps instead of hundreds,
// "quantile" has nothing to tune (scores in an interval of length 1: "sigmoid" or "softmax"). Softmax scores of many
// experts are small against lr 1e-3: take "proportional" or "quantile" there.
//
// Under "sign", p spreads over no more than the range of the scores + 2 lr whatever the data (sigmoid, softmax: 1 + 2
// lr), if nothing else is done to p and routing has no groups. At any minimum of the dual |A_e - L| <= E - 1.
#pragma once

#include <torch/nn/module.h>
#include <torch_ext/moe/router.h>
#include <torch_ext/optim/base.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace torch_ext::optim {

class TORCH_EXT_API ALFLBOptions : public OptionsOf<ALFLBOptions> {
 public:
  ALFLBOptions();
  ALFLBOptions(double lr);  // NOLINT(google-explicit-constructor): as torch::optim::AdamOptions

  // Step size u, [0, inf). Default 1e-3 (arXiv:2408.15664).
  double lr() const { return get("lr").toDouble(); }
  ALFLBOptions& lr(double value) { return assign("lr", value); }
  // u_n = lr / n^lr_power, [0, inf). Default 0: constant. Leave it 0 with a scheduler.
  double lr_power() const { return get("lr_power").toDouble(); }
  ALFLBOptions& lr_power(double value) { return assign("lr_power", value); }
  // "sign" (default), "proportional", "quantile", "momentum".
  std::string rule() const { return get("rule").toStringRef(); }
  ALFLBOptions& rule(std::string value) { return assign("rule", std::move(value)); }
  // Of "proportional": "tokens" (default) or "load".
  std::string norm() const { return get("norm").toStringRef(); }
  ALFLBOptions& norm(std::string value) { return assign("norm", std::move(value)); }
  // Default true.
  bool center() const { return get("center").toBool(); }
  ALFLBOptions& center(bool value) { return assign("center", value); }
  // Of "quantile": weight of the bias before, [0, 1]. Default 0.
  double ema() const { return get("ema").toDouble(); }
  ALFLBOptions& ema(double value) { return assign("ema", value); }
  // Of "momentum": decay of the average, [0, 1). Default 0.5.
  double momentum() const { return get("momentum").toDouble(); }
  ALFLBOptions& momentum(double value) { return assign("momentum", value); }
  // Of "momentum": slope of the tanh, (0, inf). Default 2.
  double kappa() const { return get("kappa").toDouble(); }
  ALFLBOptions& kappa(double value) { return assign("kappa", value); }
  // Of "quantile": bins of the histogram, >= 1. Default 1000.
  int64_t qb_bins() const { return get("qb_bins").toInt(); }
  ALFLBOptions& qb_bins(int64_t value) { return assign("qb_bins", value); }
};

// The loads of one layer over one step. Everything that divides by the loads is NaN where there are none.
struct LoadReport {
  double max_vio;      // max A / L - 1
  double min_vio;      // min A / L - 1
  double avg_vio;      // mean |A / L - 1|
  double entropy;      // of the shares A / sum A, over ln E: 1 is balance
  int64_t dead;        // experts without a token
  double bias_spread;  // max p - min p
  double floor;        // the max_vio that a perfect bias leaves by sampling alone: ALFLB::sampling_floor(T, E, K)
};

// load [E] int64, bias [E]; top_k -1 if it is not known (floor is then NaN). Copies to the CPU.
TORCH_EXT_API LoadReport load_report(const at::Tensor& load, const at::Tensor& bias, int64_t top_k);

class TORCH_EXT_API ALFLB : public OptimizerBase {
 public:
  // The biases of these routers, or of all routers inside a module (ValueError if it has none).
  explicit ALFLB(const std::vector<moe::MoERouter>& routers, ALFLBOptions defaults = {});
  explicit ALFLB(const torch::nn::Module& model, ALFLBOptions defaults = {});
  // Bias tensors of any router, float32 [E]. Their loads come from record() or are added to loads().
  explicit ALFLB(std::vector<at::Tensor> biases, ALFLBOptions defaults = {});
  explicit ALFLB(const std::vector<torch::optim::OptimizerParamGroup>& groups, ALFLBOptions defaults = {});
  ALFLB(ALFLB&&) = default;

  // The buffers of this name anywhere in a model, such as "e_score_correction_bias". ValueError if there are none.
  static ALFLB from_buffers(const torch::nn::Module& model, const std::string& name, ALFLBOptions defaults = {});

  static const Schema& static_schema();

  // Expected MaxVio where each of `tokens` tokens selects top_k of num_experts at random: the least that fresh batches
  // show. From the largest of E normal numbers with the binomial's skewness; within 2 % at L >= 100.
  static double sampling_floor(double tokens, int64_t num_experts, int64_t top_k);

  // Moves every bias by the loads since the last call and clears them. Returns the closure's loss, which the balancer
  // does not read. A bias that is not finite changes nothing but skipped_steps().
  at::Tensor step(LossClosure closure = nullptr) override;
  // Drops the loads that have come in: for a step that the optimizer skipped. skipped_steps() counts it.
  void discard();

  // With several processes: set_reduce(torch_ext::sum_over(group)), over all processes that route different tokens of a
  // layer. Loads and histograms of all layers are one int64 all-reduce. (Sums, where other optimizers take means.)

  // Loads since the last step, one int64 [E] per bias in the order of the groups: add to them, do not replace them.
  std::vector<at::Tensor> loads();
  // Counts selected experts, ids [..., K] int32 or int64, negative ones padding, for the bias of this number.
  void record(size_t layer, const at::Tensor& ids);

  // One entry per bias, of the loads that the last step used, or of those that have come in since.
  std::vector<LoadReport> report(bool pending = false);

 private:
  struct Layer {
    at::Tensor bias, load, histogram, bounds;  // of a router: its own, but for `bias`, which the groups hold
    int64_t top_k = -1;
    moe::MoERouter router = nullptr;
  };

  void check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const override;
  void state_replaced() override;
  Layer& layer_of(const at::Tensor& bias);
  void prepare(Layer& layer, const Options& options, bool fresh);
  void follow_routers();
  void reduce(const std::vector<at::Tensor>& counts);

  std::vector<Layer> layers_;
};

}  // namespace torch_ext::optim
