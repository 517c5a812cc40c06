// M-FAC: natural gradient with the full empirical Fisher matrix of the last m gradients.
//
// Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS
// 2021, arXiv:2107.03356. All parameters of a window are one vector of d elements, G [t, d] holds its last t <= m rows:
//
//   q = g + weight_decay p                              (coupled decay) the gradient, rounded to the window's format
//   F = damping I + (1/m) G^T G,  q the newest row of G
//   u = F^-1 q = m G^T K^-1 e_t,  K = m damping I + G G^T                 [t, t] in float64
//   b = momentum b + (1 - dampening) u                  (without momentum b = u)
//   p = p - lr b                                        (decoupled decay: after p = p (1 - lr weight_decay))
//
// The form with K^-1 e_t neither subtracts vectors of size |g| / damping nor divides by damping, and K's factor is
// updated in O(m^2) when the window slides. Defaults are the authors' code (lr 1e-3, m 1024, damping 1e-5).
//
// |u| is about m / |g| when g is nearly orthogonal to the older rows: keep lr m near 0.5 ... 1, and m damping well
// below |g|^2. For m other than 1024 scale lr and damping by 1024 / m. Where |g|^2 << m damping a step is SGD with rate
// lr / damping.
//
//   const auto options = torch_ext::optim::MFACOptions(1e-2).num_grads(64).damping(1e-3);
//   torch_ext::optim::MFAC optimizer(model->parameters(), options);
//   optimizer.step([&] { return torch::nll_loss(model->forward(x), y); });
//
// Parameters are float32, float64, bfloat16 or float16 in any memory layout; sparse gradients and complex parameters
// are a c10::Error, options out of range a c10::ValueError. Scaled gradients must be divided by their scale first.
// Parameters that join later get columns of zeros. State: step, momentum_buffer; window_* with the first parameter of
// each block.
//
// A step reads the window twice. Memory: d (m + 1) elements of the format (float32 4 bytes, float64 8, bfloat16 2, int8
// 1 + 1/64, topk 4 topk), d rounded up to 1024; 8 d more with error feedback; 16 m^2 bytes and more for Gram matrix and
// factor; and with momentum one value per parameter element. memory_bytes() says it before anything is allocated.
#pragma once

#include <torch_ext/optim/base.h>

#include <optional>
#include <string>
#include <vector>

namespace torch_ext::optim {

class TORCH_EXT_API MFACOptions : public OptionsOf<MFACOptions> {
 public:
  MFACOptions();
  MFACOptions(double lr);  // NOLINT(google-explicit-constructor): as torch::optim::SGDOptions

  // Step size, [0, inf). Default 1e-3.
  double lr() const { return get("lr").toDouble(); }
  MFACOptions& lr(double value) { return assign("lr", value); }
  // Decay of the average of steps, [0, 1). Default 0: no average, no buffer.
  double momentum() const { return get("momentum").toDouble(); }
  MFACOptions& momentum(double value) { return assign("momentum", value); }
  // Weight decay, [0, inf). Default 0.
  double weight_decay() const { return get("weight_decay").toDouble(); }
  MFACOptions& weight_decay(double value) { return assign("weight_decay", value); }
  // The new step enters its average with 1 - dampening, [0, 1). Default none: equal to momentum, an exponential moving
  // average as in the authors' code; 0 is the heavy ball.
  std::optional<double> dampening() const { return get("dampening").toOptional<double>(); }
  MFACOptions& dampening(std::optional<double> value) { return assign("dampening", value); }
  // false (default, authors' code): the decay is added to the gradient and is part of F. true: p (1 - lr weight_decay).
  bool decoupled_weight_decay() const { return get("decoupled_weight_decay").toBool(); }
  MFACOptions& decoupled_weight_decay(bool value) { return assign("decoupled_weight_decay", value); }

  // The following are the same for all groups.

  // m, the rows of a window, >= 1. Default 1024.
  int64_t num_grads() const { return get("num_grads").toInt(); }
  MFACOptions& num_grads(int64_t value) { return assign("num_grads", value); }
  // lambda, (0, inf). Default 1e-5. May be changed while training: MFAC::set_damping.
  double damping() const { return get("damping").toDouble(); }
  MFACOptions& damping(double value) { return assign("damping", value); }
  // How rows are stored: "float32" (default), "float64", "bfloat16", "int8" (a scale per 256 elements) or "topk" (the
  // largest of each 1024 elements in bfloat16, what is left is carried over to the next row).
  std::string window_format() const { return get("window_format").toStringRef(); }
  MFACOptions& window_format(std::string value) { return assign("window_format", std::move(value)); }
  // Share of the elements that "topk" keeps, (0, 1]. Default 0.01.
  double topk() const { return get("topk").toDouble(); }
  MFACOptions& topk(double value) { return assign("topk", value); }
  // Adds what rounding to "bfloat16" or "int8" lost to the next row ("topk" always does). Default false.
  bool error_feedback() const { return get("error_feedback").toBool(); }
  MFACOptions& error_feedback(bool value) { return assign("error_feedback", value); }
  // Multiplies steps by t/m while the window fills: then they are those of an average over t rows with damping m/t
  // lambda, instead of about m/t times longer. Default false (authors' code).
  bool warmup_scaling() const { return get("warmup_scaling").toBool(); }
  MFACOptions& warmup_scaling(bool value) { return assign("warmup_scaling", value); }
  // The first so many rows are collected while each step uses its own row alone, >= 0. Default 0.
  int64_t warmup_steps() const { return get("warmup_steps").toInt(); }
  MFACOptions& warmup_steps(int64_t value) { return assign("warmup_steps", value); }
  // "global" (default): one window over all parameters. "per_group": one for each group, F is block-diagonal.
  std::string blocks() const { return get("blocks").toStringRef(); }
  MFACOptions& blocks(std::string value) { return assign("blocks", std::move(value)); }
  // Where the window lives, such as "cpu" or "cuda:1". Default none: with the first parameter of its block.
  std::optional<std::string> window_device() const { return get("window_device").toOptional<std::string>(); }
  MFACOptions& window_device(std::optional<std::string> value) { return assign("window_device", std::move(value)); }
  // Ascends instead of descending. Default false.
  bool maximize() const { return get("maximize").toBool(); }
  MFACOptions& maximize(bool value) { return assign("maximize", value); }
};

struct MFACBlock;

class TORCH_EXT_API MFAC : public OptimizerBase {
 public:
  explicit MFAC(const std::vector<torch::optim::OptimizerParamGroup>& groups, MFACOptions defaults = {});
  explicit MFAC(std::vector<at::Tensor> params, MFACOptions defaults = {});
  MFAC(MFAC&&) = default;

  static const Schema& static_schema();

  // One update. The closure returns the loss with its graph, or calls backward() itself; without one .grad is used.
  // Returns the closure's loss without its graph, an undefined tensor without a closure. A parameter without a gradient
  // has a row segment of zeros and is not written; without any gradient nothing happens. If any gradient is infinite or
  // NaN nothing changes but skipped_steps(). The first step allocates the window; ValueError with the bytes, what is
  // free and which formats would fit, if it does not fit. Errors leave parameters and state as they were.
  at::Tensor step(LossClosure closure = nullptr) override;

  // F^-1 x for one x per parameter, with the window as it is; undefined tensors count as zeros and stay undefined.
  // Results have the dtype of x. It is (x - G^T K^-1 G x) / damping and loses what that subtraction cancels.
  std::vector<at::Tensor> precondition(const std::vector<at::Tensor>& x);

  // Another damping, from the next step on: F is that of a new object with this damping and the same rows.
  void set_damping(double damping);

  // Rows in the window, 0 ... num_grads; with several windows, of the fullest. (Reads the device.)
  int64_t window_count() const;
  // Bytes of all windows of this process, known before they exist.
  int64_t memory_bytes() const;

  // As OptimizerBase's. Without the window a checkpoint is small and the loaded optimizer fills a new one. With shards
  // each process writes and reads its own file; a file of one process is split when it is loaded.
  c10::IValue state_dict(bool include_window = true) const;
  void save_state_dict(const std::string& path, bool include_window = true) const;

  // Each process keeps a slice of the window's columns: gradients are averaged and scattered, m + 1 products summed,
  // the update gathered. All processes must have gradients for the same parameters. (set_reduce instead keeps the whole
  // window on each.)
  void set_shards(ColumnShards shards) { shards_ = std::move(shards); }

 private:
  void check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const override;
  void check_loaded(const std::vector<const Options*>& options, const StateLookup& state) const override;
  std::vector<MFACBlock> blocks(const std::vector<at::Tensor>& values) const;
  std::vector<MFACBlock> blocks(const std::vector<at::Tensor>& values, const std::vector<const Options*>& options,
                                const StateLookup& state) const;
  void keep(const std::vector<MFACBlock>& blocks);
  void apply(const std::vector<at::Tensor>& grads);

  ColumnShards shards_;
};

}  // namespace torch_ext::optim
