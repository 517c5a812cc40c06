// The fused passes of M-FAC between parameters and a Fisher window (curvature/fisher_window/fisher_window_op.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace torch_ext::optim {

// torch_ext::mfac_update_: pass 2 over the window, momentum, decay and the write of the parameters in one go. With
// u = G^T coefficients cut into the parameters' segments (in order, row-major inside each), per parameter
//   b <- momentum b + (1 - dampening) u    (momentum 0: b = u, no buffer)
//   p <- p (1 - lr weight_decay) - lr b    decoupled decay; pass 0 for coupled or none
// Nothing is written if ring says that the last row was rejected, nor to a parameter whose gradient is None (its
// columns are passed over, its buffer and step not looked at). Parameters may sit on any devices and have any floating
// dtype.
//   momentum_buffers   one per parameter in its arithmetic dtype; [0] where momentum is 0
//   steps              one 0-dim float32 per parameter, on its device, += 1 where it is written
//   update             flat u (at least as long as the parameters together); given, the window is not read
TORCH_EXT_API void mfac_update_(at::TensorList params, at::TensorList momentum_buffers, at::TensorList steps,
                                const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& rows,
                                const at::Tensor& scales, const at::Tensor& indices, const at::Tensor& coefficients,
                                const at::Tensor& ring, const std::optional<at::Tensor>& update,
                                std::string_view format, at::ArrayRef<double> lr, at::ArrayRef<double> momentum,
                                at::ArrayRef<double> dampening, at::ArrayRef<double> weight_decay);

// torch_ext::mfac_flatten: the row that fisher_window_dots_ gathers, before encoding, on the first parameter's device:
// [padded_numel], zeros behind the parameters; float64 for format float64, else float32.
TORCH_EXT_API at::Tensor mfac_flatten(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                                      at::ArrayRef<double> weight_decay, bool negate,
                                      const std::optional<at::Tensor>& grad_scale, int64_t padded_numel,
                                      std::string_view format);

}  // namespace torch_ext::optim
