#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/curvature/prune_model.h>

#include <utility>

#include "core/check.h"
#include "core/library.h"

namespace torch_ext::curvature {
namespace {

void check_masks(at::TensorList weights, at::TensorList masks) {
  core::check_same_length("prune_model", "masks", weights.size(), masks.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_TYPE(masks[i].scalar_type() == at::kBool, "the mask of ", core::describe("weight", i, weights[i]),
                     " must be bool (true = kept), got ", masks[i].scalar_type());
    TORCH_CHECK_VALUE(masks[i].sizes() == weights[i].sizes() && masks[i].device() == weights[i].device(),
                      "the mask of ", core::describe("weight", i, weights[i]), " has shape ", masks[i].sizes(), " on ",
                      masks[i].device());
  }
}

void apply_op(at::TensorList weights, at::TensorList masks) {
  check_masks(weights, masks);
  for (size_t i = 0; i < weights.size(); ++i) weights[i].masked_fill_(masks[i].logical_not(), 0);
}

void apply_meta(at::TensorList weights, at::TensorList masks) { check_masks(weights, masks); }

// A choice, not a product: NaN at a pruned weight becomes zero too.
at::Tensor mask_gradient(const at::Tensor& gradient, const at::Tensor& mask) { return at::where(mask, gradient, 0); }

}  // namespace

PruneMasks::PruneMasks(const NamedWeights& weights, std::vector<at::Tensor> masks) : masks_(std::move(masks)) {
  for (const auto& item : weights) weights_.push_back(item.second);
  apply();  // which checks the masks
  for (size_t i = 0; i < weights_.size(); ++i) {
    const at::Tensor& weight = weights_[i];
    if (!weight.requires_grad()) continue;
    const auto hook = [mask = masks_[i]](const at::Tensor& grad) { return mask_gradient(grad, mask); };
    hooks_.emplace_back(weight, weight.register_hook(hook));
  }
}

PruneMasks::~PruneMasks() { remove(); }

void PruneMasks::apply() const {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::prune_model_apply_masks_", "")
                             .typed<decltype(apply_op)>();
  const at::NoGradGuard no_grad;
  op.call(weights_, masks_);
}

void PruneMasks::remove() {
  for (const auto& [weight, hook] : hooks_) weight.remove_hook(hook);
  hooks_.clear();
  weights_.clear();
  masks_.clear();
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("prune_model_apply_masks_(Tensor(a!)[] weights, Tensor[] masks) -> ()");
  m.def("prune_model_mask_gradient(Tensor gradient, Tensor mask) -> Tensor", mask_gradient);
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("prune_model_apply_masks_", apply_op); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("prune_model_apply_masks_", apply_op); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("prune_model_apply_masks_", apply_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("prune_model_apply_masks_", core::not_differentiable()); }
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) { m.impl("prune_model_apply_masks_", core::mutating()); }

}  // namespace torch_ext::curvature
