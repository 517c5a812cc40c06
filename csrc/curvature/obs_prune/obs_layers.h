// Pruning of several layers at once; the public face is <torch_ext/curvature/obs_prune.h>.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "curvature/static_fisher/fisher_blocks.h"

namespace torch_ext::curvature {

struct ObsLayer {
  FisherBlocks fisher;  // keep: what is kept before, or undefined
  FisherFactor factor;  // of `fisher`
  at::Tensor w;         // [d] float64
};

struct ObsChange {
  std::vector<at::Tensor> w, mask;  // [d] a layer
  at::Tensor loss_increase;         // 0-dim float64
};

// Prunes to `zeros` weights over all layers.
ObsChange prune_layers(const std::vector<ObsLayer>& layers, int64_t zeros, bool joint);

// The masks that leave out the `zeros` smallest scores over all layers, ties in order. Scores are float64, >= 0, or
// negative where a weight is pruned already.
std::vector<at::Tensor> masks_without_smallest(const std::vector<at::Tensor>& scores, int64_t zeros);

// How many zeros the sparsity means for these weights; ValueError for a sparsity out of range or below that of `masks`
// (empty: none), and for weights and masks that do not fit. `names` (may be empty) say which.
int64_t zeros_for(double sparsity, at::TensorList weights, at::TensorList masks, const std::vector<std::string>& names);
// True for "joint"; ValueError unless "joint" or "independent".
bool is_joint(const std::string& update);

}  // namespace torch_ext::curvature
