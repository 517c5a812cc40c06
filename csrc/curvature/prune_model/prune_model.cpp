#include <ATen/ATen.h>
#include <torch/nn/module.h>
#include <torch_ext/curvature/obs_prune.h>
#include <torch_ext/curvature/prune_model.h>

#include <cmath>
#include <memory>

#include "core/check.h"
#include "curvature/hvp/hvp.h"
#include "curvature/obs_prune/obs_layers.h"

namespace torch_ext::curvature {
namespace {

using Tensors = std::vector<at::Tensor>;

// Puts the weights back, to the bit, unless all rounds came to their end.
class Undo {
 public:
  explicit Undo(const Tensors& weights) : weights_(weights) {
    for (const at::Tensor& weight : weights) originals_.push_back(weight.detach().clone());
  }
  Undo(const Undo&) = delete;
  Undo& operator=(const Undo&) = delete;
  ~Undo() {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < originals_.size(); ++i) weights_[i].copy_(originals_[i]);
  }
  void keep() { originals_.clear(); }

 private:
  Tensors weights_, originals_;
};

struct Job {
  std::vector<std::string> names;
  Tensors weights, masks;  // masks: of the rounds so far, or empty
  const PruneModelOptions& options;
  int64_t done = 0, total = 0;
};

void check_options(const PruneModelOptions& options) {
  const std::string& method = options.method;
  TORCH_CHECK_VALUE(method == "joint" || method == "independent" || method == "magnitude",
                    "prune_model: method must be \"joint\", \"independent\" or \"magnitude\", got \"", method, "\"");
  TORCH_CHECK_VALUE(options.num_grads >= 1, "prune_model: num_grads must be at least 1, got ", options.num_grads);
  TORCH_CHECK_VALUE(std::isfinite(options.damping) && options.damping > 0,
                    "prune_model: damping must be positive, got ", options.damping);
  TORCH_CHECK_VALUE(!options.block.has_value() || *options.block >= 1, "prune_model: block must be at least 1, got ",
                    options.block.value_or(0));
}

void check_weights(const Job& job) {
  TORCH_CHECK_VALUE(!job.weights.empty(),
                    "prune_model: the model has no trainable parameter of two or more dimensions");
  for (size_t i = 0; i < job.weights.size(); ++i) {
    const at::Tensor& weight = job.weights[i];
    TORCH_CHECK_VALUE(weight.is_leaf() && weight.numel() > 0, "prune_model: parameter '", job.names[i],
                      "' is no leaf or is empty");
    core::walking_strides(weight, /*any_order=*/true, ("parameter '" + job.names[i] + "'").c_str(), i);
    TORCH_CHECK_VALUE(job.options.method == "magnitude" || weight.requires_grad(), "prune_model: parameter '",
                      job.names[i], "' is frozen (requires_grad is false); leave it out");
  }
}

void store_gradients(const Job& job, const at::Tensor& loss, int64_t row, const Tensors& rows,
                     std::vector<bool>& reached) {
  const auto grads = gradients(loss, job.weights, /*create_graph=*/false, /*keep_graph=*/false);
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor target = rows[i].select(0, row);
    if (!grads[i].defined()) {
      target.zero_();
      continue;
    }
    TORCH_CHECK(grads[i].layout() == at::kStrided, "prune_model: parameter '", job.names[i],
                "' has a sparse gradient; construct the embedding with sparse=False");
    TORCH_CHECK_VALUE(grads[i].isfinite().all().item<bool>(), "prune_model: gradient ", row, " of parameter '",
                      job.names[i], "' holds NaN or infinity; the weights are unchanged");
    target.copy_(grads[i].reshape({-1}));
    reached[i] = true;
  }
}

void collect(Job& job, const LossFn& next_loss, const Tensors& rows) {
  std::vector<bool> reached(job.weights.size(), false);
  for (int64_t row = 0; row < job.options.num_grads; ++row) {
    at::Tensor loss;
    {
      const at::AutoGradMode enabled(true);
      loss = next_loss();
    }
    store_gradients(job, loss, row, rows, reached);
    ++job.done;
    if (job.options.progress) job.options.progress(job.done, job.total);
  }
  for (size_t i = 0; i < reached.size(); ++i) {
    TORCH_CHECK_VALUE(reached[i], "prune_model: parameter '", job.names[i], "' does not enter any of the ",
                      job.options.num_grads, " losses, so nothing is known about it; leave it out");
  }
}

at::Tensor flat_mask(const Job& job, size_t i) { return job.masks[i].reshape({-1}); }

at::Tensor flat_weight(const Job& job, size_t i) {
  const at::Tensor w = job.weights[i].detach().reshape({-1}).to(at::kDouble);
  return job.masks.empty() ? w : w.masked_fill(flat_mask(job, i).logical_not(), 0);
}

ObsChange obs_round(const Job& job, const Tensors& rows, int64_t zeros) {
  std::vector<ObsLayer> layers;
  for (size_t i = 0; i < rows.size(); ++i) {
    ObsLayer layer{fisher_blocks(rows[i], job.options.damping, job.options.block), {}, flat_weight(job, i)};
    if (!job.masks.empty()) layer.fisher.keep = flat_mask(job, i);
    layer.factor = factorize(layer.fisher);
    layers.push_back(std::move(layer));
  }
  return prune_layers(layers, zeros, job.options.method == "joint");
}

ObsChange magnitude_round(const Job& job, int64_t zeros) {
  ObsChange change;
  Tensors scores;
  for (size_t i = 0; i < job.weights.size(); ++i) {
    change.w.push_back(flat_weight(job, i));
    at::Tensor score = change.w[i].abs();
    if (!job.masks.empty()) score.masked_fill_(flat_mask(job, i).logical_not(), -1);
    scores.push_back(std::move(score));
  }
  change.mask = masks_without_smallest(scores, zeros);
  for (size_t i = 0; i < scores.size(); ++i) change.w[i] = change.w[i].masked_fill(change.mask[i].logical_not(), 0);
  return change;
}

void write(Job& job, const ObsChange& change) {
  const at::NoGradGuard no_grad;
  job.masks.clear();
  for (size_t i = 0; i < job.weights.size(); ++i) {
    job.weights[i].copy_(change.w[i].reshape(job.weights[i].sizes()));
    job.masks.push_back(change.mask[i].reshape(job.weights[i].sizes()));
  }
}

double sparsity_of(at::TensorList masks) {
  int64_t kept = 0, numel = 0;
  for (const at::Tensor& mask : masks) {
    kept += mask.sum().item<int64_t>();
    numel += mask.numel();
  }
  return static_cast<double>(numel - kept) / static_cast<double>(numel);
}

PruneModelResult result_of(const Job& job, at::Tensor loss_increase) {
  PruneModelResult result{job.names, job.masks, {}, sparsity_of(job.masks), std::move(loss_increase)};
  for (const at::Tensor& mask : job.masks) result.sparsity.push_back(sparsity_of(mask));
  return result;
}

// The modules' training flags; restored parent first, since train() also sets those of the children. The model itself
// may be on the stack, where modules() cannot list it.
class EvaluationMode {
 public:
  explicit EvaluationMode(torch::nn::Module& model) : model_(model), training_(model.is_training()) {
    for (const auto& module : model.modules(/*include_self=*/false)) flags_.emplace_back(module, module->is_training());
    model.eval();
  }
  EvaluationMode(const EvaluationMode&) = delete;
  EvaluationMode& operator=(const EvaluationMode&) = delete;
  ~EvaluationMode() {
    model_.train(training_);
    for (const auto& [module, training] : flags_) module->train(training);
  }

 private:
  torch::nn::Module& model_;
  bool training_;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> flags_;
};

}  // namespace

NamedWeights prunable_weights(const torch::nn::Module& model) {
  NamedWeights result;
  for (const auto& item : model.named_parameters()) {
    if (item.value().dim() >= 2 && item.value().requires_grad()) result.emplace_back(item.key(), item.value());
  }
  return result;
}

PruneModelResult prune_model(const NamedWeights& weights, const LossFn& next_loss, double sparsity,
                             const PruneModelOptions& options) {
  Job job{{}, {}, options.masks, options};
  for (const auto& [name, weight] : weights) {
    job.names.push_back(name);
    job.weights.push_back(weight);
  }
  check_options(options);
  check_weights(job);
  zeros_for(sparsity, job.weights, job.masks, job.names);
  if (options.method == "magnitude") {
    write(job, magnitude_round(job, zeros_for(sparsity, job.weights, job.masks, job.names)));
    return result_of(job, {});
  }
  Tensors rows;
  for (const at::Tensor& weight : job.weights) {
    const auto dtype = core::arithmetic_type(weight.scalar_type());
    rows.push_back(at::empty({options.num_grads, weight.numel()}, weight.options().dtype(dtype).requires_grad(false)));
  }
  const auto schedule =
      sparsity_schedule(sparsity, options.recomputations, job.masks.empty() ? 0 : sparsity_of(job.masks));
  job.total = options.num_grads * options.recomputations;
  Undo undo(job.weights);
  at::Tensor increase;
  for (const double target : schedule) {
    collect(job, next_loss, rows);
    const ObsChange change = obs_round(job, rows, zeros_for(target, job.weights, job.masks, job.names));
    increase = increase.defined() ? increase + change.loss_increase : change.loss_increase;
    write(job, change);
  }
  undo.keep();
  return result_of(job, increase);
}

PruneModelResult prune_model(torch::nn::Module& model, const LossFn& next_loss, double sparsity,
                             const PruneModelOptions& options) {
  const EvaluationMode mode(model);
  return prune_model(prunable_weights(model), next_loss, sparsity, options);
}

}  // namespace torch_ext::curvature
