// The status in words.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <torch_ext/ops/sinkhorn_newton.h>

#include <algorithm>

namespace torch_ext::ops {

std::string sinkhorn_unconverged(const std::string& op, const at::Tensor& info) {
  if (info.is_meta() || at::isTensorSubclassLike(info)) return {};
  const at::Tensor rows = info.detach().to(at::kCPU, at::kDouble).reshape({-1, 4}).contiguous();
  const auto* row = rows.const_data_ptr<double>();
  int64_t failed = 0;
  double worst = 0;
  for (int64_t k = 0; k < rows.size(0); ++k, row += 4) {
    if (row[3] != 0) continue;
    ++failed;
    worst = std::max(worst, row[0]);
  }
  if (failed == 0) return {};
  return c10::str(op, ": ", failed, " of ", rows.size(0), " problems did not reach tol (largest marginal error ", worst,
                  "); see info, raise max_iter or eps, or check that the finite costs admit a plan");
}

}  // namespace torch_ext::ops
