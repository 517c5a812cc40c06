#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch_ext/ops/rademacher.h>

#include "core/check.h"
#include "core/library.h"
#include "core/multi_tensor_cpu.h"
#include "ops/rademacher/rademacher_kernel.h"

namespace torch_ext::ops {
namespace {

void check_counters(int64_t stream, int64_t ordinal, int64_t epoch) {
  constexpr int64_t kWord = int64_t{1} << 32;
  TORCH_CHECK_VALUE(stream >= 0 && stream < kWord, "rademacher: stream must be in [0, 2^32), got ", stream);
  TORCH_CHECK_VALUE(ordinal >= 0 && ordinal < kWord >> 8, "rademacher: ordinal must be in [0, 2^24), got ", ordinal);
  TORCH_CHECK_VALUE(epoch >= 0 && epoch < kWord, "rademacher: epoch must be in [0, 2^32), got ", epoch);
}

// Fills contiguous tensors of one device and dtype.
void fill(const std::vector<kernels::RademacherTensor>& tensors, const at::Tensor& like, core::DType type) {
  if (like.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(like.device());
    kernels::rademacher_cuda(tensors, type, core::current_stream(like.device()));
#endif
    return;
  }
  std::vector<core::Split> splits;
  std::vector<int64_t> numels;
  for (const auto& tensor : tensors) {
    splits.push_back(core::Split::of(tensor.numel, 1));
    numels.push_back(tensor.numel);
  }
  core::for_each_chunk(splits, numels, [&](size_t i, int64_t begin, int64_t end) {
    kernels::rademacher_cpu(tensors[i], type, begin, end);
  });
}

void rademacher_op(const at::Tensor& self, int64_t seed, int64_t stream, int64_t ordinal, int64_t epoch) {
  check_counters(stream, ordinal, epoch);
  const core::DType type = core::dtype_of(self, "rademacher_: the tensor");
  const core::Staged staged(self, core::walking_strides(self, false, "rademacher_: tensor"));
  fill({{staged.data(), self.numel(), core::philox_stream(seed, stream, ordinal, core::PhiloxTag::kProbe, epoch)}},
       self, type);
  staged.finish();
}

void refill_meta(at::TensorList tensors, at::IntArrayRef ordinals, int64_t, int64_t stream, int64_t epoch) {
  core::check_same_length("rademacher_refill_", "ordinals", tensors.size(), ordinals.size());
  for (const int64_t ordinal : ordinals) check_counters(stream, ordinal, epoch);
}

std::vector<at::Tensor> probe_meta(at::TensorList like, at::IntArrayRef ordinals, int64_t, int64_t stream,
                                   int64_t epoch) {
  refill_meta(like, ordinals, 0, stream, epoch);
  std::vector<at::Tensor> probes;
  probes.reserve(like.size());
  for (const at::Tensor& tensor : like) {
    probes.push_back(at::empty_symint(tensor.sym_sizes(), tensor.options().requires_grad(false)));
  }
  return probes;
}

void refill_impl(at::TensorList tensors, at::IntArrayRef ordinals, int64_t seed, int64_t stream, int64_t epoch) {
  refill_meta(tensors, ordinals, seed, stream, epoch);
  for (const auto& bucket : core::buckets(tensors)) {
    std::vector<kernels::RademacherTensor> work;
    for (const size_t i : bucket) {
      TORCH_CHECK_VALUE(tensors[i].is_contiguous(), "rademacher_refill_: ", core::describe("tensor", i, tensors[i]),
                        " is not contiguous");
      work.push_back({tensors[i].mutable_data_ptr(), tensors[i].numel(),
                      core::philox_stream(seed, stream, ordinals[i], core::PhiloxTag::kProbe, epoch)});
    }
    const at::Tensor& first = tensors[bucket[0]];
    fill(work, first, core::dtype_of(first, core::describe("rademacher: tensor", bucket[0], first)));
  }
}

std::vector<at::Tensor> probe_impl(at::TensorList like, at::IntArrayRef ordinals, int64_t seed, int64_t stream,
                                   int64_t epoch) {
  auto probes = probe_meta(like, ordinals, seed, stream, epoch);
  refill_impl(probes, ordinals, seed, stream, epoch);
  return probes;
}

void rademacher_meta(const at::Tensor&, int64_t, int64_t stream, int64_t ordinal, int64_t epoch) {
  check_counters(stream, ordinal, epoch);
}

}  // namespace

at::Tensor rademacher_(at::Tensor tensor, int64_t seed, int64_t stream, int64_t ordinal, int64_t epoch) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::rademacher_", "").typed<decltype(rademacher_op)>();
  op.call(tensor, seed, stream, ordinal, epoch);
  return tensor;
}

std::vector<at::Tensor> rademacher_probe(at::TensorList like, at::IntArrayRef ordinals, int64_t seed, int64_t stream,
                                         int64_t epoch) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::rademacher_probe", "")
                             .typed<decltype(rademacher_probe)>();
  return op.call(like, ordinals, seed, stream, epoch);
}

void rademacher_refill_(at::TensorList probes, at::IntArrayRef ordinals, int64_t seed, int64_t stream, int64_t epoch) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::rademacher_refill_", "")
                             .typed<decltype(rademacher_refill_)>();
  op.call(probes, ordinals, seed, stream, epoch);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("rademacher_refill_(Tensor(a!)[] probes, int[] ordinals, int seed, int stream, int epoch) -> ()");
  m.def("rademacher_(Tensor(a!) self, int seed, int stream, int ordinal=0, int epoch=0) -> ()");
  m.def("rademacher_probe(Tensor[] like, int[] ordinals, int seed, int stream, int epoch) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("rademacher_", rademacher_op);
  m.impl("rademacher_probe", probe_impl);
  m.impl("rademacher_refill_", refill_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("rademacher_", rademacher_op);
  m.impl("rademacher_probe", probe_impl);
  m.impl("rademacher_refill_", refill_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("rademacher_", rademacher_meta);
  m.impl("rademacher_probe", probe_meta);
  m.impl("rademacher_refill_", refill_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("rademacher_", core::not_differentiable());
  m.impl("rademacher_probe", core::not_differentiable());
  m.impl("rademacher_refill_", core::not_differentiable());
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("rademacher_", core::mutating());
  m.impl("rademacher_refill_", core::mutating());
}

}  // namespace torch_ext::ops
