// permute P(x, g), combine C(z, g) and match M(x, z) are linear in each argument and derivatives of one another:
//   P: dx = C(dy, g), dg = M(x, dy)     C: dz = P(do, g), dg = M(do, z)     M: dx = C(z, du), dz = P(x, du)
// so they can be differentiated to any order.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "moe/dispatch_plan/dispatch_plan_op.h"

namespace torch_ext::moe {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

Optional optional(const at::Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }

// Saves rows only where the gradient of the gates needs them.
void save(AutogradContext* ctx, const at::Tensor& rows, const Optional& gates, const at::Tensor& slot_of,
          const at::Tensor& src_of) {
  const bool by_gates = gates && gates->requires_grad();
  ctx->save_for_backward({by_gates ? rows : at::Tensor(), gates.value_or(at::Tensor()), slot_of, src_of});
}

struct Permute : Function<Permute> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Optional& gates, const at::Tensor& slot_of,
                            const at::Tensor& src_of) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, gates, slot_of, src_of);
    return moe_permute(x, gates, slot_of, src_of);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list results(4);
    if (ctx->needs_input_grad(0)) results[0] = moe_combine(grads[0], optional(saved[1]), saved[2], saved[3]);
    if (saved[0].defined()) results[1] = moe_match(saved[0], grads[0], saved[2], saved[3]);
    return results;
  }
};

struct Combine : Function<Combine> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& z, const Optional& gates, const at::Tensor& slot_of,
                            const at::Tensor& src_of) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, z, gates, slot_of, src_of);
    return moe_combine(z, gates, slot_of, src_of);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list results(4);
    if (ctx->needs_input_grad(0)) results[0] = moe_permute(grads[0], optional(saved[1]), saved[2], saved[3]);
    if (saved[0].defined()) results[1] = moe_match(grads[0], saved[0], saved[2], saved[3]);
    return results;
  }
};

struct Match : Function<Match> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& z, const at::Tensor& slot_of,
                            const at::Tensor& src_of) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, z, slot_of, src_of});
    return moe_match(x, z, slot_of, src_of);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list results(4);
    if (ctx->needs_input_grad(0)) results[0] = moe_combine(saved[1], grads[0], saved[2], saved[3]);
    if (ctx->needs_input_grad(1)) results[1] = moe_permute(saved[0], grads[0], saved[2], saved[3]);
    return results;
  }
};

at::Tensor permute_autograd(const at::Tensor& x, const Optional& gates, const at::Tensor& slot_of,
                            const at::Tensor& src_of) {
  return Permute::apply(x, gates, slot_of, src_of);
}
at::Tensor combine_autograd(const at::Tensor& z, const Optional& gates, const at::Tensor& slot_of,
                            const at::Tensor& src_of) {
  return Combine::apply(z, gates, slot_of, src_of);
}
at::Tensor match_autograd(const at::Tensor& x, const at::Tensor& z, const at::Tensor& slot_of,
                          const at::Tensor& src_of) {
  return Match::apply(x, z, slot_of, src_of);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("moe_permute", permute_autograd);
  m.impl("moe_combine", combine_autograd);
  m.impl("moe_match", match_autograd);
}

}  // namespace torch_ext::moe
