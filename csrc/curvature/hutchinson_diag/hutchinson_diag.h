// The estimator as the optimizers use it; the public face is <torch_ext/curvature/hutchinson_diag.h>.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace torch_ext::curvature {

// H v for the s-th of S probes; `last` says that no further probe follows, so a graph may be freed.
using HvpFn = std::function<std::vector<at::Tensor>(at::TensorList v, bool last)>;

struct Probes {
  int64_t n_samples, seed, epoch;
  std::vector<int64_t> ordinals;
  // Probes of an earlier call to write over, if they fit: on the CPU fresh memory costs ten times what filling it does
  // (page faults). Where given, the last probes are left there.
  std::vector<at::Tensor>* workspace = nullptr;
};

// (1/S) sum_s z_s * (H z_s), in the parameters' arithmetic dtype. With `magnitude_only` and one sample H z itself is
// returned: it has the same magnitudes, and the product with the signs is saved.
std::vector<at::Tensor> hutchinson(const HvpFn& product, at::TensorList params, const Probes& probes,
                                   bool magnitude_only);

}  // namespace torch_ext::curvature
