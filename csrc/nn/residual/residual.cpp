#include <torch_ext/nn/residual.h>

#include <utility>

namespace torch_ext::nn {

ResidualImpl::ResidualImpl(torch::nn::Sequential body, torch::nn::Sequential shortcut)
    : body(std::move(body)), shortcut(std::move(shortcut)) {
  TORCH_CHECK_VALUE(!this->body.is_empty(), "Residual: body must be a Sequential, got none");
  register_module("body", this->body);
  if (!this->shortcut.is_empty()) register_module("shortcut", this->shortcut);
}

at::Tensor ResidualImpl::forward(const at::Tensor& x) {
  return body->forward(x) + (shortcut.is_empty() ? x : shortcut->forward(x));
}

void ResidualImpl::pretty_print(std::ostream& stream) const { stream << "torch_ext::nn::Residual"; }

}  // namespace torch_ext::nn
