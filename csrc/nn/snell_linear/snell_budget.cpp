// Budget allocation of SNELLA (arXiv:2510.24037).
#include <torch/torch.h>
#include <torch_ext/nn/snell_linear.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace torch_ext::nn {
namespace {

// Sparsity of the whole model.
double sparsity_at(int64_t step, const SnellBudgetOptions& options) {
  const int64_t begin = options.init_warmup(), end = options.total_steps() - options.final_warmup();
  if (step <= begin) return options.initial();
  if (step >= end) return options.target();
  const double left = 1 - static_cast<double>(step - begin) / static_cast<double>(end - begin);
  return options.target() + (options.initial() - options.target()) * (left * left * left);
}

// Proportional to `scores` (to the sizes if no score is positive), none above its size: what a full layer cannot take
// is shared out again.
std::vector<double> shares(std::vector<double> scores, const std::vector<int64_t>& entries, double budget) {
  const size_t count = scores.size();
  const auto positive = [](double score) { return score > 0 && std::isfinite(score); };
  std::vector<double> result(count, 0);
  std::vector<bool> full(count, false);
  for (size_t round = 0; round < count; ++round) {
    double total = 0;
    for (size_t i = 0; i < count; ++i) total += !full[i] && positive(scores[i]) ? scores[i] : 0;
    const bool by_score = total > 0;
    if (!by_score) {
      for (size_t i = 0; i < count; ++i) total += full[i] ? 0 : static_cast<double>(entries[i]);
    }
    if (!(total > 0) || !(budget > 0)) break;
    bool overflown = false;
    double taken = 0;
    for (size_t i = 0; i < count; ++i) {
      if (full[i]) continue;
      const double part = by_score ? (positive(scores[i]) ? scores[i] : 0) : static_cast<double>(entries[i]);
      const auto size = static_cast<double>(entries[i]);
      result[i] = budget * part / total;
      if (result[i] < size) continue;
      result[i] = size;
      full[i] = overflown = true;
      taken += size;
    }
    if (!overflown) break;
    budget -= taken;
  }
  return result;
}

}  // namespace

void check_snell_budget(const SnellBudgetOptions& options, int64_t layers) {
  const auto [beta1, beta2] = options.betas();
  TORCH_CHECK_VALUE(layers > 0, "SnellBudget: there is no SnellLinear layer to share the budget");
  TORCH_CHECK_VALUE(options.initial() >= 0 && options.initial() < 1, "SnellBudget: initial must be in [0, 1), got ",
                    options.initial());
  TORCH_CHECK_VALUE(options.target() >= 0 && options.target() < 1, "SnellBudget: target must be in [0, 1), got ",
                    options.target());
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "SnellBudget: betas must be in [0, 1), got (",
                    beta1, ", ", beta2, ")");
  TORCH_CHECK_VALUE(options.init_warmup() >= 0 && options.final_warmup() >= 0 &&
                        options.init_warmup() + options.final_warmup() < options.total_steps(),
                    "SnellBudget: total_steps (", options.total_steps(), ") must exceed init_warmup + final_warmup (",
                    options.init_warmup(), " + ", options.final_warmup(), ")");
}

at::Tensor snell_budget_score(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& importance,
                              const at::Tensor& uncertainty, double beta1, double beta2) {
  const at::NoGradGuard no_grad;
  const at::Tensor now = (param * grad).abs_().to(importance.scalar_type());
  importance.mul_(beta1).add_(now, 1 - beta1);
  uncertainty.mul_(beta2).add_((now - importance).abs_(), 1 - beta2);
  return (importance * uncertainty).mean();
}

std::vector<double> snell_budget_split(const std::vector<double>& scores, const std::vector<int64_t>& entries,
                                       int64_t step, const SnellBudgetOptions& options) {
  const auto total = static_cast<double>(std::accumulate(entries.begin(), entries.end(), int64_t{0}));
  const auto kept = shares(scores, entries, (1 - sparsity_at(step, options)) * total);
  std::vector<double> result;
  for (size_t i = 0; i < kept.size(); ++i) {
    const auto size = static_cast<double>(entries[i]);
    result.push_back(std::max(0.0, std::min(1 - kept[i] / size, 1 - 1 / size)));  // at least one entry stays
  }
  return result;
}

SnellBudget::SnellBudget(std::vector<SnellLinear> layers, SnellBudgetOptions options)
    : layers_(std::move(layers)), options_(std::move(options)) {
  check_snell_budget(options_, static_cast<int64_t>(layers_.size()));
  for (SnellLinear& layer : layers_) {
    for (const at::Tensor& factor : {layer->lora_in, layer->lora_out}) {
      importance_.push_back(torch::zeros_like(factor.detach()));
      uncertainty_.push_back(torch::zeros_like(factor.detach()));
    }
    layer->set_sparsity(options_.initial());
  }
}

void SnellBudget::step() {
  const auto [beta1, beta2] = options_.betas();
  std::vector<double> scores;
  std::vector<int64_t> entries;
  size_t at = 0;
  for (SnellLinear& layer : layers_) {
    double score = 0;
    for (const at::Tensor& factor : {layer->lora_in, layer->lora_out}) {
      const at::Tensor grad = factor.grad().defined() ? factor.grad() : torch::zeros_like(factor);
      score += snell_budget_score(factor, grad, importance_[at], uncertainty_[at], beta1, beta2).item<double>();
      ++at;
    }
    scores.push_back(score);
    entries.push_back(layer->options.in_features() * layer->options.out_features());
  }
  const auto sparsities = snell_budget_split(scores, entries, ++steps_, options_);
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i]->set_sparsity(sparsities[i]);
}

}  // namespace torch_ext::nn
