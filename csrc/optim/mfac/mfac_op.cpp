#include "optim/mfac/mfac_op.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "core/library.h"

namespace torch_ext::optim {

void mfac_update_(at::TensorList params, at::TensorList momentum_buffers, at::TensorList steps,
                  const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& rows, const at::Tensor& scales,
                  const at::Tensor& indices, const at::Tensor& coefficients, const at::Tensor& ring,
                  const std::optional<at::Tensor>& update, std::string_view format, at::ArrayRef<double> lr,
                  at::ArrayRef<double> momentum, at::ArrayRef<double> dampening, at::ArrayRef<double> weight_decay) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::mfac_update_", "").typed<decltype(mfac_update_)>();
  op.call(params, momentum_buffers, steps, grads, rows, scales, indices, coefficients, ring, update, format, lr,
          momentum, dampening, weight_decay);
}

at::Tensor mfac_flatten(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                        at::ArrayRef<double> weight_decay, bool negate, int64_t padded_numel, std::string_view format) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::mfac_flatten", "").typed<decltype(mfac_flatten)>();
  return op.call(grads, params, weight_decay, negate, padded_numel, format);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "mfac_update_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, Tensor?[] grads, "
      "Tensor rows, Tensor scales, Tensor indices, Tensor coefficients, Tensor ring, Tensor? update, *, str format, "
      "float[] lr, float[] momentum, float[] dampening, float[] weight_decay) -> ()");
  m.def(
      "mfac_flatten(Tensor?[] grads, Tensor[] params, float[] weight_decay, bool negate, int padded_numel, "
      "str format) -> Tensor");
}

}  // namespace torch_ext::optim
