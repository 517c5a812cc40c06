// Optimal-Brain-Surgeon pruning with the inverse of a StaticFisher.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/curvature/static_fisher.h>
#include <torch_ext/export.h>

#include <optional>
#include <string>
#include <vector>

namespace torch_ext::curvature {

struct ObsPruneResult {
  std::vector<at::Tensor> w;           // like the weights; pruned ones are exactly 0
  std::vector<at::Tensor> mask;        // bool, in the shapes of the weights; true = kept
  at::Tensor predicted_loss_increase;  // delta^T F delta / 2 of the change delta of all weights, 0-dim float64
};

// Sets weights to zero, those first whose removal alone raises the quadratic model of the loss least, and moves the
// others to make up for it. All lists have one entry a layer; element e (row-major) of a weight is column e of its
// Fisher matrix. With F^-1 the inverse of F restricted to the weights that `mask` keeps (arXiv:2107.03356,
// section 3.1):
//   score  rho_i = w_i^2 / (2 [F^-1]_ii), compared over all layers;
//   update "joint"        w -= F^-1_{:,S} ([F^-1]_SS)^-1 w_S, the minimum of the model with the set S at zero;
//   update "independent"  w -= F^-1 t, t_i = w_i / [F^-1]_ii on S, then w_S = 0: each weight as if it went alone.
// The joint update is computed as w_C += G_C^T (m damping I + G_C G_C^T)^-1 G_S w_S over the kept weights C, which is
// the same vector without a cancellation or a matrix of size |S|.
//
// sparsity: zeros of the returned masks / number of weights, in [0, 1), over all layers together; weights that `mask`
// (empty: none) marks as pruned count, stay pruned, and are taken as zero. Ties go to the earlier layer and element.
// The arguments are not changed. Errors: ValueError for lengths, shapes, devices, weights that are not finite, a
// sparsity out of range or below that of `mask`, an unknown update; TypeError for dtypes.
TORCH_EXT_API ObsPruneResult obs_prune(at::TensorList w, const std::vector<StaticFisher>& fisher, double sparsity,
                                       at::TensorList mask = {}, const std::string& update = "joint");
// One layer; the lists of the result have one entry.
TORCH_EXT_API ObsPruneResult obs_prune(const at::Tensor& w, const StaticFisher& fisher, double sparsity,
                                       const std::optional<at::Tensor>& mask = std::nullopt,
                                       const std::string& update = "joint");

// Sparsities of `recomputations` rounds from `initial` to `sparsity` between which gradients and Fisher matrix are
// computed anew: the kept fraction shrinks by the same factor each time. Round j (from 1) ends at
// 1 - (1 - initial) ((1 - sparsity) / (1 - initial))^(j / recomputations).
TORCH_EXT_API std::vector<double> sparsity_schedule(double sparsity, int64_t recomputations, double initial = 0);

}  // namespace torch_ext::curvature
