#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/solvers/monotonicity.h>

#include "core/library.h"
#include "ops/local_lipschitz/lipschitz_op.h"

namespace torch_ext::solvers {
namespace {

at::Tensor monotonicity_op(at::TensorList tensors, at::IntArrayRef layers, at::ArrayRef<double> numbers,
                           std::string_view names, const at::Tensor& lo, const at::Tensor& hi, bool safe) {
  const at::NoGradGuard no_grad;
  const ops::LipschitzProblem problem("monotonicity", tensors, layers, numbers, names, lo, hi);
  const auto method = ops::lipschitz_method(problem.network, lo.scalar_type(), "crown", "tight", 0, safe, false);
  const auto outputs = ops::lipschitz_outputs(problem.network, std::nullopt);
  const auto jacobian = ops::lipschitz_jacobian(problem.network, problem.lo, problem.hi, outputs, method);
  const at::Tensor rising = jacobian.lo.ge(0), falling = jacobian.hi.le(0).logical_and(rising.logical_not());
  return rising.to(at::kChar) - falling.to(at::kChar);
}

}  // namespace

at::Tensor monotonicity(const torch::nn::Module& model, const at::Tensor& lo, const at::Tensor& hi, bool safe) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::monotonicity", "").typed<decltype(monotonicity_op)>();
  const ops::LipschitzLayers layers = ops::lipschitz_layers(model);
  return op.call(layers.tensors, layers.layers, layers.numbers, layers.names, lo, hi, safe);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "monotonicity(Tensor[] tensors, int[] layers, float[] numbers, str names, Tensor lo, Tensor hi, bool safe=False) "
      "-> Tensor",
      monotonicity_op);
}

}  // namespace torch_ext::solvers
