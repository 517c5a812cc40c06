#include "curvature/obs_prune/obs_layers.h"

#include <ATen/ATen.h>

#include <cmath>

#include "core/check.h"

namespace torch_ext::curvature {
namespace {

at::Tensor scores_of(const ObsLayer& layer, const at::Tensor& diagonal) {
  const at::Tensor scores = layer.w.square().div_(diagonal).div_(2);
  return layer.fisher.keep.defined() ? scores.masked_fill_(layer.fisher.keep.logical_not(), -1) : scores;
}

at::Tensor independent_change(const ObsLayer& layer, const at::Tensor& diagonal, const at::Tensor& pruned) {
  const at::Tensor removed = at::where(pruned, layer.w, 0), t = removed / diagonal;
  const at::Tensor change = inverse_times(layer.fisher, layer.factor, t.unsqueeze(1)).squeeze(1).neg_();
  return at::where(pruned, removed.neg(), change);
}

// The kept weights C solve F_CC delta_C = F_CS w_S, since what minimises delta^T F delta with delta_S = -w_S given has
// (F delta)_C = 0. In a wide block delta_C = G_C^T (m damping I + G_C G_C^T)^-1 G_S w_S by the push-through identity.
at::Tensor joint_change(const FisherBlocks& fisher, const at::Tensor& w, const at::Tensor& pruned,
                        const at::Tensor& kept) {
  const at::Tensor removed = at::where(pruned, w, 0);
  at::Tensor change = removed.neg();
  const int64_t m = fisher.gradients.size(0);
  for (const BlockRange& range : block_ranges(fisher)) {
    const at::Tensor from = range.of(removed).unsqueeze(2), to = range.of(change).unsqueeze(2);
    const bool wide = range.wide(fisher);
    const int64_t order = wide ? m : range.width;
    at::Tensor target = at::zeros({range.count, m, 1}, w.options());  // G_S w_S
    for_each_tile(fisher, range, {}, [&](int64_t first, const at::Tensor& tile) {
      target.add_(at::bmm(tile, from.narrow(1, first, tile.size(2))));
    });
    const at::Tensor gram = at::zeros({range.count, order, order}, w.options());
    for_each_tile(fisher, range, kept, [&](int64_t, const at::Tensor& tile) {
      add_gram(gram, wide ? tile : tile.mT());
      if (!wide) target = at::bmm(tile.mT(), target).div_(m);
    });
    if (!wide) gram.div_(m);
    const double shift = wide ? static_cast<double>(m) * fisher.damping : fisher.damping;
    const at::Tensor solution = at::cholesky_solve(target, damped_cholesky(gram, shift));
    if (!wide) {
      to.add_(solution);
      continue;
    }
    for_each_tile(fisher, range, kept, [&](int64_t first, const at::Tensor& tile) {
      to.narrow(1, first, tile.size(2)).add_(at::bmm(tile.mT(), solution));
    });
  }
  return change;
}

std::string label(const std::vector<std::string>& names, const char* what, size_t i, const at::Tensor& tensor) {
  return names.empty() ? core::describe(what, i, tensor) : "parameter '" + names[i] + "'";
}

}  // namespace

std::vector<at::Tensor> masks_without_smallest(const std::vector<at::Tensor>& scores, int64_t zeros) {
  std::vector<at::Tensor> masks, parts;
  const at::Device first = scores[0].device();
  for (const at::Tensor& layer : scores) parts.push_back(layer.to(first));
  const at::Tensor all = at::cat(parts);
  at::Tensor kept = at::ones_like(all, all.options().dtype(at::kBool));
  if (zeros > 0) {
    const at::Tensor threshold = std::get<0>(all.kthvalue(zeros));
    const at::Tensor below = all.lt(threshold), equal = all.eq(threshold);
    const at::Tensor missing = below.sum().neg_().add_(zeros);
    kept = below.logical_or_(equal.logical_and(equal.cumsum(0).le_(missing))).logical_not_();
  }
  int64_t begin = 0;
  for (const at::Tensor& layer : scores) {
    masks.push_back(kept.narrow(0, begin, layer.numel()).to(layer.device()).clone());
    begin += layer.numel();
  }
  return masks;
}

ObsChange prune_layers(const std::vector<ObsLayer>& layers, int64_t zeros, bool joint) {
  std::vector<at::Tensor> diagonals, scores;
  for (const ObsLayer& layer : layers) {
    diagonals.push_back(inverse_diagonal(layer.fisher, layer.factor));
    scores.push_back(scores_of(layer, diagonals.back()));
  }
  ObsChange result{{}, masks_without_smallest(scores, zeros), at::zeros({}, layers[0].w.options())};
  for (size_t i = 0; i < layers.size(); ++i) {
    const ObsLayer& layer = layers[i];
    const at::Tensor& kept = result.mask[i];
    at::Tensor pruned = kept.logical_not();
    if (layer.fisher.keep.defined()) pruned.logical_and_(layer.fisher.keep);
    at::Tensor w = layer.w;
    if (pruned.any().item<bool>()) {
      const at::Tensor change =
          joint ? joint_change(layer.fisher, layer.w, pruned, kept) : independent_change(layer, diagonals[i], pruned);
      result.loss_increase.add_(half_quadratic(layer.fisher, change).to(result.loss_increase.device()));
      w = w + change;
    }
    result.w.push_back(w.masked_fill(kept.logical_not(), 0));
  }
  return result;
}

int64_t zeros_for(double sparsity, at::TensorList weights, at::TensorList masks,
                  const std::vector<std::string>& names) {
  TORCH_CHECK_VALUE(sparsity >= 0 && sparsity < 1, "sparsity must be in [0, 1), the fraction of zeros, got ", sparsity);
  TORCH_CHECK_VALUE(!weights.empty(), "no weights to prune");
  if (!masks.empty()) core::check_same_length("obs_prune", "mask", weights.size(), masks.size());
  int64_t numel = 0, already = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name = [&] { return label(names, "weight", i, weights[i]); };
    TORCH_CHECK(weights[i].layout() == at::kStrided, name(), " is not a dense tensor");
    core::dtype_of(weights[i], name());
    TORCH_CHECK_VALUE(weights[i].isfinite().all().item<bool>(), name(), " holds NaN or infinity");
    numel += weights[i].numel();
    if (masks.empty()) continue;
    TORCH_CHECK_TYPE(masks[i].scalar_type() == at::kBool, "the mask of ", name(), " must be bool (true = kept), got ",
                     masks[i].scalar_type());
    TORCH_CHECK_VALUE(masks[i].sizes() == weights[i].sizes() && masks[i].device() == weights[i].device(),
                      "the mask of ", name(), " has shape ", masks[i].sizes(), " on ", masks[i].device(),
                      ", the weight ", weights[i].sizes(), " on ", weights[i].device());
    already += masks[i].numel() - masks[i].sum().item<int64_t>();
  }
  const auto zeros = static_cast<int64_t>(std::nearbyint(sparsity * static_cast<double>(numel)));
  TORCH_CHECK_VALUE(already <= zeros, "sparsity ", sparsity, " is below that of the given masks, ",
                    static_cast<double>(already) / static_cast<double>(numel),
                    "; masks only grow: start without them to prune less");
  return zeros;
}

bool is_joint(const std::string& update) {
  TORCH_CHECK_VALUE(update == "joint" || update == "independent",
                    "obs_prune: update must be \"joint\" or \"independent\", got \"", update, "\"");
  return update == "joint";
}

}  // namespace torch_ext::curvature
