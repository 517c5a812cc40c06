#include "curvature/hutchinson_diag/hutchinson_diag.h"

#include <ATen/ops/zeros.h>
#include <torch_ext/curvature/hutchinson_diag.h>
#include <torch_ext/ops/rademacher.h>

#include <numeric>

#include "core/check.h"
#include "core/list_ops.h"
#include "curvature/hvp/hvp.h"

namespace torch_ext::curvature {

namespace {

bool fits(const std::vector<at::Tensor>& workspace, at::TensorList params) {
  if (workspace.size() != params.size()) return false;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& old = workspace[i];
    if (old.sizes() != params[i].sizes() || old.scalar_type() != params[i].scalar_type() ||
        old.device() != params[i].device()) {
      return false;
    }
  }
  return true;
}

std::vector<at::Tensor> draw(at::TensorList params, const Probes& probes, int64_t sample) {
  if (probes.workspace == nullptr || !fits(*probes.workspace, params)) {
    auto z = ops::rademacher_probe(params, probes.ordinals, probes.seed, /*stream=*/sample, probes.epoch);
    if (probes.workspace != nullptr) *probes.workspace = z;
    return z;
  }
  ops::rademacher_refill_(*probes.workspace, probes.ordinals, probes.seed, /*stream=*/sample, probes.epoch);
  return *probes.workspace;
}

}  // namespace

std::vector<at::Tensor> hutchinson(const HvpFn& product, at::TensorList params, const Probes& probes,
                                   bool magnitude_only) {
  std::vector<at::Tensor> sums;
  for (int64_t s = 0; s < probes.n_samples; ++s) {
    const auto z = draw(params, probes, s);
    auto hz = product(z, s + 1 == probes.n_samples);
    if (magnitude_only && probes.n_samples == 1) return hz;
    if (s == 0) {
      for (const at::Tensor& param : params) {
        const auto options = param.options().dtype(core::arithmetic_type(param.scalar_type())).requires_grad(false);
        sums.push_back(at::zeros(param.sizes(), options));
      }
    }
    core::accumulate_(sums, hz, z, 1.0 / static_cast<double>(probes.n_samples));
  }
  return sums;
}

std::vector<at::Tensor> hutchinson_diag(const at::Tensor& loss, at::TensorList params, int64_t n_samples,
                                        int64_t seed) {
  TORCH_CHECK_VALUE(n_samples >= 1, "hutchinson_diag: n_samples must be at least 1, got ", n_samples);
  const auto grads = gradients(loss, params, /*create_graph=*/true, /*keep_graph=*/true);
  Probes probes{n_samples, seed, /*epoch=*/0, std::vector<int64_t>(params.size()), nullptr};
  std::iota(probes.ordinals.begin(), probes.ordinals.end(), 0);
  const auto product = [&](at::TensorList v, bool) { return hvp_of_gradients(grads, params, v, /*keep_graph=*/true); };
  return hutchinson(product, params, probes, /*magnitude_only=*/false);
}

}  // namespace torch_ext::curvature
