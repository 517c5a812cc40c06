// G(x, W)[s] = x[s] W_e^T and O(u, x)_e = sum_s u[s] x[s]^T over the rows s of segment e; derivatives of one another:
//   G: dx = G(dy, W^T), dW = O(dy, x)        O: du = G(x, dV), dx = G(u, dV^T)
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch_ext/moe/layer.h>

#include "core/check.h"

namespace torch_ext::moe {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "moe.grouped_mm";

at::Tensor call_outer(const at::Tensor& u, const at::Tensor& x, const at::Tensor& offsets) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_grouped_outer", "").typed<decltype(call_outer)>();
  return op.call(u, x, offsets);
}

void check_segments(const at::Tensor& x, const at::Tensor& other, const at::Tensor& offsets) {
  core::dtype_of(x, "moe.grouped_mm: x");
  TORCH_CHECK_TYPE(x.scalar_type() == other.scalar_type(), kName, ": x has dtype ", x.scalar_type(), ", the weight ",
                   other.scalar_type());
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kInt, kName, ": offsets must be int32, got ", offsets.scalar_type());
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.sym_size(0) >= 2, kName, ": offsets must be [E + 1], got ",
                    offsets.sym_sizes());
  TORCH_CHECK_VALUE(x.device() == other.device() && x.device() == offsets.device(), kName, ": x is on ", x.device(),
                    ", the weight on ", other.device(), ", offsets on ", offsets.device());
}

void check_mm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  check_segments(x, weight, offsets);
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 3 && x.sym_size(1) == weight.sym_size(2) &&
                        weight.sym_size(0) == offsets.sym_size(0) - 1,
                    kName, ": x must be [S, D] and weight [E, N, D] with offsets [E + 1], got ", x.sym_sizes(), ", ",
                    weight.sym_sizes(), " and ", offsets.sym_sizes());
}

void check_outer(const at::Tensor& u, const at::Tensor& x, const at::Tensor& offsets) {
  check_segments(x, u, offsets);
  TORCH_CHECK_VALUE(u.dim() == 2 && x.dim() == 2 && u.sym_size(0) == x.sym_size(0), kName,
                    ": u must be [S, N] and x [S, D], got ", u.sym_sizes(), " and ", x.sym_sizes());
}

// visit(e, first row, rows) for the segments that have rows; what follows the last one is returned.
template <typename Visit>
int64_t for_segments(const at::Tensor& offsets, int64_t rows, const Visit& visit) {
  const at::Tensor host = offsets.to(at::kCPU).contiguous();
  const auto* at = host.const_data_ptr<int32_t>();
  for (int64_t e = 0; e + 1 < host.numel(); ++e) {
    TORCH_CHECK_VALUE(at[e] >= 0 && at[e] <= at[e + 1] && at[e + 1] <= rows, kName,
                      ": offsets must rise from 0 to at most S = ", rows, "; offsets[", e, "] is ", at[e],
                      " and the next ", at[e + 1]);
    if (at[e + 1] > at[e]) visit(e, at[e], at[e + 1] - at[e]);
  }
  return at[host.numel() - 1];
}

at::Tensor mm_impl(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  check_mm(x, weight, offsets);
  at::Tensor y = at::empty({x.size(0), weight.size(1)}, x.options());
  const int64_t used = for_segments(offsets, x.size(0), [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor out = y.narrow(0, first, rows);
    at::mm_out(out, x.narrow(0, first, rows), weight.select(0, e).t());
  });
  y.narrow(0, used, y.size(0) - used).zero_();
  return y;
}

at::Tensor outer_impl(const at::Tensor& u, const at::Tensor& x, const at::Tensor& offsets) {
  check_outer(u, x, offsets);
  at::Tensor v = at::zeros({offsets.size(0) - 1, u.size(1), x.size(1)}, x.options());
  for_segments(offsets, x.size(0), [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor out = v.select(0, e);
    at::mm_out(out, u.narrow(0, first, rows).t(), x.narrow(0, first, rows));
  });
  return v;
}

at::Tensor mm_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  check_mm(x, weight, offsets);
  return at::empty_symint({x.sym_size(0), weight.sym_size(1)}, x.options().requires_grad(false));
}

at::Tensor outer_meta(const at::Tensor& u, const at::Tensor& x, const at::Tensor& offsets) {
  check_outer(u, x, offsets);
  return at::empty_symint({offsets.sym_size(0) - 1, u.sym_size(1), x.sym_size(1)}, x.options().requires_grad(false));
}

struct GroupedMM : Function<GroupedMM> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& offsets) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, offsets});
    return grouped_mm(x, weight, offsets);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list results(3);
    if (ctx->needs_input_grad(0)) results[0] = grouped_mm(grads[0], saved[1].transpose(1, 2), saved[2]);
    if (ctx->needs_input_grad(1)) results[1] = call_outer(grads[0], saved[0], saved[2]);
    return results;
  }
};

struct GroupedOuter : Function<GroupedOuter> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& u, const at::Tensor& x, const at::Tensor& offsets) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({u, x, offsets});
    return call_outer(u, x, offsets);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list results(3);
    if (ctx->needs_input_grad(0)) results[0] = grouped_mm(saved[1], grads[0], saved[2]);
    if (ctx->needs_input_grad(1)) results[1] = grouped_mm(saved[0], grads[0].transpose(1, 2), saved[2]);
    return results;
  }
};

at::Tensor mm_autograd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  return GroupedMM::apply(x, weight, offsets);
}
at::Tensor outer_autograd(const at::Tensor& u, const at::Tensor& x, const at::Tensor& offsets) {
  return GroupedOuter::apply(u, x, offsets);
}

// As torch.nn.Linear: in the narrow type.
at::Tensor mm_autocast(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const auto device = x.device().type();
  const auto type = at::autocast::get_autocast_dtype(device);
  return grouped_mm(at::autocast::cached_cast(type, x, device), at::autocast::cached_cast(type, weight, device),
                    offsets);
}

}  // namespace

at::Tensor grouped_mm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_grouped_mm", "").typed<decltype(mm_impl)>();
  return op.call(x, weight, offsets);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("moe_grouped_mm(Tensor x, Tensor weight, Tensor offsets) -> Tensor");
  m.def("moe_grouped_outer(Tensor u, Tensor x, Tensor offsets) -> Tensor");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("moe_grouped_mm", mm_impl);
  m.impl("moe_grouped_outer", outer_impl);
}
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {  // products of torch: no kernel of ours is needed
  m.impl("moe_grouped_mm", mm_impl);
  m.impl("moe_grouped_outer", outer_impl);
}
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("moe_grouped_mm", mm_meta);
  m.impl("moe_grouped_outer", outer_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("moe_grouped_mm", mm_autograd);
  m.impl("moe_grouped_outer", outer_autograd);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) { m.impl("moe_grouped_mm", mm_autocast); }
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) { m.impl("moe_grouped_mm", mm_autocast); }

}  // namespace torch_ext::moe
