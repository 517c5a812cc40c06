// Derivatives of the layers. The noise is a constant, so each is the derivative of a plain layer with another weight
// per member, made of operators that are differentiable themselves.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "ops/eggroll/eggroll_op.h"

namespace torch_ext::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// EggrollNoise with symbolic counters.
struct SymNoise {
  c10::SymInt seed, epoch, member_begin;
  bool antithetic;
  double sigma;
  int64_t rank;
  std::string law;

  void save(AutogradContext* ctx) const {
    auto& data = ctx->saved_data;
    data["seed"] = seed;
    data["epoch"] = epoch;
    data["member_begin"] = member_begin;
    data["antithetic"] = antithetic;
    data["sigma"] = sigma;
    data["rank"] = rank;
    data["law"] = law;
  }
  static SymNoise saved(AutogradContext* ctx) {
    auto& data = ctx->saved_data;
    return {data["seed"].toSymInt(),     data["epoch"].toSymInt(), data["member_begin"].toSymInt(),
            data["antithetic"].toBool(), data["sigma"].toDouble(), data["rank"].toInt(),
            data["law"].toStringRef()};
  }
};

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const SymNoise& noise, int64_t ordinal, int64_t bias_ordinal, bool transposed) {
  static const auto op = eggroll_operator<EggrollLinearOp>("torch_ext::eggroll_linear");
  return op.call(x, weight, bias, noise.seed, noise.epoch, noise.member_begin, noise.antithetic, noise.sigma,
                 noise.rank, noise.law, ordinal, bias_ordinal, transposed);
}

at::Tensor flat_rows(const at::Tensor& x) { return x.reshape_symint({-1, x.sym_size(-1)}); }

struct EggrollLinear : torch::autograd::Function<EggrollLinear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const SymNoise& noise, int64_t ordinal,
                            int64_t bias_ordinal, bool transposed) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    noise.save(ctx);
    ctx->saved_data["ordinal"] = ordinal;
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["bias"] = bias.has_value() && bias->requires_grad();
    return linear(x, weight, bias, noise, ordinal, bias_ordinal, transposed);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &grad = grads[0];
    const bool transposed = ctx->saved_data["transposed"].toBool();
    variable_list result(7);
    if (ctx->needs_input_grad(0)) {
      result[0] =
          linear(grad, weight, std::nullopt, SymNoise::saved(ctx), ctx->saved_data["ordinal"].toInt(), -1, !transposed);
    }
    if (ctx->needs_input_grad(1)) {
      const at::Tensor rows = flat_rows(x), grad_rows = flat_rows(grad);
      result[1] = transposed ? rows.t().mm(grad_rows) : grad_rows.t().mm(rows);
    }
    if (ctx->saved_data["bias"].toBool()) result[2] = flat_rows(grad).sum(0);
    return result;
  }
};

struct EggrollEmbedding : torch::autograd::Function<EggrollEmbedding> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& ids, const at::Tensor& weight,
                            const SymNoise& noise, int64_t ordinal) {
    static const auto op = eggroll_operator<EggrollEmbeddingOp>("torch_ext::eggroll_embedding");
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({ids});
    ctx->saved_data["entries"] = weight.sym_size(0);
    return op.call(ids, weight, noise.seed, noise.epoch, noise.member_begin, noise.antithetic, noise.sigma, noise.rank,
                   noise.law, ordinal);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor ids = ctx->get_saved_variables()[0];
    const at::Tensor grad = at::embedding_dense_backward_symint(flat_rows(grads[0]), ids.reshape({-1}),
                                                                ctx->saved_data["entries"].toSymInt(), -1, false);
    return {at::Tensor(), grad, at::Tensor(), at::Tensor()};
  }
};

struct EggrollVector : torch::autograd::Function<EggrollVector> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& theta, const c10::SymInt& members,
                            const SymNoise& noise, int64_t ordinal) {
    static const auto op = eggroll_operator<EggrollVectorOp>("torch_ext::eggroll_vector");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(theta, members, noise.seed, noise.epoch, noise.member_begin, noise.antithetic, noise.sigma,
                   noise.rank, noise.law, ordinal);
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) {
    return {grads[0].sum(0), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor linear_autograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           c10::SymInt seed, c10::SymInt epoch, c10::SymInt member_begin, bool antithetic, double sigma,
                           int64_t rank, std::string_view law, int64_t ordinal, int64_t bias_ordinal, bool transposed) {
  return EggrollLinear::apply(
      x, weight, bias,
      SymNoise{std::move(seed), std::move(epoch), std::move(member_begin), antithetic, sigma, rank, std::string(law)},
      ordinal, bias_ordinal, transposed);
}

at::Tensor embedding_autograd(const at::Tensor& ids, const at::Tensor& weight, c10::SymInt seed, c10::SymInt epoch,
                              c10::SymInt member_begin, bool antithetic, double sigma, int64_t rank,
                              std::string_view law, int64_t ordinal) {
  return EggrollEmbedding::apply(
      ids, weight,
      SymNoise{std::move(seed), std::move(epoch), std::move(member_begin), antithetic, sigma, rank, std::string(law)},
      ordinal);
}

at::Tensor vector_autograd(const at::Tensor& theta, c10::SymInt members, c10::SymInt seed, c10::SymInt epoch,
                           c10::SymInt member_begin, bool antithetic, double sigma, int64_t rank, std::string_view law,
                           int64_t ordinal) {
  return EggrollVector::apply(
      theta, members,
      SymNoise{std::move(seed), std::move(epoch), std::move(member_begin), antithetic, sigma, rank, std::string(law)},
      ordinal);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("eggroll_linear", linear_autograd);
  m.impl("eggroll_embedding", embedding_autograd);
  m.impl("eggroll_vector", vector_autograd);
}

}  // namespace torch_ext::ops
