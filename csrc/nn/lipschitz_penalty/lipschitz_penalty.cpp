#include <ATen/ATen.h>
#include <torch/library.h>
#include <torch_ext/nn/lipschitz_penalty.h>

#include <cmath>
#include <utility>

namespace torch_ext::nn {
namespace {

void check_eps(double eps) {
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "LipschitzPenalty: eps must be a finite number >= 0, got ", eps);
}

// Composite, so that autograd and compilers see through it.
at::Tensor reduce(const at::Tensor& bounds) { return bounds.amax(1).mean(); }

}  // namespace

LipschitzPenaltyImpl::LipschitzPenaltyImpl(torch::nn::Sequential model, double eps, ops::LocalLipschitzOptions options)
    : model_(std::move(model)), eps_(eps), options_(std::move(options)) {
  check_eps(eps);
}

at::Tensor LipschitzPenaltyImpl::forward(const at::Tensor& x) {
  return reduce(std::get<0>(ops::local_lipschitz(*model_, x, eps_, options_)));
}

void LipschitzPenaltyImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::LipschitzPenalty(eps=" << eps_ << ')';
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("lipschitz_penalty(Tensor L) -> Tensor", reduce);
  m.def("lipschitz_penalty_check(float eps) -> ()", check_eps);
}

}  // namespace torch_ext::nn
