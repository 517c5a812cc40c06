#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/curvature/obs_prune.h>

#include <tuple>
#include <utility>

#include "core/check.h"
#include "core/library.h"
#include "core/math.h"
#include "curvature/obs_prune/obs_layers.h"

namespace torch_ext::curvature {
namespace {

using Tensors = std::vector<at::Tensor>;

void check_lists(at::TensorList w, at::TensorList gradients, at::TensorList factors, at::TensorList tails,
                 at::ArrayRef<double> damping, at::IntArrayRef block) {
  const auto check = [&](const char* what, size_t got) { core::check_same_length("obs_prune", what, w.size(), got); };
  check("fisher", gradients.size());
  check("factor", factors.size());
  check("tail_factor", tails.size());
  check("damping", damping.size());
  check("block", block.size());
  for (size_t i = 0; i < w.size(); ++i) {
    TORCH_CHECK_VALUE(w[i].sym_numel() == gradients[i].sym_size(1), "obs_prune: ", core::describe("weight", i, w[i]),
                      " has ", w[i].sym_numel(), " elements, its Fisher matrix ", gradients[i].sym_size(1), " columns");
    TORCH_CHECK_VALUE(w[i].device() == gradients[i].device(), "obs_prune: ", core::describe("weight", i, w[i]),
                      " is on ", w[i].device(), ", its Fisher matrix on ", gradients[i].device());
  }
}

std::tuple<Tensors, Tensors, at::Tensor> obs_prune_op(at::TensorList w, at::TensorList gradients,
                                                      at::TensorList factors, at::TensorList tails,
                                                      at::ArrayRef<double> damping, at::IntArrayRef block,
                                                      double sparsity, at::TensorList mask, c10::string_view update) {
  const at::NoGradGuard no_grad;
  const bool joint = is_joint(std::string(update));
  const int64_t zeros = zeros_for(sparsity, w, mask, {});
  check_lists(w, gradients, factors, tails, damping, block);
  std::vector<ObsLayer> layers;
  for (size_t i = 0; i < w.size(); ++i) {
    ObsLayer layer{fisher_blocks(gradients[i], damping[i], block[i]), {}, w[i].reshape({-1}).to(at::kDouble)};
    if (mask.empty()) {
      layer.factor = checked_factor(layer.fisher, factors[i], tails[i]);
    } else {
      layer.fisher.keep = mask[i].reshape({-1});
      layer.w = layer.w.masked_fill(layer.fisher.keep.logical_not(), 0);
      layer.factor = factorize(layer.fisher);
    }
    layers.push_back(std::move(layer));
  }
  ObsChange change = prune_layers(layers, zeros, joint);
  for (size_t i = 0; i < w.size(); ++i) {
    change.w[i] = change.w[i].to(w[i].scalar_type()).reshape(w[i].sizes());
    change.mask[i] = change.mask[i].reshape(w[i].sizes());
  }
  return {std::move(change.w), std::move(change.mask), std::move(change.loss_increase)};
}

std::tuple<Tensors, Tensors, at::Tensor> obs_prune_meta(at::TensorList w, at::TensorList gradients,
                                                        at::TensorList factors, at::TensorList tails,
                                                        at::ArrayRef<double> damping, at::IntArrayRef block, double,
                                                        at::TensorList, c10::string_view update) {
  is_joint(std::string(update));
  check_lists(w, gradients, factors, tails, damping, block);
  Tensors weights, masks;
  for (const at::Tensor& weight : w) {
    weights.push_back(at::empty_symint(weight.sym_sizes(), weight.options()));
    masks.push_back(at::empty_symint(weight.sym_sizes(), weight.options().dtype(at::kBool)));
  }
  return {std::move(weights), std::move(masks), at::empty_symint({}, w[0].options().dtype(at::kDouble))};
}

}  // namespace

ObsPruneResult obs_prune(at::TensorList w, const std::vector<StaticFisher>& fisher, double sparsity,
                         at::TensorList mask, const std::string& update) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::obs_prune", "").typed<decltype(obs_prune_op)>();
  TORCH_CHECK_VALUE(!w.empty(), "no weights to prune");  // the dispatcher could not tell the device
  Tensors gradients, factors, tails;
  std::vector<double> damping;
  std::vector<int64_t> block;
  for (const StaticFisher& layer : fisher) {
    gradients.push_back(layer.gradients());
    factors.push_back(layer.factor());
    tails.push_back(layer.tail_factor());
    damping.push_back(layer.damping());
    block.push_back(layer.block());
  }
  auto [weights, masks, increase] = op.call(w, gradients, factors, tails, damping, block, sparsity, mask, update);
  return {std::move(weights), std::move(masks), std::move(increase)};
}

ObsPruneResult obs_prune(const at::Tensor& w, const StaticFisher& fisher, double sparsity,
                         const std::optional<at::Tensor>& mask, const std::string& update) {
  const Tensors masks = mask.has_value() ? Tensors{*mask} : Tensors{};
  return obs_prune(at::TensorList{w}, std::vector<StaticFisher>{fisher}, sparsity, masks, update);
}

std::vector<double> sparsity_schedule(double sparsity, int64_t recomputations, double initial) {
  TORCH_CHECK_VALUE(recomputations >= 1, "recomputations must be at least 1, got ", recomputations);
  TORCH_CHECK_VALUE(initial >= 0 && initial <= sparsity && sparsity < 1,
                    "sparsity_schedule: need 0 <= initial <= sparsity < 1, got initial ", initial, " and sparsity ",
                    sparsity);
  std::vector<double> result;
  const double kept = 1 - initial, ratio = (1 - sparsity) / kept;
  for (int64_t j = 1; j < recomputations; ++j) {
    const double exponent = static_cast<double>(j) / static_cast<double>(recomputations);
    result.push_back(1 - kept * core::power(ratio, exponent));
  }
  result.push_back(sparsity);  // exactly
  return result;
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "obs_prune(Tensor[] w, Tensor[] gradients, Tensor[] factor, Tensor[] tail_factor, float[] damping, int[] block, "
      "float sparsity, Tensor[] mask, str update) -> (Tensor[] w, Tensor[] mask, Tensor predicted_loss_increase)");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("obs_prune", obs_prune_op); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("obs_prune", obs_prune_op); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("obs_prune", obs_prune_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("obs_prune", core::not_differentiable()); }

}  // namespace torch_ext::curvature
