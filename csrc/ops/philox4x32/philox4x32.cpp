#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch_ext/ops/philox4x32.h>

#include "core/check.h"
#include "core/library.h"
#include "core/multi_tensor_cpu.h"
#include "ops/philox4x32/philox4x32_kernel.h"

namespace torch_ext::ops {
namespace {

// Leading dimensions of the result, after checks that also run on meta tensors.
std::vector<c10::SymInt> leading_sizes(const at::Tensor& counter, const at::Tensor& key) {
  TORCH_CHECK_TYPE(counter.scalar_type() == at::kLong && key.scalar_type() == at::kLong,
                   "philox4x32: counter and key must be int64, got ", counter.scalar_type(), " and ",
                   key.scalar_type());
  TORCH_CHECK_VALUE(counter.dim() >= 1 && counter.sym_size(-1) == 4, "philox4x32: counter must be [..., 4], got ",
                    counter.sym_sizes());
  TORCH_CHECK_VALUE(key.dim() >= 1 && key.sym_size(-1) == 2, "philox4x32: key must be [..., 2], got ", key.sym_sizes());
  TORCH_CHECK_VALUE(counter.device() == key.device(), "philox4x32: counter is on ", counter.device(), ", key on ",
                    key.device());
  const auto a = counter.sym_sizes(), b = key.sym_sizes();
  return at::infer_size_symint(a.slice(0, a.size() - 1), b.slice(0, b.size() - 1));
}

at::Tensor philox4x32_impl(const at::Tensor& counter, const at::Tensor& key) {
  const auto leading = C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(leading_sizes(counter, key))).vec();
  auto sizes = leading;
  sizes.push_back(4);
  const at::Tensor counters = counter.expand(sizes).contiguous();
  sizes.back() = 2;
  const at::Tensor keys = key.expand(sizes).contiguous();
  at::Tensor out = at::empty_like(counters);
  const int64_t rows = counters.numel() / 4;
  const auto* from = counters.const_data_ptr<int64_t>();
  const auto* with = keys.const_data_ptr<int64_t>();
  auto* to = out.mutable_data_ptr<int64_t>();
  if (out.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(out.device());
    kernels::philox4x32_cuda(from, with, to, rows, core::current_stream(out.device()));
#endif
  } else {
    at::parallel_for(0, rows, core::kChunk / 4,
                     [&](int64_t begin, int64_t end) { kernels::philox4x32_cpu(from, with, to, begin, end); });
  }
  return out;
}

at::Tensor philox4x32_meta(const at::Tensor& counter, const at::Tensor& key) {
  auto sizes = leading_sizes(counter, key);
  sizes.emplace_back(4);
  return at::empty_symint(sizes, counter.options());
}

}  // namespace

at::Tensor philox4x32(const at::Tensor& counter, const at::Tensor& key) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::philox4x32", "").typed<decltype(philox4x32)>();
  return op.call(counter, key);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) { m.def("philox4x32(Tensor counter, Tensor key) -> Tensor"); }
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("philox4x32", philox4x32_impl); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("philox4x32", philox4x32_impl); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("philox4x32", philox4x32_meta); }

}  // namespace torch_ext::ops
