// A frozen linear layer with a trainable SNELL branch (arXiv:2411.01800; ops/snell.h has the formula), and the budget
// allocator of its successor SNELLA (arXiv:2510.24037).
#pragma once

#include <torch/nn/modules/linear.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace torch_ext::nn {

// Defaults are the paper's (rank 8 of 8, 16, 32; scale 0.1), the sparsity one of its range: it differs by task, 0 to
// .995.
struct SnellOptions {
  SnellOptions() = default;
  SnellOptions(int64_t in_features, int64_t out_features) : in_features_(in_features), out_features_(out_features) {}

  TORCH_ARG(int64_t, in_features) = 0;  // taken from the wrapped layer if there is one
  TORCH_ARG(int64_t, out_features) = 0;
  TORCH_ARG(bool, bias) = true;                 // of a layer made here
  TORCH_ARG(int64_t, rank) = 8;                 // of both pieces together: a positive multiple of 2
  TORCH_ARG(double, sparsity) = 0.9;            // share of entries that is pruned, in [0, 1)
  TORCH_ARG(double, scale) = 0.1;               // not trained
  TORCH_ARG(std::string, sparsifier) = "code";  // "code", "paper", "hard", "soft", "none"
  TORCH_ARG(std::string, grad) = "detached";    // "detached", "exact"
  TORCH_ARG(double, dropout) = 0;               // of the branch's input; the paper trains with 0.1
  // Subtracts the update of the initial factors, so that training starts from the frozen layer's own output. (Zero
  // factors would do that too, but have no gradient.) The initial factors are drawn again from `seed` when they are
  // needed; the branch costs twice as much until the layer is merged.
  TORCH_ARG(bool, start_from_zero) = false;
  TORCH_ARG(std::optional<int64_t>, seed) = std::nullopt;  // of the initial factors; none: drawn from torch's generator
};

// forward: x [..., in_features] -> linear(x) + x phi(W). The factors lora_in [2, in_features, rank / 2] and lora_out
// [2, out_features, rank / 2] are float32 (float64 beside a float64 layer) and uniform in +-1 / sqrt(features rank /
// 2), as the published code initialises them. weight and bias are the wrapped layer's own tensors, which no longer
// require a gradient. Saved are weight, bias, lora_in, lora_out, sparsity and, with start_from_zero, start_seed; Python
// uses the same names.
// Errors: ValueError for options out of range, RuntimeError for saving a merged layer.
class TORCH_EXT_API SnellLinearImpl : public torch::nn::Module {
 public:
  explicit SnellLinearImpl(SnellOptions options);  // around a new frozen layer
  explicit SnellLinearImpl(const torch::nn::Linear& linear, SnellOptions options = {});

  at::Tensor forward(const at::Tensor& x);
  // Adds phi(W) to the weight: an inference costs no more than the plain layer. unmerge() subtracts the same update,
  // which restores the weight to rounding.
  void merge();
  void unmerge();
  bool is_merged() const { return merged_in.defined(); }
  // A new plain layer with the update in its weight.
  torch::nn::Linear to_linear() const;
  double sparsity() const { return options.sparsity(); }
  void set_sparsity(double sparsity);

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;

  SnellOptions options;
  at::Tensor weight, bias, lora_in, lora_out;

 private:
  void initialise();
  at::Tensor merged_in, merged_out;  // the factors that the weight holds
  double merged_sparsity = 0;
};
TORCH_MODULE(SnellLinear);

// Factors like A and B, drawn anew: element e (row-major) is (2 u - 1) / sqrt(features rank / 2), u the upper 24 bits
// of word e mod 4 of the Philox4x32-10 block with key = seed, counter = (e / 4, 0 for A and 1 for B, 7, 0).
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor> snell_init(const at::Tensor& A, const at::Tensor& B, int64_t seed);

// weight [out_features, in_features] += factor * phi(W)^T, minus the update of the factors drawn from start_seed.
TORCH_EXT_API void snell_add_(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B, double scale,
                              double sparsity, std::string_view sparsifier, double factor,
                              std::optional<int64_t> start_seed);

// ValueError for an option out of its range.
TORCH_EXT_API void check_snell_options(int64_t in_features, int64_t out_features, int64_t rank, double sparsity,
                                       double scale, std::string_view sparsifier, std::string_view grad,
                                       double dropout);

struct SnellBudgetOptions {
  explicit SnellBudgetOptions(int64_t total_steps) : total_steps_(total_steps) {}
  TORCH_ARG(int64_t, total_steps);
  TORCH_ARG(double, initial) = 0.01;  // sparsity of the whole model before the decay, and after it
  TORCH_ARG(double, target) = 0.8;
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.85, 0.85);
  TORCH_ARG(int64_t, init_warmup) = 0;   // steps at `initial`
  TORCH_ARG(int64_t, final_warmup) = 0;  // steps at `target`
};

// SNELLA's allocator: call step() after backward and before the optimizer's step. The entries that the whole model may
// keep fall from (1 - initial) to (1 - target) of all by the cubic law (1 - progress)^3; a layer's share is
// proportional to its score, mean(EMA_beta1(I) * EMA_beta2(|I - EMA I|)) over lora_in plus the same over lora_out with
// I = |p grad p|, at most all its entries; and its sparsity is set to 1 - share / entries.
class TORCH_EXT_API SnellBudget {
 public:
  SnellBudget(std::vector<SnellLinear> layers, SnellBudgetOptions options);
  void step();
  int64_t steps() const { return steps_; }

 private:
  std::vector<SnellLinear> layers_;
  SnellBudgetOptions options_;
  std::vector<at::Tensor> importance_, uncertainty_;
  int64_t steps_ = 0;
};

// Updates both averages in place; mean(importance * uncertainty), 0-dim.
TORCH_EXT_API at::Tensor snell_budget_score(const at::Tensor& param, const at::Tensor& grad,
                                            const at::Tensor& importance, const at::Tensor& uncertainty, double beta1,
                                            double beta2);
// The sparsity of each layer at the given step (from 1).
TORCH_EXT_API std::vector<double> snell_budget_split(const std::vector<double>& scores,
                                                     const std::vector<int64_t>& entries, int64_t step,
                                                     const SnellBudgetOptions& options);
TORCH_EXT_API void check_snell_budget(const SnellBudgetOptions& options, int64_t layers);

}  // namespace torch_ext::nn
