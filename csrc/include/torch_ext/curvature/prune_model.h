// Prunes a model in one call, and keeps the zeros while it is trained further.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/curvature/hvp.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace torch_ext::curvature {

using NamedWeights = std::vector<std::pair<std::string, at::Tensor>>;

struct PruneModelOptions {
  std::string method = "joint";  // "joint", "independent" (see obs_prune.h) or "magnitude" (smallest |w|; no gradients)
  int64_t num_grads = 256;       // m gradients for each Fisher matrix, one call of next_loss each
  double damping = 1e-5;         // the published pruner's
  std::optional<int64_t> block;  // columns a block of the Fisher matrix; none: the whole parameter
  int64_t recomputations = 1;    // rounds with fresh gradients, see sparsity_schedule
  std::vector<at::Tensor> masks;                              // of an earlier call, to prune further; or empty
  std::function<void(int64_t done, int64_t total)> progress;  // after each gradient; may throw to stop
};

struct PruneModelResult {
  std::vector<std::string> names;
  std::vector<at::Tensor> masks;       // bool, true = kept
  std::vector<double> sparsity;        // zeros / elements of each parameter
  double total_sparsity = 0;           // over all of them
  at::Tensor predicted_loss_increase;  // sum over the rounds, 0-dim float64; undefined for "magnitude"
};

// The parameters of a model that are pruned unless you choose: trainable, of two or more dimensions (no biases, no
// normalisation).
TORCH_EXT_API NamedWeights prunable_weights(const torch::nn::Module& model);

// Prunes `weights` in place to `sparsity` over all of them. `next_loss` returns the loss of the next (micro-)batch with
// its graph; exactly num_grads losses a round are differentiated, and .grad is left alone. Memory: num_grads numbers an
// element, float64 for float64 parameters and else float32.
// Errors leave every weight as it was: ValueError, naming the parameter, for a gradient that is not finite, for one
// that does not enter any loss, and for options out of range; whatever next_loss or progress throws.
TORCH_EXT_API PruneModelResult prune_model(const NamedWeights& weights, const LossFn& next_loss, double sparsity,
                                           const PruneModelOptions& options = {});
// prunable_weights(model), with the model in evaluation mode meanwhile (no dropout, no running statistics).
TORCH_EXT_API PruneModelResult prune_model(torch::nn::Module& model, const LossFn& next_loss, double sparsity,
                                           const PruneModelOptions& options = {});

// Keeps pruned weights at zero while any optimizer trains: gradients are masked by hooks, which remove() or the
// destructor takes off, and apply() after each step sets to zero what momentum, decay or noise moved.
class TORCH_EXT_API PruneMasks {
 public:
  PruneMasks(const NamedWeights& weights, std::vector<at::Tensor> masks);
  PruneMasks(const PruneMasks&) = delete;
  PruneMasks& operator=(const PruneMasks&) = delete;
  ~PruneMasks();

  void apply() const;
  void remove();

 private:
  std::vector<at::Tensor> weights_, masks_;
  std::vector<std::pair<at::Tensor, unsigned>> hooks_;
};

}  // namespace torch_ext::curvature
