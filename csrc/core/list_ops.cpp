#include "core/list_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <atomic>

#include "core/check.h"
#include "core/library.h"
#include "core/list_kernel.h"
#include "core/multi_tensor_cpu.h"

namespace torch_ext::core {
namespace {

// Raises the flag (0-dim float32 on the bucket's device) for one bucket of tensors.
void check_bucket(const std::vector<at::Tensor>& dense, at::Tensor& flag) {
  const DType type = dtype_of(dense[0], "a gradient");
  std::vector<kernels::ConstTensor> tensors;
  std::vector<Split> splits;
  std::vector<int64_t> numels;
  for (const at::Tensor& tensor : dense) {
    tensors.push_back({tensor.const_data_ptr(), tensor.numel()});
    splits.push_back(Split::of(tensor.numel(), 1));
    numels.push_back(tensor.numel());
  }
  if (dense[0].is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(dense[0].device());
    kernels::has_nonfinite_cuda(tensors, type, flag.data_ptr<float>(), current_stream(dense[0].device()));
#endif
    return;
  }
  std::atomic<bool> found{false};
  for_each_chunk(splits, numels, [&](size_t i, int64_t begin, int64_t end) {
    if (kernels::has_nonfinite_cpu(tensors[i].data, type, begin, end)) found.store(true, std::memory_order_relaxed);
  });
  if (found) flag.fill_(1);
}

at::Tensor count_nonfinite_impl(at::TensorList tensors, const std::optional<at::Tensor>& found_inf,
                                const at::Tensor& skipped) {
  TORCH_CHECK_VALUE(!tensors.empty(), "count_nonfinite_: no tensors");
  at::Tensor total = at::zeros({}, at::TensorOptions(tensors[0].device()).dtype(at::kFloat));
  for (const auto& bucket : buckets(tensors)) {
    std::vector<at::Tensor> dense;
    for (const size_t i : bucket) {
      const at::Tensor& tensor = tensors[i];
      if (tensor.numel() > 0) dense.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
    }
    if (dense.empty()) continue;
    if (dense[0].device() == total.device()) {
      check_bucket(dense, total);
    } else {
      at::Tensor flag = at::zeros({}, at::TensorOptions(dense[0].device()).dtype(at::kFloat));
      check_bucket(dense, flag);
      total = total.maximum(flag.to(total.device(), /*non_blocking=*/true));
    }
  }
  if (found_inf.has_value()) {
    total.add_(found_inf->to(total.device()).reshape({}).ne(0)).clamp_max_(1);
  }
  skipped.add_(total.to(skipped.device(), at::kLong));
  return total;
}

at::Tensor count_nonfinite_meta(at::TensorList tensors, const std::optional<at::Tensor>&, const at::Tensor&) {
  return at::empty({}, tensors[0].options().dtype(at::kFloat));
}

void accumulate_impl(at::TensorList sums, at::TensorList x, at::TensorList signs, double weight) {
  check_same_length("accumulate_", "x", sums.size(), x.size());
  if (!signs.empty()) check_same_length("accumulate_", "signs", sums.size(), signs.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    TORCH_CHECK_TYPE(sums[i].scalar_type() == arithmetic_type(x[i].scalar_type()),
                     "accumulate_: ", describe("sum", i, sums[i]), " has dtype ", sums[i].scalar_type(), ", x has ",
                     x[i].scalar_type());
    TORCH_CHECK_VALUE(sums[i].sizes() == x[i].sizes() && sums[i].device() == x[i].device(),
                      "accumulate_: ", describe("sum", i, sums[i]), " and x differ in shape or device");
  }
  for (const auto& bucket : buckets(x)) {
    const at::Tensor& first = x[bucket[0]];
    const DType type = dtype_of(first, "x");
    std::vector<Staged> staged;
    std::vector<kernels::AccumulateTensor> tensors;
    std::vector<Split> splits;
    std::vector<int64_t> numels;
    staged.reserve(3 * bucket.size());
    for (const size_t i : bucket) {
      const auto strides = walking_strides(sums[i], true, "sum", i);
      const auto stage = [&](const at::Tensor& tensor) { return staged.emplace_back(tensor, strides).data(); };
      void* sum = stage(sums[i]);
      const void* from = stage(x[i]);
      const void* sign = signs.empty() ? nullptr : stage(signs[i].to(x[i].scalar_type()));
      tensors.push_back({sum, from, sign, sums[i].numel()});
      splits.push_back(Split::of(sums[i].numel(), 1));
      numels.push_back(sums[i].numel());
    }
    if (first.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
      const c10::DeviceGuard guard(first.device());
      kernels::accumulate_cuda(tensors, type, weight, current_stream(first.device()));
#endif
    } else {
      for_each_chunk(splits, numels, [&](size_t i, int64_t begin, int64_t end) {
        kernels::accumulate_cpu(tensors[i], type, weight, begin, end);
      });
    }
    for (size_t k = 0; k < staged.size(); k += signs.empty() ? 2 : 3) staged[k].finish();
  }
}

void accumulate_meta(at::TensorList, at::TensorList, at::TensorList, double) {}

}  // namespace

at::Tensor count_nonfinite_(at::TensorList tensors, const std::optional<at::Tensor>& found_inf,
                            const at::Tensor& skipped) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::count_nonfinite_", "")
                             .typed<decltype(count_nonfinite_)>();
  return op.call(tensors, found_inf, skipped);
}

void accumulate_(at::TensorList sums, at::TensorList x, at::TensorList signs, double weight) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::accumulate_", "").typed<decltype(accumulate_)>();
  op.call(sums, x, signs, weight);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("count_nonfinite_(Tensor[] tensors, Tensor? found_inf, Tensor(a!) skipped) -> Tensor");
  m.def("accumulate_(Tensor(a!)[] sums, Tensor[] x, Tensor[] signs, float weight) -> ()");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("count_nonfinite_", count_nonfinite_impl);
  m.impl("accumulate_", accumulate_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("count_nonfinite_", count_nonfinite_impl);
  m.impl("accumulate_", accumulate_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("count_nonfinite_", count_nonfinite_meta);
  m.impl("accumulate_", accumulate_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("count_nonfinite_", not_differentiable());
  m.impl("accumulate_", not_differentiable());
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("count_nonfinite_", mutating());
  m.impl("accumulate_", mutating());
}

}  // namespace torch_ext::core
