#include "core/library.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <vector>

#include "core/check.h"

namespace torch_ext::core {

void bump_mutated(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto inputs = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> written;
  const auto write = [&](const at::Tensor& tensor) {
    TORCH_CHECK(!at::GradMode::is_enabled() || !tensor.requires_grad(), op.schema().name(),
                " writes to a tensor that requires a gradient: call it under torch.no_grad()");
    written.push_back(tensor);
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    if (inputs[i].isTensor()) write(inputs[i].toTensor());
    if (inputs[i].isTensorList()) {
      for (const at::Tensor& tensor : inputs[i].toTensorVector()) write(tensor);
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  bump_versions(written);
}

}  // namespace torch_ext::core
