#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/ops/local_lipschitz.h>

#include <limits>

#include "core/library.h"
#include "ops/local_lipschitz/lipschitz_op.h"

namespace torch_ext::ops {
namespace {

using Bounds = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Values can be looked at only where there are any: an operator of its own, with a Meta kernel that does nothing.
void check_values(const at::Tensor& lo, const at::Tensor& hi) {
  TORCH_CHECK_VALUE(lo.le(hi).all().item<bool>(),
                    "local_lipschitz: the box is empty or holds NaN: lo must not exceed hi anywhere (eps >= 0)");
}
void check_values_meta(const at::Tensor&, const at::Tensor&) {}

Bounds bounds_op(at::TensorList tensors, at::IntArrayRef layers, at::ArrayRef<double> numbers, std::string_view names,
                 const at::Tensor& lo, const at::Tensor& hi, at::OptionalIntArrayRef outputs, std::string_view forward,
                 std::string_view backward, int64_t alpha_iters, bool safe, bool detach_intermediate) {
  const LipschitzProblem problem("local_lipschitz", tensors, layers, numbers, names, lo, hi);
  const auto method =
      lipschitz_method(problem.network, lo.scalar_type(), forward, backward, alpha_iters, safe, detach_intermediate);
  const auto rows = lipschitz_outputs(problem.network, outputs);
  const auto jacobian = lipschitz_jacobian(problem.network, problem.lo, problem.hi, rows, method);
  return {jacobian.norm, jacobian.lo, jacobian.hi};
}

}  // namespace

LipschitzProblem::LipschitzProblem(const char* what, at::TensorList tensors, at::IntArrayRef layers,
                                   at::ArrayRef<double> numbers, std::string_view names, const at::Tensor& low,
                                   const at::Tensor& high)
    : no_autocast_(c10::autocast_dispatch_keyset) {
  TORCH_CHECK_TYPE(low.scalar_type() == at::kFloat || low.scalar_type() == at::kDouble, what,
                   ": boxes must be float64 (recommended) or float32, got ", low.scalar_type());
  TORCH_CHECK_VALUE(
      high.scalar_type() == low.scalar_type() && high.device() == low.device() && high.sym_sizes() == low.sym_sizes(),
      what, ": lo and hi must have one shape, dtype and device, got ", low.toString(), low.sym_sizes(), " and ",
      high.toString(), high.sym_sizes());
  TORCH_CHECK_VALUE(low.dim() >= 2 && low.sym_numel() != 0, what,
                    ": boxes must be [boxes, features] or [boxes, channels, height, width] and not empty, got ",
                    low.sym_sizes());
  network = make_lipschitz_network(tensors.vec(), layers, numbers, std::string(names), low);
  lipschitz_check_precision(network, low);
  static const auto check = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("torch_ext::lipschitz_check_values", "")
                                .typed<decltype(check_values)>();
  check.call(low, high);
  lo = low.flatten(1);
  hi = high.flatten(1);
}

std::tuple<at::Tensor, at::Tensor> lipschitz_box(const at::Tensor& x, const at::Tensor& eps, bool safe) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
                   "local_lipschitz: x must be float64 (recommended) or float32, got ", x.scalar_type());
  const at::Tensor radius = eps.to(x.options().requires_grad(false));
  const at::Tensor lo = x - radius, hi = x + radius;
  TORCH_CHECK_VALUE(lo.sym_sizes() == x.sym_sizes(), "local_lipschitz: eps must broadcast over x ", x.sym_sizes(),
                    ", got shape ", eps.sym_sizes());
  if (!safe) return {lo, hi};
  // One ulp outward: the differences are rounded to nearest.
  const auto outward = [](const at::Tensor& end, double to) {
    const at::Tensor beyond = at::nextafter(end.detach(), at::full({}, to, end.options().requires_grad(false)));
    return end + (beyond - end.detach());
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return {outward(lo, -kInfinity), outward(hi, kInfinity)};
}

Bounds local_lipschitz(const torch::nn::Module& model, const at::Tensor& x, const at::Tensor& eps,
                       const LocalLipschitzOptions& options) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::local_lipschitz", "").typed<decltype(bounds_op)>();
  const LipschitzLayers layers = lipschitz_layers(model);
  const auto [lo, hi] = lipschitz_box(x, eps, options.safe());
  at::OptionalIntArrayRef outputs;
  if (options.outputs().has_value()) outputs = *options.outputs();
  return op.call(layers.tensors, layers.layers, layers.numbers, layers.names, lo, hi, outputs, options.forward(),
                 options.backward(), options.alpha_iters(), options.safe(), options.detach_intermediate());
}

Bounds local_lipschitz(const torch::nn::Module& model, const at::Tensor& x, double eps,
                       const LocalLipschitzOptions& options) {
  return local_lipschitz(model, x, at::scalar_tensor(eps, at::kDouble), options);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  // Composite: made of ATen's products and of the two operators of lipschitz_relax.h, which carry the derivatives.
  m.def(
      "local_lipschitz(Tensor[] tensors, int[] layers, float[] numbers, str names, Tensor lo, Tensor hi, int[]? "
      "outputs=None, *, str forward='crown', str backward='tight', int alpha_iters=0, bool safe=False, bool "
      "detach_intermediate=False) -> (Tensor L, Tensor J_lo, Tensor J_hi)",
      bounds_op);
  m.def("lipschitz_box(Tensor x, Tensor eps, bool safe=False) -> (Tensor lo, Tensor hi)", lipschitz_box);
  m.def("lipschitz_check_values(Tensor lo, Tensor hi) -> ()");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("lipschitz_check_values", check_values); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("lipschitz_check_values", check_values); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("lipschitz_check_values", check_values_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("lipschitz_check_values", core::not_differentiable()); }

}  // namespace torch_ext::ops
