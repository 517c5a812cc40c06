// Hutchinson's estimate of the Hessian diagonal.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <vector>

namespace torch_ext::curvature {

// (1/S) sum_s z_s * (H z_s) with S = n_samples joint Rademacher probes: unbiased for diag(H), variance of element i
// equal to (1/S) sum_{j != i} H_ij^2 (Bekas, Kokiopoulou and Saad 2007). One tensor per parameter, in its shape, in
// float32 for half-precision parameters. Probes are those of ops::rademacher_probe with ordinal = position, stream =
// sample, epoch = 0; the same seed gives the same estimate on every device. Errors: ValueError for n_samples < 1,
// RuntimeError with a hint if an op has no second derivative.
TORCH_EXT_API std::vector<at::Tensor> hutchinson_diag(const at::Tensor& loss, at::TensorList params,
                                                      int64_t n_samples = 1, int64_t seed = 0);

}  // namespace torch_ext::curvature
