#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "core/check.h"
#include "core/library.h"
#include "moe/dispatch_plan/dispatch_plan_kernel.h"
#include "moe/dispatch_plan/dispatch_plan_op.h"

namespace torch_ext::moe {
namespace {

using Optional = std::optional<at::Tensor>;

void check_index(const char* op, const char* name, const at::Tensor& index, int64_t dim, const at::Tensor& rows) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kInt, op, ": ", name, " must be int32, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == dim, op, ": ", name, " must have ", dim, " dimension(s), got ", index.sym_sizes());
  TORCH_CHECK_VALUE(index.device() == rows.device(), op, ": the plan is on ", index.device(), ", the rows are on ",
                    rows.device());
}

void check_plan_of(const char* op, const at::Tensor& rows, const at::Tensor& slot_of, const at::Tensor& src_of) {
  check_index(op, "slot_of", slot_of, 2, rows);
  check_index(op, "src_of", src_of, 1, rows);
  TORCH_CHECK_VALUE(slot_of.sym_size(1) >= 1, op, ": slot_of must be [T, K] with K >= 1");
}

void check_rows(const char* op, const char* name, const at::Tensor& rows, const char* count, const c10::SymInt& size) {
  core::dtype_of(rows, std::string(op) + ": " + name);
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.sym_size(0) == size, op, ": ", name, " must be [", count, " = ", size,
                    ", D] for this plan, got ", rows.sym_sizes());
}

void check_gates(const char* op, const Optional& gates, const at::Tensor& rows, const at::Tensor& slot_of) {
  if (!gates) return;
  const auto type = core::arithmetic_type(rows.scalar_type());
  TORCH_CHECK_TYPE(gates->scalar_type() == type, op, ": gates must be ", type, " beside rows of ", rows.scalar_type(),
                   ", got ", gates->scalar_type());
  TORCH_CHECK_VALUE(gates->sym_sizes() == slot_of.sym_sizes() && gates->device() == rows.device(), op,
                    ": gates must be [T, K] = ", slot_of.sym_sizes(), " on ", rows.device(), ", got ",
                    gates->sym_sizes(), " on ", gates->device());
}

void check_permute(const at::Tensor& x, const Optional& gates, const at::Tensor& slot_of, const at::Tensor& src_of) {
  check_plan_of("moe.permute", x, slot_of, src_of);
  check_rows("moe.permute", "x", x, "T", slot_of.sym_size(0));
  check_gates("moe.permute", gates, x, slot_of);
}

void check_combine(const at::Tensor& z, const Optional& gates, const at::Tensor& slot_of, const at::Tensor& src_of) {
  check_plan_of("moe.combine", z, slot_of, src_of);
  check_rows("moe.combine", "z", z, "S", src_of.sym_size(0));
  check_gates("moe.combine", gates, z, slot_of);
}

void check_match(const at::Tensor& x, const at::Tensor& z, const at::Tensor& slot_of, const at::Tensor& src_of) {
  check_permute(x, {}, slot_of, src_of);
  check_combine(z, {}, slot_of, src_of);
  TORCH_CHECK_VALUE(x.sym_size(1) == z.sym_size(1) && x.scalar_type() == z.scalar_type(),
                    "moe.combine: rows of equal size and dtype expected, got ", x.sym_sizes(), ' ', x.scalar_type(),
                    " and ", z.sym_sizes(), ' ', z.scalar_type());
}

// Contiguous tensors behind the raw pointers of a call.
struct Staging {
  at::Tensor slot_of, src_of;
  Optional gates;
  kernels::Rows rows;

  Staging(const at::Tensor& slot, const at::Tensor& src, const Optional& weights, int64_t dim)
      : slot_of(slot.contiguous()),
        src_of(src.contiguous()),
        gates(weights ? Optional(weights->contiguous()) : std::nullopt),
        rows{slot.size(0),
             slot.size(1),
             src.size(0),
             dim,
             slot_of.const_data_ptr<int32_t>(),
             src_of.const_data_ptr<int32_t>(),
             gates ? gates->const_data_ptr() : nullptr} {}
};

template <typename Work>
void over_rows(int64_t rows, int64_t per_row, const Work& work) {
  constexpr int64_t kWorkPerThread = 32768;
  at::parallel_for(0, rows, std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, per_row)), work);
}

at::Tensor permute_impl(const at::Tensor& x_, const Optional& gates, const at::Tensor& slot_of,
                        const at::Tensor& src_of) {
  check_permute(x_, gates, slot_of, src_of);
  const c10::OptionalDeviceGuard guard(device_of(x_));
  const at::Tensor x = x_.contiguous();
  const Staging in(slot_of, src_of, gates, x.size(1));
  at::Tensor y = at::empty({in.rows.slots, in.rows.dim}, x.options());
  const core::DType type = core::dtype_of(x, "moe.permute: x");
#if TORCH_EXT_WITH_CUDA
  if (x.is_cuda()) {
    kernels::permute_cuda(in.rows, type, x.const_data_ptr(), y.mutable_data_ptr(), core::current_stream(x.device()));
    return y;
  }
#endif
  over_rows(in.rows.slots, in.rows.dim, [&](int64_t begin, int64_t end) {
    kernels::permute_cpu(in.rows, type, x.const_data_ptr(), y.mutable_data_ptr(), begin, end);
  });
  return y;
}

at::Tensor combine_impl(const at::Tensor& z_, const Optional& gates, const at::Tensor& slot_of,
                        const at::Tensor& src_of) {
  check_combine(z_, gates, slot_of, src_of);
  const c10::OptionalDeviceGuard guard(device_of(z_));
  const at::Tensor z = z_.contiguous();
  const Staging in(slot_of, src_of, gates, z.size(1));
  at::Tensor o = at::empty({in.rows.tokens, in.rows.dim}, z.options());
  const core::DType type = core::dtype_of(z, "moe.combine: z");
#if TORCH_EXT_WITH_CUDA
  if (z.is_cuda()) {
    kernels::combine_cuda(in.rows, type, z.const_data_ptr(), o.mutable_data_ptr(), core::current_stream(z.device()));
    return o;
  }
#endif
  over_rows(in.rows.tokens, in.rows.dim * in.rows.top_k, [&](int64_t begin, int64_t end) {
    kernels::combine_cpu(in.rows, type, z.const_data_ptr(), o.mutable_data_ptr(), begin, end);
  });
  return o;
}

at::Tensor match_impl(const at::Tensor& x_, const at::Tensor& z_, const at::Tensor& slot_of, const at::Tensor& src_of) {
  check_match(x_, z_, slot_of, src_of);
  const c10::OptionalDeviceGuard guard(device_of(x_));
  const at::Tensor x = x_.contiguous(), z = z_.contiguous();
  const Staging in(slot_of, src_of, {}, x.size(1));
  at::Tensor u = at::empty(slot_of.sizes(), x.options().dtype(core::arithmetic_type(x.scalar_type())));
  const core::DType type = core::dtype_of(x, "moe.combine: rows");
#if TORCH_EXT_WITH_CUDA
  if (x.is_cuda()) {
    kernels::match_cuda(in.rows, type, x.const_data_ptr(), z.const_data_ptr(), u.mutable_data_ptr(),
                        core::current_stream(x.device()));
    return u;
  }
#endif
  over_rows(in.rows.tokens, in.rows.dim * in.rows.top_k, [&](int64_t begin, int64_t end) {
    kernels::match_cpu(in.rows, type, x.const_data_ptr(), z.const_data_ptr(), u.mutable_data_ptr(), begin, end);
  });
  return u;
}

at::Tensor permute_meta(const at::Tensor& x, const Optional& gates, const at::Tensor& slot_of,
                        const at::Tensor& src_of) {
  check_permute(x, gates, slot_of, src_of);
  return at::empty_symint({src_of.sym_size(0), x.sym_size(1)}, x.options().requires_grad(false));
}

at::Tensor combine_meta(const at::Tensor& z, const Optional& gates, const at::Tensor& slot_of,
                        const at::Tensor& src_of) {
  check_combine(z, gates, slot_of, src_of);
  return at::empty_symint({slot_of.sym_size(0), z.sym_size(1)}, z.options().requires_grad(false));
}

at::Tensor match_meta(const at::Tensor& x, const at::Tensor& z, const at::Tensor& slot_of, const at::Tensor& src_of) {
  check_match(x, z, slot_of, src_of);
  const auto options = x.options().dtype(core::arithmetic_type(x.scalar_type())).requires_grad(false);
  return at::empty_symint(slot_of.sym_sizes(), options);
}

}  // namespace

at::Tensor moe_permute(const at::Tensor& x, const Optional& gates, const at::Tensor& slot_of,
                       const at::Tensor& src_of) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_permute", "").typed<decltype(permute_impl)>();
  return op.call(x, gates, slot_of, src_of);
}

at::Tensor moe_combine(const at::Tensor& z, const Optional& gates, const at::Tensor& slot_of,
                       const at::Tensor& src_of) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_combine", "").typed<decltype(combine_impl)>();
  return op.call(z, gates, slot_of, src_of);
}

at::Tensor moe_match(const at::Tensor& x, const at::Tensor& z, const at::Tensor& slot_of, const at::Tensor& src_of) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_match", "").typed<decltype(match_impl)>();
  return op.call(x, z, slot_of, src_of);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("moe_permute(Tensor x, Tensor? gates, Tensor slot_of, Tensor src_of) -> Tensor");
  m.def("moe_combine(Tensor z, Tensor? gates, Tensor slot_of, Tensor src_of) -> Tensor");
  m.def("moe_match(Tensor x, Tensor z, Tensor slot_of, Tensor src_of) -> Tensor");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("moe_permute", permute_impl);
  m.impl("moe_combine", combine_impl);
  m.impl("moe_match", match_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("moe_permute", permute_impl);
  m.impl("moe_combine", combine_impl);
  m.impl("moe_match", match_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("moe_permute", permute_meta);
  m.impl("moe_combine", combine_meta);
  m.impl("moe_match", match_meta);
}

}  // namespace torch_ext::moe
