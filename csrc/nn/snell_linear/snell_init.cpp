#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/nn/snell_linear.h>
#include <torch_ext/ops/philox4x32.h>

#include <cmath>

#include "core/check.h"
#include "core/library.h"
#include "core/philox.h"

namespace torch_ext::nn {
namespace {

constexpr int64_t kWords = 4;

void check_factors(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() == 3 && b.dim() == 3, "snell_init: A and B must be [2, features, rank / 2], got ",
                    a.sym_sizes(), " and ", b.sym_sizes());
  core::dtype_of(a, "snell_init: A");
  core::dtype_of(b, "snell_init: B");
}

at::Tensor uniform(const at::Tensor& like, int64_t seed, int64_t stream) {
  const auto longs = at::TensorOptions(at::kLong).device(like.device());
  const int64_t blocks = (like.numel() + kWords - 1) / kWords;
  const at::Tensor counter = at::zeros({blocks, kWords}, longs);
  counter.select(1, 0).copy_(at::arange(blocks, longs));
  counter.select(1, 1).fill_(stream);
  counter.select(1, 2).fill_(static_cast<int64_t>(core::PhiloxTag::kInitial));
  const at::Tensor key = at::tensor({seed & 0xffffffff, seed >> 32 & 0xffffffff}, at::kLong).to(like.device());
  const at::Tensor words = ops::philox4x32(counter, key).view(-1).narrow(0, 0, like.numel());
  const double bound = 1 / std::sqrt(static_cast<double>(like.size(1) * like.size(2)));
  const at::Tensor unit = words.bitwise_right_shift(8).to(at::kDouble) * 0x1p-23 - 1;
  return (unit * bound).to(like.scalar_type()).view(like.sizes());
}

std::tuple<at::Tensor, at::Tensor> init_impl(const at::Tensor& a, const at::Tensor& b, int64_t seed) {
  check_factors(a, b);
  return {uniform(a, seed, 0), uniform(b, seed, 1)};
}

std::tuple<at::Tensor, at::Tensor> init_meta(const at::Tensor& a, const at::Tensor& b, int64_t) {
  check_factors(a, b);
  return {at::empty_symint(a.sym_sizes(), a.options().requires_grad(false)),
          at::empty_symint(b.sym_sizes(), b.options().requires_grad(false))};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> snell_init(const at::Tensor& A, const at::Tensor& B, int64_t seed) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::snell_init", "").typed<decltype(snell_init)>();
  return op.call(A, B, seed);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) { m.def("snell_init(Tensor A, Tensor B, int seed) -> (Tensor, Tensor)"); }
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("snell_init", init_impl); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("snell_init", init_impl); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("snell_init", init_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("snell_init", core::not_differentiable()); }

}  // namespace torch_ext::nn
