// The operators of EGGROLL that are no layers: from values to coefficients of the noise, and the parameters' update.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <string_view>
#include <tuple>

namespace torch_ext::optim {

inline constexpr const char* kEggroll = "Eggroll";  // in messages

// torch_ext::eggroll_shape: (coefficients, mean, nonfinite) of the values [N] of a population, on their device.
//   coefficients  float64 [N / 2] (antithetic: differences of the weights of each pair) or [N]; see EggrollOptions
//   mean          float64, of the values as they are
//   nonfinite     float32, 1 if nothing can be made of them: some value is infinite or NaN, with nonfinite = "min" all
// No host synchronisation on CUDA. ValueError for sizes and options that do not fit together.
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor, at::Tensor> eggroll_shape(const at::Tensor& values,
                                                                           std::string_view shaping, int64_t group_size,
                                                                           double temperature, bool antithetic,
                                                                           bool maximize, std::string_view nonfinite);

// The rules of population, group_size, shaping and antithetic together; `optimizer` begins the message.
TORCH_EXT_API void check_eggroll_shape(int64_t population, std::string_view shaping, int64_t group_size,
                                       bool antithetic);

// torch_ext::eggroll_step_: b = momentum b + (g + weight_decay p), p -= lr b, for any mix of devices and dtypes.
//   grads             one per parameter, in its arithmetic dtype
//   momentum_buffers  one per parameter in its arithmetic dtype; none where momentum is 0
//   steps             one 0-dim float32 per parameter, on its device, += 1
//   nonfinite         0-dim float32: nonzero leaves everything as it is
TORCH_EXT_API void eggroll_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                                 at::TensorList steps, const at::Tensor& nonfinite, double lr, double momentum,
                                 double weight_decay);

}  // namespace torch_ext::optim
